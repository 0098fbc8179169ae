"""Cohere 2: attention and MLP in parallel, rotary positions in windows only, and full attention without positions."""

from __future__ import annotations

import dataclasses

from sparsejax.config import HeadConfig
from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
    read_window,
)
from sparsejax.layers import MlpConfig, NormConfig

# Keys of the released files, and the values that the architecture implies.
IMPLIED = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}


def translate(fields: Fields) -> Translation:
    """Translates a `Cohere2Config`."""
    fields.ignore("cache_implementation", "layer_switch", "_sliding_window_pattern", "use_parallel_embedding")
    fields.ignore("use_embedding_sharing")
    for key, value in IMPLIED.items():
        fields.require(key, value)
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    period = fields.take("sliding_window_pattern", 4)
    default = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(depth)]
    types = read_layer_types(fields, default)
    norm = NormConfig(kind="layer", eps=fields.take("layer_norm_eps", 1e-5), bias=False)
    bias = fields.take("attention_bias", False)
    attention = read_attention(fields, width, None, heads=64, kv_heads=None, bias=bias, out_bias=bias)
    fields.require("head_dim", width // attention.heads)
    activation = fields.choose("hidden_act", ACTIVATIONS, "silu")
    mlp = MlpConfig(kind="gated", width=fields.take("intermediate_size", 22528), activation=activation)
    rope = dataclasses.replace(read_rope(fields), interleaved=True)
    local = dataclasses.replace(attention, pattern=read_window(fields, 4096), rope=rope)
    layers = {
        layer_type: pre_norm_layer(mixer, mlp, norm, parallel=True)
        for layer_type, mixer in {"sliding_attention": local, "full_attention": attention}.items()
    }
    tied = fields.take("tie_word_embeddings", True)
    named = [(LAYER_NAMES[layer_type], layers[layer_type]) for layer_type in types]
    head = HeadConfig(scale=float(fields.take("logit_scale", 0.0625)))
    model = build_model(fields, width, named, norm, tied=tied, head=head)
    maps = tensors.embedding_and_head(tied)
    for i in range(depth):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.norm(f"{source}.input_layernorm", f"{target}.mixer_residual.before"),
            *tensors.attention(f"{source}.self_attn", f"{target}.mixer", bias, bias),
            *tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp"),
        ]
    return Translation(model, maps, unused=tensors.tied_head(tied))
