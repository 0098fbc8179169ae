"""Kimi Linear (arXiv:2510.26692): delta rule with a decay per channel, and latent attention without positions."""

from __future__ import annotations

from typing import Any

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.families.deepseek import (
    LATENT_NORM_EPS,
    latent_tensors,
    read_mlp_types,
    require_kv_heads,
    routed_experts_tensors,
)
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linears, norm, reshaped, split_conv
from sparsejax.interop.huggingface.translation import (
    LAYER_NAMES,
    SILU,
    Translation,
    build_model,
    pre_norm_layer,
    read_layer_types,
)
from sparsejax.layers import DeltaConfig, ExpertsConfig, LatentConfig, MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """Translates a `KimiLinearConfig`; newer files rename some of its keys."""
    # Rotary keys have no effect, and multi-token prediction is not part of a forward pass.
    fields.ignore("head_dim", "qk_head_dim", "rope_theta", "rope_parameters", "model_max_length", "pretraining_tp")
    fields.ignore("num_nextn_predict_layers", "use_grouped_topk")
    fields.require("mla_use_nope", True)
    width, depth = fields.take("hidden_size", 2304), fields.take("num_hidden_layers", 27)
    legacy = Fields(fields.take("linear_attn_config", None, dict) or {}, f"{fields.path}: linear_attn_config")
    types = read_layer_types(fields, _default_types(legacy, depth), allowed=("full_attention", "linear_attention"))
    layer_norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-5))
    activation = fields.choose("hidden_act", SILU, "silu")
    attention, delta = _read_attention(fields), _read_delta(fields, legacy, layer_norm.eps)
    mlp = MlpConfig(kind="gated", width=fields.take("intermediate_size", 9216), activation=activation)
    experts = _read_experts(fields, activation)
    is_full = [layer_type == "full_attention" for layer_type in types]
    is_routed = [name == "experts" for name in read_mlp_types(fields, depth, dense=1)]
    layers = []
    for layer_type, full, routed in zip(types, is_full, is_routed, strict=True):
        name = LAYER_NAMES[layer_type] + ("_experts" if routed else "")
        layers.append((name, pre_norm_layer(attention if full else delta, experts if routed else mlp, layer_norm)))
    fields.ignore("tie_word_embeddings")  # the reference never ties the head
    model = build_model(fields, width, layers, layer_norm, tied=False)
    maps = tensors.embedding_and_head(tied=False)
    for i, (full, routed) in enumerate(zip(is_full, is_routed, strict=True)):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += tensors.pre_norms(source, target)
        if full:
            maps += latent_tensors(f"{source}.self_attn", f"{target}.mixer", attention)
        else:
            maps += _delta_tensors(f"{source}.self_attn", f"{target}.mixer", delta)
        feed_forward = f"{source}.block_sparse_moe"
        if routed:
            maps += routed_experts_tensors(feed_forward, f"{target}.mlp", experts, names=("w1", "w3", "w2"))
        else:
            maps += tensors.gated_mlp(feed_forward, f"{target}.mlp")
    return Translation(model, maps)


def _default_types(legacy: Fields, depth: int) -> list[str]:
    full = legacy.take("full_attn_layers", None, list)
    if full is not None:  # counted from 1
        return ["full_attention" if i + 1 in full else "linear_attention" for i in range(depth)]
    return ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(depth)]


def _read_attention(fields: Fields) -> LatentConfig:
    heads = fields.take("num_attention_heads", 32)
    require_kv_heads(fields, heads)
    return LatentConfig(
        pattern="causal",
        heads=heads,
        query_rank=fields.take("q_lora_rank", None, int),
        kv_rank=fields.take("kv_lora_rank", 512),
        nope_width=fields.take("qk_nope_head_dim", 128),
        rope_width=fields.take("qk_rope_head_dim", 64),
        value_width=fields.take("v_head_dim", 128),
        rope=None,
        norm_eps=LATENT_NORM_EPS,
        impl="auto",
        bias=fields.take("attention_bias", False),
    )


def _read_delta(fields: Fields, legacy: Fields, eps: float) -> DeltaConfig:
    heads = legacy.take("num_heads", fields.take("linear_num_heads", 32))
    head_width = legacy.take("head_dim", fields.take("linear_head_dim", 128))
    return DeltaConfig(
        heads=heads,
        key_heads=heads,
        key_width=head_width,
        value_width=head_width,
        conv=legacy.take("short_conv_kernel_size", fields.take("linear_conv_kernel_dim", 4)),
        norm_eps=eps,
        channel_decay=True,
        rank=head_width,
        gate="sigmoid",
    )


def _read_experts(fields: Fields, activation: str) -> ExpertsConfig:
    fields.require("moe_router_activation_func", "sigmoid")
    fields.require("moe_layer_freq", 1)
    inner = fields.take("moe_intermediate_size", 1024)

    def take(key: str, newer: str, default: Any) -> Any:
        value = fields.take(key, None, type(default))
        return fields.take(newer, default) if value is None else value

    return ExpertsConfig(
        experts=take("num_experts", "num_local_experts", 256),
        top_k=take("num_experts_per_token", "num_experts_per_tok", 8),
        width=inner,
        activation=activation,
        router="sigmoid",
        renormalize=take("moe_renormalize", "norm_topk_prob", True),
        scale=float(fields.take("routed_scaling_factor", 2.446)),
        selection_bias=True,
        groups=take("num_expert_group", "n_group", 1),
        top_groups=fields.take("topk_group", 1),
        shared_width=inner * take("num_shared_experts", "n_shared_experts", 1),
    )


def _delta_tensors(source: str, target: str, config: DeltaConfig) -> list[TensorMap]:
    """Delta rule; decay and gate are low-rank, and the logarithm of the decay is stored with broadcast axes."""
    names = {"q": "query", "k": "key", "v": "value", "o": "out", "b": "beta"}
    names |= {"f_a": "decay_low", "f_b": "decay", "g_a": "gate_low", "g_b": "gate"}
    inner, heads = config.heads * config.key_width, config.heads
    convs = [
        part
        for short in ("q", "k", "v")
        for part in split_conv(f"{source}.{short}_conv1d", [f"{target}.conv_{names[short]}"], [inner], bias=False)
    ]
    return [
        *linears(source, target, {f"{short}_proj": name for short, name in names.items()}),
        *convs,
        reshaped(f"{source}.A_log", f"{target}.log_decay", (1, 1, heads, 1), (heads,)),
        identity(f"{source}.dt_bias", f"{target}.dt_bias"),
        *norm(f"{source}.o_norm", f"{target}.norm"),
    ]
