"""Kimi Linear (arXiv:2510.26692): delta rule with a decay for each channel, latent attention without positions."""

from __future__ import annotations

from sparsejax.interop.huggingface.families.deepseek import (
    LATENT_NORM_EPS,
    pieces_of_latent,
    pieces_of_routed_experts,
    read_mlp_types,
    require_heads,
)
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, reshaped, same, split_conv
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    Translation,
    build_model,
    pieces_of_ends,
    pieces_of_gated_mlp,
    pieces_of_norms,
    read_layer_types,
)
from sparsejax.layers import DeltaConfig, ExpertsConfig, LatentConfig, LayerConfig, MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """From the keys of a `KimiLinearConfig`; newer files name some of them otherwise."""
    # Nothing turns, so it does not matter how; layers that predict more than one token ahead are left out.
    fields.ignore("head_dim", "qk_head_dim", "rope_theta", "rope_parameters", "model_max_length", "pretraining_tp")
    fields.ignore("num_nextn_predict_layers", "use_grouped_topk")
    fields.require("mla_use_nope", True)
    width, depth = fields.take("hidden_size", 2304), fields.take("num_hidden_layers", 27)
    older = fields.take("linear_attn_config", None) or {}
    kinds = read_layer_types(fields, _default_kinds(older, depth), allowed=("full_attention", "linear_attention"))
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-5))
    activation = fields.choose("hidden_act", {"silu": ACTIVATIONS["silu"]}, "silu")  # the mixers' too
    mixers = {"full_attention": _read_attention(fields), "linear_attention": _read_delta(fields, older, norm.eps)}
    mlp = MlpConfig("gated", fields.take("intermediate_size", 9216), activation)
    experts = _read_experts(fields, activation)
    parts = read_mlp_types(fields, depth, dense=1)
    layers = [
        (
            LAYER_NAMES[kind] if part == "dense" else f"{LAYER_NAMES[kind]}_experts",
            LayerConfig(mixers[kind], mlp if part == "dense" else experts, norm, "pre", remat=False),
        )
        for kind, part in zip(kinds, parts, strict=True)
    ]
    fields.ignore("tie_word_embeddings")  # the reference ties nothing, whatever it says
    model = build_model(fields, width, layers, norm, tied=False)
    pieces = pieces_of_ends(tied=False)
    for i, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        feed = f"{theirs}.block_sparse_moe"
        pieces += pieces_of_norms(theirs, ours)
        if kind == "full_attention":
            pieces += pieces_of_latent(f"{theirs}.self_attn", f"{ours}.mixer", mixers[kind])
        else:
            pieces += _pieces_of_delta(f"{theirs}.self_attn", f"{ours}.mixer", mixers[kind])
        if part == "dense":
            pieces += pieces_of_gated_mlp(feed, f"{ours}.mlp")
        else:
            pieces += pieces_of_routed_experts(feed, f"{ours}.mlp", experts, names=("w1", "w3", "w2"))
    return Translation(model, pieces)


def _default_kinds(older: dict, depth: int) -> list[str]:
    full = older.get("full_attn_layers")
    if full is not None:  # counted from 1
        return ["full_attention" if i + 1 in full else "linear_attention" for i in range(depth)]
    return ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(depth)]


def _read_attention(fields: Fields) -> LatentConfig:
    heads = fields.take("num_attention_heads", 32)
    require_heads(fields, heads)
    return LatentConfig(
        pattern="causal",
        heads=heads,
        query_rank=fields.take("q_lora_rank", None),
        kv_rank=fields.take("kv_lora_rank", 512),
        nope_width=fields.take("qk_nope_head_dim", 128),
        rope_width=fields.take("qk_rope_head_dim", 64),
        value_width=fields.take("v_head_dim", 128),
        rope=None,
        norm_eps=LATENT_NORM_EPS,
        impl="auto",
        bias=fields.take("attention_bias", False),
    )


def _read_delta(fields: Fields, older: dict, eps: float) -> DeltaConfig:
    heads = older.get("num_heads", fields.take("linear_num_heads", 32))
    head_width = older.get("head_dim", fields.take("linear_head_dim", 128))
    conv = older.get("short_conv_kernel_size", fields.take("linear_conv_kernel_dim", 4))
    return DeltaConfig(
        heads, heads, head_width, head_width, conv, eps, channel_decay=True, rank=head_width, gate="sigmoid"
    )


def _read_experts(fields: Fields, activation: str) -> ExpertsConfig:
    fields.require("moe_router_activation_func", "sigmoid")
    fields.require("moe_layer_freq", 1)
    inner = fields.take("moe_intermediate_size", 1024)

    def take(name: str, other: str, default: int):
        value = fields.take(name, None)
        return fields.take(other, default) if value is None else value

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


def _pieces_of_delta(theirs: str, ours: str, config: DeltaConfig) -> list[Piece]:
    """Decay and gate are each made by two maps; the decay's logarithm is stored with axes to broadcast over."""
    inner, heads = config.heads * config.key_width, config.heads
    maps = {"f_a": "decay_low", "f_b": "decay", "g_a": "gate_low", "g_b": "gate", "b": "beta"}
    maps |= {"q": "query", "k": "key", "v": "value", "o": "out"}
    return [
        *(piece for a, b in maps.items() for piece in linear(f"{theirs}.{a}_proj", f"{ours}.{b}")),
        *(
            piece
            for a in ("q", "k", "v")
            for piece in split_conv(f"{theirs}.{a}_conv1d", [f"{ours}.conv_{maps[a]}"], [inner], bias=False)
        ),
        reshaped(f"{theirs}.A_log", f"{ours}.log_decay", (1, 1, heads, 1), (heads,)),
        same(f"{theirs}.dt_bias", f"{ours}.dt_bias"),
        same(f"{theirs}.o_norm.weight", f"{ours}.norm.scale"),
    ]
