"""gpt-oss (arXiv:2508.10925): alternating windows and full attention with sink logits, and clamped, biased experts."""

from __future__ import annotations

import dataclasses

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import TensorMap, identity, interleaved, linear
from sparsejax.interop.huggingface.translation import (
    LAYER_NAMES,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
    read_window,
)
from sparsejax.layers import ExpertsConfig, NormConfig

# Default of `rope_parameters`.
ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def translate(fields: Fields) -> Translation:
    """Translates a `GptOssConfig`."""
    fields.ignore("experts_per_token", "initial_context_length")  # older names, beside the current ones
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    types = read_layer_types(fields, ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)])
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-5))
    patterns = {"sliding_attention": read_window(fields, 128), "full_attention": "causal"}
    rope, bias = read_rope(fields, base=150_000.0, default=ROPE), fields.take("attention_bias", True)
    attention = read_attention(fields, width, rope, heads=64, head_width=64, sinks=True, bias=bias, out_bias=bias)
    experts = _read_experts(fields)
    layers = {
        layer_type: pre_norm_layer(dataclasses.replace(attention, pattern=pattern), experts, norm)
        for layer_type, pattern in patterns.items()
    }
    tied = fields.take("tie_word_embeddings", False)
    named = [(LAYER_NAMES[layer_type], layers[layer_type]) for layer_type in types]
    model = build_model(fields, width, named, norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i in range(depth):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target),
            *tensors.attention(f"{source}.self_attn", f"{target}.mixer", bias, bias),
            identity(f"{source}.self_attn.sinks", f"{target}.mixer.sinks"),
            *_experts_tensors(f"{source}.mlp", f"{target}.mlp"),
        ]
    return Translation(model, maps, unused=tensors.tied_head(tied))


def _read_experts(fields: Fields) -> ExpertsConfig:
    fields.require("hidden_act", "silu")
    count = fields.take("num_local_experts", None, int)
    return ExpertsConfig(
        experts=fields.take("num_experts", 128) if count is None else count,
        top_k=fields.take("num_experts_per_tok", 4),
        width=fields.take("intermediate_size", 2880),
        activation="silu",
        bias=True,
        renormalize=True,
        limit=float(fields.take("swiglu_limit", 7.0)),
        alpha=float(fields.take("swiglu_alpha", 1.702)),
    )


def _experts_tensors(source: str, target: str) -> list[TensorMap]:
    """All experts in one tensor with input rows; its columns alternate between gate and up."""
    experts = f"{source}.experts"
    return [
        *linear(f"{source}.router", f"{target}.router", bias=True),
        interleaved(f"{experts}.gate_up_proj", [f"{target}.gate", f"{target}.up"]),
        interleaved(f"{experts}.gate_up_proj_bias", [f"{target}.gate_bias", f"{target}.up_bias"]),
        identity(f"{experts}.down_proj", f"{target}.down"),
        identity(f"{experts}.down_proj_bias", f"{target}.down_bias"),
    ]
