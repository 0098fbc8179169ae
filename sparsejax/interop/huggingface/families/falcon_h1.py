"""Falcon-H1 (arXiv:2507.22448): attention and Mamba-2 in parallel, gated MLPs, and constant factors throughout."""

from __future__ import annotations

import dataclasses

from sparsejax.config import EmbeddingConfig, HeadConfig
from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.families.bamba import read_mamba2
from sparsejax.interop.huggingface.families.mamba import mamba2_tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.translation import SILU, Translation, build_model, pre_norm_layer, read_attention
from sparsejax.layers import AttentionConfig, BranchConfig, Mamba2Config, MlpConfig, NormConfig, ParallelConfig


def translate(fields: Fields) -> Translation:
    """Translates a `FalconH1Config`."""
    fields.ignore("mamba_chunk_size", "mlp_expansion_factor")
    fields.require("mamba_use_mlp", True)
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-5))
    bias, mlp_bias = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    mamba = _read_mamba2(fields, width, norm.eps)
    branches = {
        "attention": BranchConfig(
            mixer=_read_attention(fields, width, bias),
            scale_in=fields.take("attention_in_multiplier", 1.0),
            scale_out=fields.take("attention_out_multiplier", 1.0),
        ),
        "ssm": BranchConfig(
            mixer=mamba,
            scale_in=fields.take("ssm_in_multiplier", 1.0),
            scale_out=fields.take("ssm_out_multiplier", 1.0),
        ),
    }
    gate_scale, out_scale = fields.take("mlp_multipliers", None) or (1.0, 1.0)
    mlp = MlpConfig(
        kind="gated",
        width=fields.take("intermediate_size"),
        activation=fields.choose("hidden_act", SILU, "silu"),
        bias=mlp_bias,
        gate_scale=gate_scale,
        out_scale=out_scale,
    )
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(
        fields,
        width,
        [("hybrid", pre_norm_layer(ParallelConfig(branches=branches), mlp, norm))] * depth,
        norm,
        tied=tied,
        embedding=EmbeddingConfig(scale=fields.take("embedding_multiplier", 1.0)),
        head=HeadConfig(scale=fields.take("lm_head_multiplier", 1.0)),
    )
    maps = tensors.embedding_and_head(tied, norm="model.final_layernorm")
    for i in range(depth):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target, mlp="pre_ff_layernorm"),
            *tensors.attention(f"{source}.self_attn", f"{target}.mixer.branches.attention", bias, bias),
            *mamba2_tensors(f"{source}.mamba", f"{target}.mixer.branches.ssm", mamba),
            *tensors.gated_mlp(f"{source}.feed_forward", f"{target}.mlp", mlp_bias),
        ]
    return Translation(model, maps, unused=(*tensors.tied_head(tied), r".*\.mup_vector"))


def _read_attention(fields: Fields, width: int, bias: bool) -> AttentionConfig:
    config = read_attention(fields, width, read_rope(fields), heads=32, bias=bias, out_bias=bias)
    # A factor on all keys is a factor on all scores.
    return dataclasses.replace(config, scale=config.head_width**-0.5 * fields.take("key_multiplier", 1.0))


def _read_mamba2(fields: Fields, width: int, eps: float) -> Mamba2Config:
    return read_mamba2(
        fields,
        width,
        eps if fields.take("mamba_rms_norm", False) else None,
        inner=fields.take("mamba_d_ssm", 1024),
        out_bias=fields.take("projectors_bias", False),
        norm_before_gate=fields.take("mamba_norm_before_gate", True),
        multipliers=tuple(fields.take("ssm_multipliers", None) or ()),
    )
