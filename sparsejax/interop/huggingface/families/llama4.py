"""Llama 4 (text): rotary positions in chunks, growing scores in full attention without positions, and experts.

Experts weigh their input instead of their output, and a shared expert is added. Queries and keys of chunks are
normalized after the rotation, which equals a norm without a scale before it.
"""

from __future__ import annotations

import dataclasses

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linear, split_last
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
    translate_text,
)
from sparsejax.layers import AttentionConfig, ExpertsConfig, MlpConfig, NormConfig

NAMES = {"chunked_attention": "local", "full_attention": "full"}


def translate(fields: Fields) -> Translation:
    """Translates a `Llama4TextConfig`."""
    fields.ignore("for_llm_compressor")
    width, depth = fields.take("hidden_size", 5120), fields.take("num_hidden_layers", 48)
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-5))
    bias = fields.take("attention_bias", False)
    attention = read_attention(fields, width, None, heads=40, head_width=128, bias=bias, out_bias=bias)
    rotates = _read_rotations(fields, depth)
    rotated, plain = _read_rotated(fields, attention, norm), _read_growth(fields, attention)
    types = read_layer_types(
        fields, ["chunked_attention" if rotated else "full_attention" for rotated in rotates], allowed=tuple(NAMES)
    )
    patterns = {"chunked_attention": _read_chunk(fields), "full_attention": "causal"}
    activation = fields.choose("hidden_act", ACTIVATIONS, "silu")
    mlp = MlpConfig(kind="gated", width=fields.take("intermediate_size_mlp", 16384), activation=activation)
    inner = fields.take("intermediate_size", 8192)
    experts = ExpertsConfig(
        experts=fields.take("num_local_experts", 16),
        top_k=fields.take("num_experts_per_tok", 1),
        width=inner,
        activation=activation,
        router="sigmoid",
        weigh_input=True,
        shared_width=inner,
    )
    routed = _read_routed(fields, depth)
    layers = []
    for i, layer_type in enumerate(types):
        mixer = dataclasses.replace(rotated if rotates[i] else plain, pattern=patterns[layer_type])
        name = NAMES[layer_type] + ("_experts" if i in routed else "")
        layers.append((name, pre_norm_layer(mixer, experts if i in routed else mlp, norm)))
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i in range(depth):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target),
            *tensors.attention(f"{source}.self_attn", f"{target}.mixer", bias, bias),
        ]
        if i in routed:
            maps += _experts_tensors(f"{source}.feed_forward", f"{target}.mlp", inner)
        else:
            maps += tensors.gated_mlp(f"{source}.feed_forward", f"{target}.mlp")
    return Translation(model, maps, unused=tensors.tied_head(tied))


def translate_multimodal(fields: Fields) -> Translation:
    """Translates the text model of a `Llama4Config`, whose images are not supported."""
    fields.ignore("boi_token_index", "eoi_token_index", "image_token_index")
    return translate_text(fields, translate, (r"vision_model\..*", r"multi_modal_projector\..*"))


def _read_rotations(fields: Fields, depth: int) -> list[bool]:
    """Reads whether each layer has rotary positions."""
    period, rotates = fields.take("no_rope_layer_interval", 4), fields.take("no_rope_layers", None, list)
    rotates = rotates or [(i + 1) % period != 0 for i in range(depth)]
    if len(rotates) < depth:
        raise fields.error("no_rope_layers", f"{len(rotates)} entries for {depth} layers")
    return [bool(rotated) for rotated in rotates]


def _read_rotated(fields: Fields, attention: AttentionConfig, norm: NormConfig) -> AttentionConfig:
    rope = dataclasses.replace(read_rope(fields, base=500_000.0), interleaved=True)
    if rope.scaling is not None and rope.scaling.kind == "yarn":  # its factor on queries and keys precedes their norm
        raise fields.unsupported("rope_type", "yarn", ["default", "linear", "llama3"])
    qk_norm = dataclasses.replace(norm, scale=False) if fields.take("use_qk_norm", True) else None
    return dataclasses.replace(attention, rope=rope, qk_norm=qk_norm)


def _read_growth(fields: Fields, attention: AttentionConfig) -> AttentionConfig:
    growth, period = fields.take("attn_scale", 0.1), fields.take("floor_scale", 8192)
    tuned = fields.choose("attn_temperature_tuning", {True: True, False: False, 4: True}, True)  # 4 in older files
    return dataclasses.replace(attention, growth=float(growth) if tuned else 0.0, growth_period=int(period))


def _read_chunk(fields: Fields) -> str:
    size = fields.take("attention_chunk_size", 8192, int)
    return "causal" if size is None else f"causal & chunk({size})"


def _read_routed(fields: Fields, depth: int) -> list[int]:
    """Reads the layers with experts."""
    period, layers = fields.take("interleave_moe_layer_step", 1), fields.take("moe_layers", None, list)
    return list(range(period - 1, depth, period)) if layers is None else layers


def _experts_tensors(source: str, target: str, inner: int) -> list[TensorMap]:
    """All experts in one tensor with input rows, gate and up side by side."""
    return [
        *linear(f"{source}.router", f"{target}.router"),
        split_last(f"{source}.experts.gate_up_proj", [f"{target}.gate", f"{target}.up"], [inner] * 2),
        identity(f"{source}.experts.down_proj", f"{target}.down"),
        *tensors.gated_mlp(f"{source}.shared_expert", f"{target}.shared"),
    ]
