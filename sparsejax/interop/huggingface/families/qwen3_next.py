"""Qwen3-Next: gated delta rule, gated attention in every fourth layer, experts beside one that serves every token."""

from __future__ import annotations

from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, split_conv, split_groups, transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    Translation,
    build_model,
    pieces_of_ends,
    pieces_of_experts,
    pieces_of_gated_mlp,
    pieces_of_norms,
    read_layer_types,
    read_rope,
    tied_head,
)
from sparsejax.layers import AttentionConfig, DeltaConfig, ExpertsConfig, LayerConfig, MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """From the keys of a `Qwen3NextConfig`."""
    width, depth = fields.take("hidden_size", 2048), fields.take("num_hidden_layers", 48)
    every = fields.take("full_attention_interval", None) or 4
    kinds = read_layer_types(
        fields,
        ["linear_attention" if (i + 1) % every else "full_attention" for i in range(depth)],
        allowed=("full_attention", "linear_attention"),
    )
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-6), offset=True)
    mixers = {"full_attention": _read_attention(fields, norm), "linear_attention": _read_delta(fields, norm.eps)}
    activation = fields.choose("hidden_act", {"silu": ACTIVATIONS["silu"]}, "silu")  # the mixers' too
    mlp = MlpConfig("gated", fields.take("intermediate_size", 5632), activation)
    experts = _read_experts(fields, activation)
    routed = _read_routed(fields, depth)
    layers = [
        (
            f"{LAYER_NAMES[kind]}_experts" if route else LAYER_NAMES[kind],
            LayerConfig(mixers[kind], experts if route else mlp, norm, "pre", remat=False),
        )
        for kind, route in zip(kinds, routed, strict=True)
    ]
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    pieces = pieces_of_ends(tied)
    for i, (kind, route) in enumerate(zip(kinds, routed, strict=True)):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        pieces += pieces_of_norms(theirs, ours)
        if kind == "full_attention":
            pieces += _pieces_of_attention(f"{theirs}.self_attn", f"{ours}.mixer", mixers[kind])
        else:
            pieces += _pieces_of_delta(f"{theirs}.linear_attn", f"{ours}.mixer", mixers[kind])
        if route:
            pieces += _pieces_of_experts(f"{theirs}.mlp", f"{ours}.mlp", experts)
        else:
            pieces += pieces_of_gated_mlp(f"{theirs}.mlp", f"{ours}.mlp")
    return Translation(model, pieces, unused=(*tied_head(tied), r"mtp\..*"))


def _read_attention(fields: Fields, norm: NormConfig) -> AttentionConfig:
    heads, bias = fields.take("num_attention_heads", 16), fields.take("attention_bias", False)
    return AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 2) or heads,
        head_width=fields.take("head_dim", 256),
        rope=read_rope(fields, fraction=0.25),
        qk_norm=norm,
        impl="auto",
        gate=True,
        bias=bias,
        out_bias=bias,
    )


def _read_delta(fields: Fields, eps: float) -> DeltaConfig:
    return DeltaConfig(
        heads=fields.take("linear_num_value_heads", 32),
        key_heads=fields.take("linear_num_key_heads", 16),
        key_width=fields.take("linear_key_head_dim", 128),
        value_width=fields.take("linear_value_head_dim", 128),
        conv=fields.take("linear_conv_kernel_dim", 4),
        norm_eps=eps,
    )


def _read_experts(fields: Fields, activation: str) -> ExpertsConfig:
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
    """Whether each layer has experts."""
    plain, step = fields.take("mlp_only_layers", None) or [], fields.take("decoder_sparse_step", 1)
    return [i not in plain and (i + 1) % step == 0 for i in range(depth)]


def _pieces_of_attention(theirs: str, ours: str, config: AttentionConfig) -> list[Piece]:
    """Every head has its query and its gate in a row."""
    both, sizes = [f"{ours}.query", f"{ours}.gate"], [config.head_width] * 2
    pieces = [split_groups(f"{theirs}.q_proj.weight", [f"{n}.weight" for n in both], config.heads, sizes)]
    if config.bias:
        pieces.append(split_groups(f"{theirs}.q_proj.bias", [f"{n}.bias" for n in both], config.heads, sizes))
    return [
        *pieces,
        *linear(f"{theirs}.k_proj", f"{ours}.key", config.bias),
        *linear(f"{theirs}.v_proj", f"{ours}.value", config.bias),
        *linear(f"{theirs}.o_proj", f"{ours}.out", config.out_bias),
        same(f"{theirs}.q_norm.weight", f"{ours}.query_norm.scale"),
        same(f"{theirs}.k_norm.weight", f"{ours}.key_norm.scale"),
    ]


def _pieces_of_delta(theirs: str, ours: str, config: DeltaConfig) -> list[Piece]:
    """Every key head has its query, its key, and values and gates of the heads that share it, in a row."""
    share = config.heads // config.key_heads
    wide, values = [f"{ours}.{n}.weight" for n in ("query", "key", "value", "gate")], share * config.value_width
    thin = [f"{ours}.{n}.weight" for n in ("beta", "decay")]
    keys = config.key_heads * config.key_width
    return [
        split_groups(f"{theirs}.in_proj_qkvz.weight", wide, config.key_heads, [config.key_width] * 2 + [values] * 2),
        split_groups(f"{theirs}.in_proj_ba.weight", thin, config.key_heads, [share] * 2),
        *split_conv(
            f"{theirs}.conv1d",
            [f"{ours}.conv_{n}" for n in ("query", "key", "value")],
            [keys, keys, config.heads * config.value_width],
            bias=False,
        ),
        same(f"{theirs}.A_log", f"{ours}.log_decay"),
        same(f"{theirs}.dt_bias", f"{ours}.dt_bias"),
        same(f"{theirs}.norm.weight", f"{ours}.norm.scale"),
        *linear(f"{theirs}.out_proj", f"{ours}.out"),
    ]


def _pieces_of_experts(theirs: str, ours: str, config: ExpertsConfig) -> list[Piece]:
    return [
        transposed(f"{theirs}.gate.weight", f"{ours}.router.weight"),
        *pieces_of_experts(f"{theirs}.experts", ours, config.experts),
        *pieces_of_gated_mlp(f"{theirs}.shared_expert", f"{ours}.shared"),
        *linear(f"{theirs}.shared_expert_gate", f"{ours}.shared_gate"),
    ]
