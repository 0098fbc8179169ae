"""RecurrentGemma (arXiv:2404.07839): recurrent blocks of Griffin and attention in windows, and gated MLPs."""

from __future__ import annotations

import jax.numpy as jnp

from sparsejax.config import EmbeddingConfig, HeadConfig
from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linears, split_conv
from sparsejax.interop.huggingface.translation import (
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_window,
)
from sparsejax.layers import MlpConfig, NormConfig, RgLruConfig

TYPES = {"recurrent": "recurrent", "linear_attention": "recurrent", "attention": "local", "sliding_attention": "local"}
GELU = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}  # the activation of recurrent blocks


def translate(fields: Fields) -> Translation:
    """Translates a `RecurrentGemmaConfig`."""
    fields.ignore("w_init_variance_scale", "final_w_init_variance_scale", "_block_types")
    fields.require("embeddings_scale_by_sqrt_dim", True)
    width, depth = fields.take("hidden_size", 2560), fields.take("num_hidden_layers", 26)
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6), offset=True)
    window = read_window(fields, 2048, key="attention_window_size")
    bias = fields.take("attention_bias", False)
    rope = read_rope(fields, fraction=0.5)
    attention = read_attention(fields, width, rope, heads=10, kv_heads=None, pattern=window, bias=bias, out_bias=True)
    fields.require("head_dim", width // attention.heads)
    recurrent = RgLruConfig(
        inner=fields.take("lru_width", None, int) or width,
        heads=attention.heads,
        conv=fields.take("conv1d_width", 4),
    )
    activation = fields.choose("hidden_activation", GELU, "gelu_pytorch_tanh")
    inner = fields.take("intermediate_size", 7680) // 2
    mlp = MlpConfig(kind="gated", width=inner, activation=activation, bias=True)
    layers = {"recurrent": pre_norm_layer(recurrent, mlp, norm), "local": pre_norm_layer(attention, mlp, norm)}
    names = _read_types(fields, depth)
    tied = fields.take("tie_word_embeddings", True)
    model = build_model(
        fields,
        width,
        [(name, layers[name]) for name in names],
        norm,
        tied=tied,
        embedding=EmbeddingConfig(scale=float(jnp.bfloat16(width**0.5))),  # rounded in the released model
        head=HeadConfig(softcap=fields.take("logits_soft_cap", 30.0)),
    )
    maps = tensors.embedding_and_head(tied, norm="model.final_norm")
    for i, name in enumerate(names):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.norm(f"{source}.temporal_pre_norm", f"{target}.mixer_residual.before"),
            *tensors.norm(f"{source}.channel_pre_norm", f"{target}.mlp_residual.before"),
            *tensors.gated_mlp(f"{source}.mlp_block", f"{target}.mlp", bias=True),
        ]
        if name == "local":
            maps += tensors.attention(f"{source}.temporal_block", f"{target}.mixer", bias, out_bias=True)
        else:
            maps += _recurrent_tensors(f"{source}.temporal_block", f"{target}.mixer", recurrent.inner)
    return Translation(model, maps, unused=tensors.tied_head(tied))


def _read_types(fields: Fields, depth: int) -> list[str]:
    """Reads the period of layer types, and repeats it."""
    types = fields.take("block_types", None, list) or ["recurrent", "recurrent", "attention"]
    for name in types:
        if name not in TYPES:
            raise fields.unsupported("block_types", name, TYPES)
    return [TYPES[types[i % len(types)]] for i in range(depth)]


def _recurrent_tensors(source: str, target: str, inner: int) -> list[TensorMap]:
    maps = [
        *linears(source, target, {"linear_x": "input", "linear_y": "gate", "linear_out": "out"}, bias=True),
        *split_conv(f"{source}.conv_1d", [f"{target}.conv"], [inner], bias=True),
        identity(f"{source}.rg_lru.recurrent_param", f"{target}.decay"),
    ]
    for a, b in {"input_gate": "input_gate", "recurrent_gate": "recurrence_gate"}.items():
        maps += [identity(f"{source}.rg_lru.{a}_{part}", f"{target}.{b}.{part}") for part in ("weight", "bias")]
    return maps
