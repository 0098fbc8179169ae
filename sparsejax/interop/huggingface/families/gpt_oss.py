"""gpt-oss (arXiv:2508.10925): windows and full attention in turn, sink logits, YaRN, clamped experts with biases."""

from __future__ import annotations

import dataclasses

from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, interleaved, linear, same
from sparsejax.interop.huggingface.translation import (
    LAYER_NAMES,
    Translation,
    build_model,
    pieces_of_attention,
    pieces_of_ends,
    pieces_of_norms,
    read_layer_types,
    read_rope,
    read_window,
    tied_head,
)
from sparsejax.layers import AttentionConfig, ExpertsConfig, LayerConfig, NormConfig

# The rotary positions of a config.json that does not mention any.
ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def translate(fields: Fields) -> Translation:
    """From the keys of a `GptOssConfig`."""
    fields.ignore("experts_per_token", "initial_context_length")  # older names, beside the others
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    kinds = read_layer_types(fields, ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)])
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-5))
    patterns = {"sliding_attention": read_window(fields, default=128), "full_attention": "causal"}
    attention, experts = _read_attention(fields, width), _read_experts(fields)
    layers = []
    for kind in kinds:
        mixer = dataclasses.replace(attention, pattern=patterns[kind])
        layers.append((LAYER_NAMES[kind], LayerConfig(mixer, experts, norm, "pre", remat=False)))
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    pieces = pieces_of_ends(tied)
    for i in range(depth):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        pieces += [
            *pieces_of_norms(theirs, ours),
            *pieces_of_attention(f"{theirs}.self_attn", f"{ours}.mixer", attention.bias, attention.bias),
            same(f"{theirs}.self_attn.sinks", f"{ours}.mixer.sinks"),
            *_pieces_of_experts(f"{theirs}.mlp", f"{ours}.mlp"),
        ]
    return Translation(model, pieces, unused=tied_head(tied))


def _read_attention(fields: Fields, width: int) -> AttentionConfig:
    heads, bias = fields.take("num_attention_heads", 64), fields.take("attention_bias", True)
    return AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 8) or heads,
        head_width=fields.take("head_dim", 64) or width // heads,
        rope=read_rope(fields, base=150_000.0, default=ROPE),
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
        sinks=True,
        bias=bias,
        out_bias=bias,
    )


def _read_experts(fields: Fields) -> ExpertsConfig:
    fields.require("hidden_act", "silu")
    count = fields.take("num_local_experts", None)
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


def _pieces_of_experts(theirs: str, ours: str) -> list[Piece]:
    """All experts in one tensor, rows are inputs; columns of gate and up take turns."""
    experts = f"{theirs}.experts"
    return [
        *linear(f"{theirs}.router", f"{ours}.router", bias=True),
        interleaved(f"{experts}.gate_up_proj", [f"{ours}.gate", f"{ours}.up"]),
        interleaved(f"{experts}.gate_up_proj_bias", [f"{ours}.gate_bias", f"{ours}.up_bias"]),
        same(f"{experts}.down_proj", f"{ours}.down"),
        same(f"{experts}.down_proj_bias", f"{ours}.down_bias"),
    ]
