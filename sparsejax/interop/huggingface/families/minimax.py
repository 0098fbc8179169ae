"""MiniMax-01 (arXiv:2501.08313): lightning attention, softmax attention in some layers, and experts in all.

Residual connections start from the output of the norm, and have constant factors.
"""

from __future__ import annotations

import dataclasses

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import TensorMap
from sparsejax.interop.huggingface.translation import (
    LAYER_NAMES,
    SILU,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
    read_window,
)
from sparsejax.layers import ExpertsConfig, LayerConfig, LightningConfig, MixerConfig, NormConfig, ResidualConfig

LIGHTNING_NORM_EPS = 1e-6  # for any `rms_norm_eps`


def translate(fields: Fields) -> Translation:
    """Translates a `MiniMaxConfig`."""
    fields.ignore("block_size")
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    types = read_layer_types(
        fields,
        ["linear_attention" if i % 2 else "full_attention" for i in range(depth)],
        allowed=("full_attention", "linear_attention"),
    )
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-5))
    # The released model rotates the first `rotary_dim` channels of a head; transformers ignores the key.
    attention = read_attention(fields, width, None, pattern=read_window(fields))
    rotated = fields.take("rotary_dim", None, int) or attention.head_width
    rope = read_rope(fields, base=1e6, fraction=rotated / attention.head_width)
    attention = dataclasses.replace(attention, rope=rope)
    lightning = LightningConfig(heads=attention.heads, head_width=attention.head_width, norm_eps=LIGHTNING_NORM_EPS)
    experts = ExpertsConfig(
        experts=fields.take("num_local_experts", 8),
        top_k=fields.take("num_experts_per_tok", 2),
        width=fields.take("intermediate_size"),
        activation=fields.choose("hidden_act", SILU, "silu"),
        renormalize=True,
    )
    mlp_residual = _read_residual(fields, "mlp")

    def layer(mixer: MixerConfig, prefix: str) -> LayerConfig:
        residuals = {"mixer_residual": _read_residual(fields, prefix), "mlp_residual": mlp_residual}
        return pre_norm_layer(mixer, experts, norm, **residuals)

    layers = {
        "linear_attention": layer(lightning, "linear_attn"),
        "full_attention": layer(attention, "full_attn"),
    }
    tied = fields.take("tie_word_embeddings", False)
    named = [(LAYER_NAMES[layer_type], layers[layer_type]) for layer_type in types]
    model = build_model(fields, width, named, norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i, layer_type in enumerate(types):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target),
            *tensors.mixtral_experts(f"{source}.block_sparse_moe", f"{target}.mlp", experts.experts),
        ]
        if layer_type == "full_attention":
            maps += tensors.attention(f"{source}.self_attn", f"{target}.mixer")
        else:
            maps += _lightning_tensors(f"{source}.self_attn", f"{target}.mixer", lightning)
    buffers = r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
    return Translation(model, maps, unused=(*tensors.tied_head(tied), buffers))


def _read_residual(fields: Fields, prefix: str) -> ResidualConfig:
    keep, scale = (float(fields.take(f"{prefix}_{name}_factor", 1.0)) for name in ("alpha", "beta"))
    return ResidualConfig(base="norm", keep=keep, scale=scale)


def _lightning_tensors(source: str, target: str, config: LightningConfig) -> list[TensorMap]:
    projections = [f"{target}.{name}.weight" for name in ("query", "key", "value")]
    return [
        tensors.split_groups(f"{source}.qkv_proj.weight", projections, config.heads, [config.head_width] * 3),
        *tensors.norm(f"{source}.norm", f"{target}.norm"),
        *tensors.linears(source, target, {"output_gate": "gate", "out_proj": "out"}),
    ]
