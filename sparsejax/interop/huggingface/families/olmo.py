"""OLMo 3 (arXiv:2512.13961) and OLMo Hybrid: norms of the outputs of attention and MLPs, and of all heads together.

OLMo 3 alternates windows and full attention. In OLMo Hybrid most layers are gated delta rules, with norms before them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope, read_rope_parameters, read_ropes
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linears, norm, split_conv
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    SILU,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
    read_window,
)
from sparsejax.layers import AttentionConfig, DeltaConfig, LayerConfig, MlpConfig, NormConfig, RopeConfig

BASES = dict.fromkeys(("sliding_attention", "full_attention"), ("rope_theta", 500_000.0))
DELTA_NORM_EPS = 1e-5  # for any `rms_norm_eps`
SAVED_NORMS = (
    (r"\.post_attention_layernorm\.", ".feedforward_layer_norm."),
)  # as transformers 5.23 renames when saving


def translate(fields: Fields) -> Translation:
    """Translates an `Olmo3Config`."""
    depth = fields.take("num_hidden_layers")
    types = read_layer_types(fields, ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(depth)])
    window, ropes = read_window(fields, 4096), read_ropes(fields, BASES, scaled=("full_attention",))
    patterns = {"sliding_attention": window, "full_attention": "causal"}
    layer_norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-5))
    attention, mlp = _read_attention(fields, layer_norm, None), _read_mlp(fields, ACTIVATIONS)
    layers = {
        layer_type: _output_norm_layer(
            dataclasses.replace(attention, pattern=pattern, rope=ropes[layer_type]), mlp, layer_norm
        )
        for layer_type, pattern in patterns.items()
    }
    return _build(fields, types, layers, layer_norm)


def translate_hybrid(fields: Fields) -> Translation:
    """Translates an `OlmoHybridConfig`, which has no rotary positions unless it has a base."""
    fields.ignore("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
    depth = fields.take("num_hidden_layers")
    default = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(depth)]
    default = default if "full_attention" in default else [*default[:-1], "full_attention"]
    types = read_layer_types(fields, default, allowed=("full_attention", "linear_attention"))
    layer_norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6))
    base = read_rope_parameters(fields).get("rope_theta") or fields.take("rope_theta", None, float)
    attention = _read_attention(fields, layer_norm, None if base is None else read_rope(fields))
    mlp = _read_mlp(fields, SILU)
    layers = {
        "full_attention": _output_norm_layer(attention, mlp, layer_norm),
        "linear_attention": pre_norm_layer(_read_delta(fields, attention.heads), mlp, layer_norm),
    }
    return _build(fields, types, layers, layer_norm)


def _read_attention(fields: Fields, layer_norm: NormConfig, rope: RopeConfig | None) -> AttentionConfig:
    width, bias = fields.take("hidden_size"), fields.take("attention_bias", False)
    options: dict[str, Any] = {"qk_norm": layer_norm, "qk_norm_joint": True, "bias": bias, "out_bias": bias}
    return read_attention(fields, width, rope, kv_heads=None, **options)


def _read_mlp(fields: Fields, activations: dict[str, str]) -> MlpConfig:
    activation = fields.choose("hidden_act", activations, "silu")
    return MlpConfig(kind="gated", width=fields.take("intermediate_size", 11008), activation=activation)


def _read_delta(fields: Fields, heads: int) -> DeltaConfig:
    key_heads = fields.take("linear_num_key_heads", None, int) or heads
    key_width = fields.take("linear_key_head_dim", None, int) or int(0.75 * fields.take("hidden_size") / key_heads)
    return DeltaConfig(
        heads=fields.take("linear_num_value_heads", None, int) or heads,
        key_heads=key_heads,
        key_width=key_width,
        value_width=fields.take("linear_value_head_dim", None, int) or 2 * key_width,
        conv=fields.take("linear_conv_kernel_dim", 4),
        norm_eps=DELTA_NORM_EPS,
        negative=fields.take("linear_allow_neg_eigval", True),
    )


def _output_norm_layer(mixer: AttentionConfig, mlp: MlpConfig, layer_norm: NormConfig) -> LayerConfig:
    return LayerConfig(mixer=mixer, mlp=mlp, norm=layer_norm, norm_position="output", remat="none")


def _build(fields: Fields, types: list[str], layers: dict[str, LayerConfig], layer_norm: NormConfig) -> Translation:
    width, tied = fields.take("hidden_size"), fields.take("tie_word_embeddings", False)
    named = [(LAYER_NAMES[layer_type], layers[layer_type]) for layer_type in types]
    model = build_model(fields, width, named, layer_norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i, layer_type in enumerate(types):
        source, target, mixer = f"model.layers.{i}", f"layers.{i}", layers[layer_type].mixer
        maps += tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp")
        if isinstance(mixer, AttentionConfig):
            maps += [
                *tensors.attention(f"{source}.self_attn", f"{target}.mixer", mixer.bias, mixer.out_bias),
                *tensors.qk_norms(f"{source}.self_attn", f"{target}.mixer"),
                *norm(f"{source}.post_attention_layernorm", f"{target}.mixer_residual.within"),
                *norm(f"{source}.post_feedforward_layernorm", f"{target}.mlp_residual.within"),
            ]
        else:
            assert isinstance(mixer, DeltaConfig)
            maps += [
                *_delta_tensors(f"{source}.linear_attn", f"{target}.mixer", mixer),
                *norm(f"{source}.attention_layer_norm", f"{target}.mixer_residual.before"),
                *norm(f"{source}.feedforward_layer_norm", f"{target}.mlp_residual.before"),
            ]
    return Translation(model, maps, unused=tensors.tied_head(tied), older_names=SAVED_NORMS)


def _delta_tensors(source: str, target: str, config: DeltaConfig) -> list[TensorMap]:
    names = {"q": "query", "k": "key", "v": "value", "a": "decay", "b": "beta", "g": "gate", "o": "out"}
    keys, values = config.key_heads * config.key_width, config.heads * config.value_width
    convs = [
        split_conv(f"{source}.{short}_conv1d", [f"{target}.conv_{names[short]}"], [channels], bias=False)
        for short, channels in {"q": keys, "k": keys, "v": values}.items()
    ]
    return [
        *linears(source, target, {f"{short}_proj": name for short, name in names.items()}),
        *(part for conv in convs for part in conv),
        identity(f"{source}.A_log", f"{target}.log_decay"),
        identity(f"{source}.dt_bias", f"{target}.dt_bias"),
        *norm(f"{source}.o_norm", f"{target}.norm"),
    ]
