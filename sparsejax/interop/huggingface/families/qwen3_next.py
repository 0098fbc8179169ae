"""Qwen3-Next: gated delta rule, gated attention in every fourth layer, and experts with a shared expert."""

from __future__ import annotations

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linear, linears, norm, split_conv, split_groups
from sparsejax.interop.huggingface.translation import (
    LAYER_NAMES,
    SILU,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
)
from sparsejax.layers import AttentionConfig, DeltaConfig, ExpertsConfig, MlpConfig, NormConfig

QKV = ("query", "key", "value")  # in the order in which checkpoints store them together


def translate(fields: Fields) -> Translation:
    """Translates a `Qwen3NextConfig`."""
    width, depth = fields.take("hidden_size", 2048), fields.take("num_hidden_layers", 48)
    period = fields.take("full_attention_interval", None, int) or 4
    types = read_layer_types(
        fields,
        ["linear_attention" if (i + 1) % period else "full_attention" for i in range(depth)],
        allowed=("full_attention", "linear_attention"),
    )
    layer_norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6), offset=True)
    attention, delta = read_gated_attention(fields, width, layer_norm), read_delta(fields, layer_norm.eps)
    activation = fields.choose("hidden_act", SILU, "silu")
    mlp = MlpConfig(kind="gated", width=fields.take("intermediate_size", 5632), activation=activation)
    experts = read_experts(fields, activation)
    is_full = [layer_type == "full_attention" for layer_type in types]
    is_routed = _read_routed(fields, depth)
    layers = []
    for layer_type, full, routed in zip(types, is_full, is_routed, strict=True):
        name = LAYER_NAMES[layer_type] + ("_experts" if routed else "")
        layers.append((name, pre_norm_layer(attention if full else delta, experts if routed else mlp, layer_norm)))
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, layer_norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i, (full, routed) in enumerate(zip(is_full, is_routed, strict=True)):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += tensors.pre_norms(source, target)
        if full:
            maps += gated_attention_tensors(f"{source}.self_attn", f"{target}.mixer", attention)
        else:
            maps += _delta_tensors(f"{source}.linear_attn", f"{target}.mixer", delta)
        if routed:
            maps += shared_experts_tensors(f"{source}.mlp", f"{target}.mlp", experts)
        else:
            maps += tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp")
    return Translation(model, maps, unused=(*tensors.tied_head(tied), r"mtp\..*"))


def read_gated_attention(fields: Fields, width: int, qk_norm: NormConfig) -> AttentionConfig:
    """Reads attention with a gate and partial rotary positions."""
    bias = fields.take("attention_bias", False)
    return read_attention(
        fields,
        width,
        read_rope(fields, fraction=0.25),
        heads=16,
        kv_heads=2,
        head_width=256,
        qk_norm=qk_norm,
        gate=True,
        bias=bias,
        out_bias=bias,
    )


def read_delta(fields: Fields, eps: float) -> DeltaConfig:
    """Reads the gated delta rule."""
    return DeltaConfig(
        heads=fields.take("linear_num_value_heads", 32),
        key_heads=fields.take("linear_num_key_heads", 16),
        key_width=fields.take("linear_key_head_dim", 128),
        value_width=fields.take("linear_value_head_dim", 128),
        conv=fields.take("linear_conv_kernel_dim", 4),
        norm_eps=eps,
    )


def read_experts(fields: Fields, activation: str) -> ExpertsConfig:
    """Reads experts with a gated shared expert."""
    return ExpertsConfig(
        experts=fields.take("num_experts", 512),
        top_k=fields.take("num_experts_per_tok", 10),
        width=fields.take("moe_intermediate_size", 512),
        activation=activation,
        renormalize=fields.take("norm_topk_prob", True),
        shared_width=fields.take("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


def _read_routed(fields: Fields, depth: int) -> list[bool]:
    """Reads whether each layer has experts."""
    dense, step = fields.take("mlp_only_layers", None) or [], fields.take("decoder_sparse_step", 1)
    return [i not in dense and (i + 1) % step == 0 for i in range(depth)]


def gated_attention_tensors(source: str, target: str, config: AttentionConfig) -> list[TensorMap]:
    """Attention whose queries and gates are stored together, by head."""
    names, sizes = [f"{target}.query", f"{target}.gate"], [config.head_width] * 2
    maps = [
        split_groups(f"{source}.q_proj.{part}", [f"{name}.{part}" for name in names], config.heads, sizes)
        for part in (("weight", "bias") if config.bias else ("weight",))
    ]
    return [
        *maps,
        *linears(source, target, {"k_proj": "key", "v_proj": "value"}, config.bias),
        *linear(f"{source}.o_proj", f"{target}.out", config.out_bias),
        *norm(f"{source}.q_norm", f"{target}.query_norm"),
        *norm(f"{source}.k_norm", f"{target}.key_norm"),
    ]


def _delta_tensors(source: str, target: str, config: DeltaConfig) -> list[TensorMap]:
    """Delta rule whose query, key, values and gates are stored together, by key head."""
    share = config.heads // config.key_heads  # value heads per key head
    projections = [f"{target}.{name}.weight" for name in ("query", "key", "value", "gate")]
    sizes = [config.key_width] * 2 + [share * config.value_width] * 2
    rates = [f"{target}.{name}.weight" for name in ("beta", "decay")]
    return [
        split_groups(f"{source}.in_proj_qkvz.weight", projections, config.key_heads, sizes),
        split_groups(f"{source}.in_proj_ba.weight", rates, config.key_heads, [share] * 2),
        *delta_tensors(source, target, config),
    ]


def delta_tensors(source: str, target: str, config: DeltaConfig) -> list[TensorMap]:
    """What the delta rule has besides its projections: convolutions stored together, decays, norm and output."""
    keys = config.key_heads * config.key_width
    sizes = [keys, keys, config.heads * config.value_width]
    return [
        *split_conv(f"{source}.conv1d", [f"{target}.conv_{name}" for name in QKV], sizes, bias=False),
        identity(f"{source}.A_log", f"{target}.log_decay"),
        identity(f"{source}.dt_bias", f"{target}.dt_bias"),
        *norm(f"{source}.norm", f"{target}.norm"),
        *linear(f"{source}.out_proj", f"{target}.out"),
    ]


def shared_experts_tensors(source: str, target: str, config: ExpertsConfig) -> list[TensorMap]:
    """Experts with a gated shared expert."""
    return [
        *linears(source, target, {"gate": "router", "shared_expert_gate": "shared_gate"}),
        *tensors.experts(f"{source}.experts", target, config.experts),
        *tensors.gated_mlp(f"{source}.shared_expert", f"{target}.shared"),
    ]
