"""Llama and the decoders that differ from it in few keys: norms before attention and before a gated MLP or experts.

Llama (arXiv:2407.21783), Mistral (arXiv:2310.06825), Mixtral (arXiv:2401.04088), Qwen2 (arXiv:2407.10671) and Qwen3
(arXiv:2505.09388).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
    read_window,
)
from sparsejax.layers import ExpertsConfig, MlpConfig, NormConfig

ROTARY_BUFFERS = r".*\.rotary_emb\.inv_freq"  # in older files


def translate_llama(fields: Fields) -> Translation:
    """Translates a `LlamaConfig`."""
    fields.ignore("pretraining_tp", "max_sequence_length")
    bias = fields.take("attention_bias", False)
    return _translate(fields, mlp_bias=fields.take("mlp_bias", False), kv_heads=None, bias=bias, out_bias=bias)


def translate_mistral(fields: Fields) -> Translation:
    """Translates a `MistralConfig`, whose windows include the query's position."""
    return _translate(fields, [read_window(fields, 4096)])


def translate_mixtral(fields: Fields) -> Translation:
    """Translates a `MixtralConfig`."""
    return _translate(fields, [read_window(fields)], base=1e6, eps=1e-5, routed=True)


def translate_qwen2(fields: Fields) -> Translation:
    """Translates a `Qwen2Config`."""
    fields.require("use_mrope", False)
    return _translate(fields, _read_patterns(fields), kv_heads=32, bias=True)


def translate_qwen3(fields: Fields) -> Translation:
    """Translates a `Qwen3Config`, whose queries and keys are normalized."""
    bias = fields.take("attention_bias", False)
    patterns = _read_patterns(fields)
    return _translate(fields, patterns, normed=True, kv_heads=32, head_width=128, bias=bias, out_bias=bias)


def _read_patterns(fields: Fields) -> list[str]:
    """Reads the pattern of each layer of Qwen: those from `max_window_layers` on have windows, if any layer has."""
    depth, first = fields.take("num_hidden_layers"), fields.take("max_window_layers", 28)
    window = read_window(fields, 4096)
    window = window if fields.take("use_sliding_window", False) else "causal"
    windowed = [i >= first and window != "causal" for i in range(depth)]
    types = read_layer_types(fields, ["sliding_attention" if local else "full_attention" for local in windowed])
    if window == "causal" and "sliding_attention" in types:
        raise fields.error("layer_types", '"sliding_attention" requires use_sliding_window and sliding_window')
    return [window if layer_type == "sliding_attention" else "causal" for layer_type in types]


def _translate(
    fields: Fields,
    patterns: Sequence[str] = ("causal",),
    *,
    base: float = 10_000.0,
    eps: float = 1e-6,
    mlp_bias: bool = False,
    routed: bool = False,
    normed: bool = False,
    **attention: Any,
) -> Translation:
    """Translates a config.json.

    Args:
      fields: The config.json.
      patterns: Pattern of each layer, or a single one.
      base: Default of `rope_theta`.
      eps: Default of `rms_norm_eps`.
      mlp_bias: Whether the MLPs have biases.
      routed: Whether there are experts instead of the MLPs.
      normed: Whether queries and keys are normalized.
      **attention: Arguments of `read_attention`.
    """
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", eps))
    mixer = read_attention(fields, width, read_rope(fields, base), qk_norm=norm if normed else None, **attention)
    inner, activation = fields.take("intermediate_size"), fields.choose("hidden_act", ACTIVATIONS, "silu")
    mlp: MlpConfig | ExpertsConfig
    mlp = MlpConfig(kind="gated", width=inner, activation=activation, bias=mlp_bias)
    if routed:
        mlp = ExpertsConfig(
            experts=fields.take("num_local_experts", 8),
            top_k=fields.take("num_experts_per_tok", 2),
            width=inner,
            activation=activation,
            renormalize=True,
        )
    layers = [
        (
            "full" if pattern == "causal" else "local",
            pre_norm_layer(dataclasses.replace(mixer, pattern=pattern), mlp, norm),
        )
        for pattern in (patterns if len(patterns) == depth else [*patterns] * depth)
    ]
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i in range(depth):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target),
            *tensors.attention(f"{source}.self_attn", f"{target}.mixer", mixer.bias, mixer.out_bias),
        ]
        if normed:
            maps += tensors.qk_norms(f"{source}.self_attn", f"{target}.mixer")
        if isinstance(mlp, ExpertsConfig):
            maps += tensors.mixtral_experts(f"{source}.block_sparse_moe", f"{target}.mlp", mlp.experts)
        else:
            maps += tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp", mlp_bias)
    return Translation(model, maps, unused=(*tensors.tied_head(tied), ROTARY_BUFFERS))
