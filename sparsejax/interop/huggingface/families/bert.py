"""Encoders on the plan of BERT (arXiv:1810.04805): what Longformer and BigBird have in common.

Learned positions, norms after each branch, biases everywhere, and a head of a linear map, an activation and a norm.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from sparsejax.config import EmbeddingConfig, HeadConfig, ModelConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, transposed
from sparsejax.interop.huggingface.translation import ACTIVATIONS, build_model
from sparsejax.layers import AttentionConfig, LayerConfig, MlpConfig, NormConfig
from sparsejax.patterns import Pattern

PROJECTIONS = ("query", "key", "value")
GLOBAL = tuple(f"{name}_global" for name in PROJECTIONS)


def build_encoder(
    fields: Fields,
    patterns: Sequence[str | Pattern],
    bias: bool = True,
    global_projections: bool = False,
    head_activation: str | None = None,
    **embedding: float | int | None,
) -> ModelConfig:
    """The model: one pattern for each layer; `embedding` are fields of `EmbeddingConfig`."""
    width, heads = fields.take("hidden_size", 768), fields.take("num_attention_heads", 12)
    norm = NormConfig("layer", fields.take("layer_norm_eps", 1e-12))
    mixer = AttentionConfig(
        pattern="full",
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        rope=None,
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
        bias=bias,
        out_bias=True,
        global_projections=global_projections,
    )
    activation = fields.choose("hidden_act", ACTIVATIONS, "gelu")
    mlp = MlpConfig("plain", fields.take("intermediate_size", 3072), activation, bias=True)
    layers = [
        ("sparse", LayerConfig(dataclasses.replace(mixer, pattern=pattern), mlp, norm, "post", remat=False))
        for pattern in patterns
    ]
    return build_model(
        fields,
        width,
        layers,
        NormConfig("none", 1e-6),
        tied=fields.take("tie_word_embeddings", True),
        causal=False,
        embedding=EmbeddingConfig(
            types=fields.take("type_vocab_size", 2),
            positions=fields.take("max_position_embeddings"),
            norm=norm,
            **embedding,
        ),
        head=HeadConfig(activation=head_activation or activation, norm=norm, bias=True),
    )


def pieces_of_encoder(prefix: str, model: ModelConfig, projections: dict[str, bool]) -> list[Piece]:
    """Embeddings and layers under `prefix`; `projections` by name, and whether they have a bias."""
    tables = {"word_embeddings": "tokens", "position_embeddings": "positions", "token_type_embeddings": "types"}
    pieces = [same(f"{prefix}.embeddings.{a}.weight", f"embedding.{b}") for a, b in tables.items()]
    pieces += pieces_of_norm(f"{prefix}.embeddings.LayerNorm", "embedding.norm")
    for i in range(len(model.names)):
        theirs, ours = f"{prefix}.encoder.layer.{i}", f"layers.{i}"
        for name, bias in projections.items():
            pieces += linear(f"{theirs}.attention.self.{name}", f"{ours}.mixer.{name}", bias)
        pieces += [
            *linear(f"{theirs}.attention.output.dense", f"{ours}.mixer.out", bias=True),
            *pieces_of_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_residual.after"),
            *linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.up", bias=True),
            *linear(f"{theirs}.output.dense", f"{ours}.mlp.down", bias=True),
            *pieces_of_norm(f"{theirs}.output.LayerNorm", f"{ours}.mlp_residual.after"),
        ]
    return pieces


def pieces_of_head(head: str, dense: str, norm: str, tied: bool) -> tuple[list[Piece], tuple[str, ...]]:
    """The head of a masked language model, and what of it is not used.

    The bias is stored twice. With a tied head the decoder's is the other one again, else it alone counts.
    """
    decoder, bias = f"{head}.decoder", f"{head}.bias"
    pieces = [*linear(f"{head}.{dense}", "head.linear", bias=True), *pieces_of_norm(f"{head}.{norm}", "head.norm")]
    if tied:
        return [*pieces, same(bias, "head.bias")], tuple(re.escape(f"{decoder}.{name}") for name in ("weight", "bias"))
    pieces += [transposed(f"{decoder}.weight", "head.weight"), same(f"{decoder}.bias", "head.bias")]
    return pieces, (re.escape(bias),)


def pieces_of_norm(theirs: str, ours: str) -> list[Piece]:
    """A LayerNorm."""
    return [same(f"{theirs}.weight", f"{ours}.scale"), same(f"{theirs}.bias", f"{ours}.bias")]
