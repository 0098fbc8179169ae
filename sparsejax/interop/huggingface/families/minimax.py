"""MiniMax-Text-01 (arXiv:2501.08313): lightning attention, softmax attention in a few layers, experts in all.

Residuals start from what the norm gives, and have factors of their own.
"""

from __future__ import annotations

from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, split_groups, transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    Translation,
    build_model,
    pieces_of_attention,
    pieces_of_ends,
    pieces_of_experts,
    pieces_of_norms,
    read_layer_types,
    read_rope,
    read_window,
    tied_head,
)
from sparsejax.layers import (
    AttentionConfig,
    ExpertsConfig,
    LayerConfig,
    LightningConfig,
    NormConfig,
    ResidualConfig,
)

LIGHTNING_NORM_EPS = 1e-6  # whatever `rms_norm_eps` is


def translate(fields: Fields) -> Translation:
    """From the keys of a `MiniMaxConfig`."""
    fields.ignore("block_size")
    width, heads, depth = (fields.take(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kinds = read_layer_types(
        fields,
        ["linear_attention" if i % 2 else "full_attention" for i in range(depth)],
        allowed=("full_attention", "linear_attention"),
    )
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-5))
    head_width = fields.take("head_dim", None) or width // heads
    mixers = {
        "linear_attention": LightningConfig(heads, head_width, LIGHTNING_NORM_EPS),
        "full_attention": AttentionConfig(
            pattern=read_window(fields),
            heads=heads,
            kv_heads=fields.take("num_key_value_heads", 8) or heads,
            head_width=head_width,
            rope=read_rope(fields, base=1e6),
            qk_norm=NormConfig("none", 1e-6),
            impl="auto",
        ),
    }
    residuals = {
        "linear_attention": _read_residual(fields, "linear_attn"),
        "full_attention": _read_residual(fields, "full_attn"),
    }
    experts = ExpertsConfig(
        experts=fields.take("num_local_experts", 8),
        top_k=fields.take("num_experts_per_tok", 2),
        width=fields.take("intermediate_size"),
        activation=fields.choose("hidden_act", {"silu": ACTIVATIONS["silu"]}, "silu"),  # the mixers' too
        renormalize=True,
    )
    after = _read_residual(fields, "mlp")
    layers = [
        (
            LAYER_NAMES[kind],
            LayerConfig(
                mixers[kind],
                experts,
                norm,
                "pre",
                remat=False,
                mixer_residual=residuals[kind],
                mlp_residual=after,
            ),
        )
        for kind in kinds
    ]
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    pieces = pieces_of_ends(tied)
    for i, kind in enumerate(kinds):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        pieces += [
            *pieces_of_norms(theirs, ours),
            transposed(f"{theirs}.block_sparse_moe.gate.weight", f"{ours}.mlp.router.weight"),
            *pieces_of_experts(
                f"{theirs}.block_sparse_moe.experts", f"{ours}.mlp", experts.experts, names=("w1", "w3", "w2")
            ),
        ]
        if kind == "full_attention":
            pieces += pieces_of_attention(f"{theirs}.self_attn", f"{ours}.mixer")
        else:
            pieces += _pieces_of_lightning(f"{theirs}.self_attn", f"{ours}.mixer", heads, head_width)
    buffers = r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
    return Translation(model, pieces, unused=(*tied_head(tied), buffers))


def _read_residual(fields: Fields, what: str) -> ResidualConfig:
    keep, scale = (float(fields.take(f"{what}_{name}_factor", 1)) for name in ("alpha", "beta"))
    return ResidualConfig("norm", keep, scale)


def _pieces_of_lightning(theirs: str, ours: str, heads: int, head_width: int) -> list[Piece]:
    projections = [f"{ours}.{name}.weight" for name in ("query", "key", "value")]
    return [
        split_groups(f"{theirs}.qkv_proj.weight", projections, heads, [head_width] * 3),
        same(f"{theirs}.norm.weight", f"{ours}.norm.scale"),
        *linear(f"{theirs}.output_gate", f"{ours}.gate"),
        *linear(f"{theirs}.out_proj", f"{ours}.out"),
    ]
