"""Jamba (arXiv:2403.19887): Mamba, a few attention layers without positions, and experts in every other layer."""

from __future__ import annotations

import math

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.families.mamba import mamba_tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import SILU, Translation, build_model, pre_norm_layer, read_attention
from sparsejax.layers import ExpertsConfig, MambaConfig, MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """Translates a `JambaConfig`."""
    fields.ignore("use_mambapy", "use_associative_scan", "calc_logits_for_entire_prompt")
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6))
    attention, mamba = read_attention(fields, width, None, heads=32), _read_mamba(fields, width, norm.eps)
    inner = fields.take("intermediate_size")
    activation = fields.choose("hidden_act", SILU, "silu")
    mlp = MlpConfig(kind="gated", width=inner, activation=activation)
    experts = ExpertsConfig(
        experts=fields.take("num_experts", 16),
        top_k=fields.take("num_experts_per_tok", 2),
        width=inner,
        activation=activation,
    )
    is_full = _read_period(fields, "attn_layer", depth, 8, 4)
    is_routed = [routed and experts.experts > 1 for routed in _read_period(fields, "expert_layer", depth, 2, 1)]
    layers = []
    for full, routed in zip(is_full, is_routed, strict=True):
        name = ("full" if full else "ssm") + ("_experts" if routed else "")
        layers.append((name, pre_norm_layer(attention if full else mamba, experts if routed else mlp, norm)))
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    maps = tensors.embedding_and_head(tied, norm="model.final_layernorm")
    for i, (full, routed) in enumerate(zip(is_full, is_routed, strict=True)):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += tensors.pre_norms(source, target, mlp="pre_ff_layernorm")
        if full:
            maps += tensors.attention(f"{source}.self_attn", f"{target}.mixer")
        else:
            maps += mamba_tensors(f"{source}.mamba", f"{target}.mixer", mamba)
        feed_forward = f"{source}.feed_forward"
        if routed:
            maps += tensors.linear(f"{feed_forward}.router", f"{target}.mlp.router")
            maps += tensors.experts(f"{feed_forward}.experts", f"{target}.mlp", experts.experts)
        else:
            maps += tensors.gated_mlp(feed_forward, f"{target}.mlp")
    return Translation(model, maps, unused=tensors.tied_head(tied))


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


def _read_period(fields: Fields, prefix: str, depth: int, period: int, offset: int) -> list[bool]:
    """Reads whether each layer is at the offset of a period; `period` and `offset` are defaults."""
    period, offset = fields.take(f"{prefix}_period", period), fields.take(f"{prefix}_offset", offset)
    return [i % period == offset for i in range(depth)]
