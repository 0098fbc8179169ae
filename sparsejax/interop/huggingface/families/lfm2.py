"""LFM2 (arXiv:2511.23404): gated short convolutions, attention with normalized queries and keys, and gated MLPs."""

from __future__ import annotations

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import TensorMap, linear, linears, norm, split_conv, split_linear
from sparsejax.interop.huggingface.translation import (
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
)
from sparsejax.layers import ConvConfig, MlpConfig, NormConfig

# Redundant keys of the released files, and those of the initialization.
IGNORED = """
    block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_xavier_init conv_dim conv_dim_out
    conv_use_xavier_init num_heads
"""


def translate(fields: Fields) -> Translation:
    """Translates a `Lfm2Config`."""
    fields.ignore(*IGNORED.split())
    fields.require("use_pos_enc", True)
    fields.require("block_use_swiglu", True)
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    layer_norm = NormConfig(kind="rms", eps=fields.take("norm_eps", 1e-5))
    attention = read_attention(fields, width, read_rope(fields, base=1e6), heads=32, qk_norm=layer_norm)
    conv = ConvConfig(conv=fields.take("conv_L_cache", 3), bias=fields.take("conv_bias", False))
    mlp = MlpConfig(kind="gated", width=_read_inner(fields), activation="silu")
    indices = fields.take("full_attn_idxs", None, list)
    default = ["full_attention" if indices is None or i in indices else "conv" for i in range(depth)]
    types = read_layer_types(fields, default, allowed=("full_attention", "conv"))
    layers = {
        "full_attention": ("full", pre_norm_layer(attention, mlp, layer_norm)),
        "conv": ("conv", pre_norm_layer(conv, mlp, layer_norm)),
    }
    tied = fields.take("tie_embedding", fields.take("tie_word_embeddings", True))
    model = build_model(fields, width, [layers[layer_type] for layer_type in types], layer_norm, tied=tied)
    maps = tensors.embedding_and_head(tied, norm="model.embedding_norm")
    for i, layer_type in enumerate(types):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *norm(f"{source}.operator_norm", f"{target}.mixer_residual.before"),
            *norm(f"{source}.ffn_norm", f"{target}.mlp_residual.before"),
            *linears(f"{source}.feed_forward", f"{target}.mlp", {"w1": "gate", "w3": "up", "w2": "down"}),
        ]
        if layer_type == "conv":
            maps += _conv_tensors(f"{source}.conv", f"{target}.mixer", width, conv.bias)
        else:
            maps += _attention_tensors(f"{source}.self_attn", f"{target}.mixer")
    return Translation(model, maps, unused=tensors.tied_head(tied))


def _read_inner(fields: Fields) -> int:
    """Reads the width of the MLPs: two thirds of a number times a factor, rounded up to a multiple."""
    inner = fields.take("block_ff_dim", fields.take("intermediate_size", 12288))
    multiple, factor = fields.take("block_multiple_of", 256), fields.take("block_ffn_dim_multiplier", 1.0, float)
    if not fields.take("block_auto_adjust_ff_dim", True):
        return inner
    inner = int(2 * inner / 3)
    return inner if factor is None else multiple * -(-int(factor * inner) // multiple)


def _conv_tensors(source: str, target: str, width: int, bias: bool) -> list[TensorMap]:
    projections = [f"{target}.{name}" for name in ("gate_in", "gate_out", "input")]
    return [
        *split_linear(f"{source}.in_proj", projections, [width] * 3, bias),
        *split_conv(f"{source}.conv", [f"{target}.conv"], [width], bias),
        *linear(f"{source}.out_proj", f"{target}.out", bias),
    ]


def _attention_tensors(source: str, target: str) -> list[TensorMap]:
    return [
        *linears(source, target, {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}),
        *norm(f"{source}.q_layernorm", f"{target}.query_norm"),
        *norm(f"{source}.k_layernorm", f"{target}.key_norm"),
    ]
