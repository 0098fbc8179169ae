"""BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692), and the parts that they share with Longformer and BigBird.

They have learned positions, norms after each branch, biases in all linear layers, and a head that consists of a linear
layer, an activation and a norm.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from sparsejax.config import EmbeddingConfig, HeadConfig, ModelConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linear, norm, transposed
from sparsejax.interop.huggingface.translation import ACTIVATIONS, Translation, build_model
from sparsejax.layers import AttentionConfig, LayerConfig, MlpConfig, NormConfig
from sparsejax.patterns import Pattern

PROJECTIONS = ("query", "key", "value")
GLOBAL_PROJECTIONS = tuple(f"{name}_global" for name in PROJECTIONS)
# Redundant keys of Google's files.
IGNORED = """
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
"""
# Names in TensorFlow, which the first files kept.
OLDER_NORMS = ((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta"))


def translate(fields: Fields) -> Translation:
    """Translates a `BertConfig` with a masked language model head."""
    fields.ignore(*IGNORED.split())
    return _translate(fields, "bert", ("cls.predictions", "transform.dense", "transform.LayerNorm"))


def translate_roberta(fields: Fields) -> Translation:
    """Translates a `RobertaConfig` with a masked language model head, whose activation is gelu for any `hidden_act`."""
    padding = fields.take("pad_token_id", 1)
    return _translate(fields, "roberta", ("lm_head", "dense", "layer_norm"), head_activation="gelu", padding=padding)


def _translate(fields: Fields, prefix: str, head_names: tuple[str, str, str], **settings: Any) -> Translation:
    fields.require("is_decoder", False)
    fields.require("add_cross_attention", False)
    fields.require("position_embedding_type", "absolute")
    model = build_encoder(fields, ["full"] * fields.take("num_hidden_layers", 12), **settings)
    head, unused = head_tensors(*head_names, model.tied)
    bare = rf"({prefix}\.)?(embeddings\.(position_ids|token_type_ids)|pooler\..*)"
    return Translation(
        model,
        [*encoder_tensors(prefix, model, dict.fromkeys(PROJECTIONS, True)), *head],
        unused=(*unused, bare, r"cls\.seq_relationship\..*"),
        older_names=((rf"^{prefix}\.", ""), *OLDER_NORMS),
    )


def build_encoder(
    fields: Fields,
    patterns: Sequence[str | Pattern],
    bias: bool = True,
    global_projections: bool = False,
    head_activation: str | None = None,
    **embedding: Any,
) -> ModelConfig:
    """Builds the model from a pattern per layer.

    Args:
      fields: The config.json.
      patterns: Pattern of each layer.
      bias: Whether the projections of queries, keys and values have biases.
      global_projections: Whether global tokens have separate projections.
      head_activation: Activation of the head; defaults to `hidden_act`.
      **embedding: Other fields of `EmbeddingConfig`.
    """
    width, heads = fields.take("hidden_size", 768), fields.take("num_attention_heads", 12)
    layer_norm = NormConfig(kind="layer", eps=fields.take("layer_norm_eps", 1e-12))
    mixer = AttentionConfig(
        pattern="full",
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        rope=None,
        qk_norm=None,
        impl="auto",
        bias=bias,
        out_bias=True,
        global_projections=global_projections,
    )
    activation = fields.choose("hidden_act", ACTIVATIONS, "gelu")
    mlp = MlpConfig(kind="plain", width=fields.take("intermediate_size", 3072), activation=activation, bias=True)
    layer = LayerConfig(mixer=mixer, mlp=mlp, norm=layer_norm, norm_position="post", remat="none")
    layers = [("sparse", with_pattern(layer, pattern)) for pattern in patterns]
    return build_model(
        fields,
        width,
        layers,
        None,
        tied=fields.take("tie_word_embeddings", True),
        causal=False,
        embedding=EmbeddingConfig(
            types=fields.take("type_vocab_size", 2),
            positions=fields.take("max_position_embeddings"),
            norm=layer_norm,
            **embedding,
        ),
        head=HeadConfig(activation=head_activation or activation, norm=layer_norm, bias=True),
    )


def with_pattern(layer: LayerConfig, pattern: str | Pattern) -> LayerConfig:
    """Returns an attention layer with another pattern."""
    assert isinstance(layer.mixer, AttentionConfig)
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, pattern=pattern))


def encoder_tensors(prefix: str, model: ModelConfig, projections: dict[str, bool]) -> list[TensorMap]:
    """Embeddings and layers under `prefix`; `projections` states by name whether they have biases."""
    tables = {"word_embeddings": "tokens", "position_embeddings": "positions", "token_type_embeddings": "types"}
    maps = [identity(f"{prefix}.embeddings.{a}.weight", f"embedding.{b}") for a, b in tables.items()]
    maps += norm(f"{prefix}.embeddings.LayerNorm", "embedding.norm", bias=True)
    for i in range(len(model.names)):
        source, target = f"{prefix}.encoder.layer.{i}", f"layers.{i}"
        for name, bias in projections.items():
            maps += linear(f"{source}.attention.self.{name}", f"{target}.mixer.{name}", bias)
        maps += [
            *linear(f"{source}.attention.output.dense", f"{target}.mixer.out", bias=True),
            *norm(f"{source}.attention.output.LayerNorm", f"{target}.mixer_residual.after", bias=True),
            *linear(f"{source}.intermediate.dense", f"{target}.mlp.up", bias=True),
            *linear(f"{source}.output.dense", f"{target}.mlp.down", bias=True),
            *norm(f"{source}.output.LayerNorm", f"{target}.mlp_residual.after", bias=True),
        ]
    return maps


def head_tensors(head: str, dense: str, norm_name: str, tied: bool) -> tuple[list[TensorMap], tuple[str, ...]]:
    """The head of a masked language model, and patterns of its unused tensors.

    The bias is stored twice; that of the decoder is a copy if the head is tied, and replaces the other one otherwise.
    """
    decoder, bias = f"{head}.decoder", f"{head}.bias"
    maps = [
        *linear(f"{head}.{dense}", "head.linear", bias=True),
        *norm(f"{head}.{norm_name}", "head.norm", bias=True),
    ]
    if tied:
        copies = tuple(re.escape(f"{decoder}.{name}") for name in ("weight", "bias"))
        return [*maps, identity(bias, "head.bias")], copies
    maps += [transposed(f"{decoder}.weight", "head.weight"), identity(f"{decoder}.bias", "head.bias")]
    return maps, (re.escape(bias),)
