"""Jamba (arXiv:2403.19887): Mamba layers, a few of dense attention without positions, experts in every other layer."""

from __future__ import annotations

import math

from sparsejax.interop.huggingface.families.mamba import pieces_of_mamba
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pieces_of_attention,
    pieces_of_ends,
    pieces_of_experts,
    pieces_of_gated_mlp,
    pieces_of_norms,
    tied_head,
)
from sparsejax.layers import AttentionConfig, ExpertsConfig, LayerConfig, MambaConfig, MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """From the keys of a `JambaConfig`."""
    fields.ignore("use_mambapy", "use_associative_scan", "calc_logits_for_entire_prompt")
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-6))
    mixers = {"full": _read_attention(fields, width), "ssm": _read_mamba(fields, width, norm.eps)}
    inner = fields.take("intermediate_size")
    activation = fields.choose("hidden_act", {"silu": ACTIVATIONS["silu"]}, "silu")  # the mixers' too
    mlp = MlpConfig("gated", inner, activation)
    experts = ExpertsConfig(fields.take("num_experts", 16), fields.take("num_experts_per_tok", 2), inner, activation)
    attends = _read_period(fields, "attn_layer", depth, 8, 4)
    routes = [route and experts.experts > 1 for route in _read_period(fields, "expert_layer", depth, 2, 1)]
    layers = []
    for attend, route in zip(attends, routes, strict=True):
        name = "full" if attend else "ssm"
        layer = LayerConfig(mixers[name], experts if route else mlp, norm, "pre", remat=False)
        layers.append((f"{name}_experts" if route else name, layer))
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    pieces = pieces_of_ends(tied, norm="model.final_layernorm")
    for i, (attend, route) in enumerate(zip(attends, routes, strict=True)):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        feed = f"{theirs}.feed_forward"
        pieces += [
            *pieces_of_norms(theirs, ours, second="pre_ff_layernorm"),
        ]
        if attend:
            pieces += pieces_of_attention(f"{theirs}.self_attn", f"{ours}.mixer")
        else:
            pieces += pieces_of_mamba(f"{theirs}.mamba", f"{ours}.mixer", mixers["ssm"])
        if route:
            pieces.append(transposed(f"{feed}.router.weight", f"{ours}.mlp.router.weight"))
            pieces += pieces_of_experts(f"{feed}.experts", f"{ours}.mlp", experts.experts)
        else:
            pieces += pieces_of_gated_mlp(feed, f"{ours}.mlp")
    return Translation(model, pieces, unused=tied_head(tied))


def _read_attention(fields: Fields, width: int) -> AttentionConfig:
    heads = fields.take("num_attention_heads", 32)
    return AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 8) or heads,
        head_width=fields.take("head_dim", None) or width // heads,
        rope=None,
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
    )


def _read_mamba(fields: Fields, width: int, eps: float) -> MambaConfig:
    rank = fields.take("mamba_dt_rank", "auto")
    return MambaConfig(
        inner=fields.take("mamba_expand", 2) * width,
        state=fields.take("mamba_d_state", 16),
        conv=fields.take("mamba_d_conv", 4),
        dt_rank=math.ceil(width / 16) if rank == "auto" else rank,
        dt_min=1e-3,
        dt_max=0.1,
        norm_eps=eps,
        bias=fields.take("mamba_proj_bias", False),
        conv_bias=fields.take("mamba_conv_bias", True),
    )


def _read_period(fields: Fields, what: str, depth: int, period: int, offset: int) -> list[bool]:
    """For each layer whether it is one of those that come once in a period."""
    period, offset = fields.take(f"{what}_period", period), fields.take(f"{what}_offset", offset)
    return [i % period == offset for i in range(depth)]
