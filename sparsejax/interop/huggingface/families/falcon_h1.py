"""Falcon-H1 (arXiv:2507.22448): attention and Mamba-2 read the same norm and are added; factors everywhere."""

from __future__ import annotations

from sparsejax.config import EmbeddingConfig, HeadConfig
from sparsejax.interop.huggingface.families.bamba import read_mamba2
from sparsejax.interop.huggingface.families.mamba import pieces_of_mamba2
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pieces_of_attention,
    pieces_of_ends,
    pieces_of_gated_mlp,
    pieces_of_norms,
    read_rope,
    tied_head,
)
from sparsejax.layers import AttentionConfig, BranchConfig, LayerConfig, MlpConfig, NormConfig, ParallelConfig


def translate(fields: Fields) -> Translation:
    """From the keys of a `FalconH1Config`."""
    fields.ignore("mamba_chunk_size", "mlp_expansion_factor")
    fields.require("mamba_use_mlp", True)
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-5))
    bias, mlp_bias = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    mixer = ParallelConfig(
        {
            "attention": BranchConfig(
                _read_attention(fields, width, bias),
                scale_in=fields.take("attention_in_multiplier", 1.0),
                scale_out=fields.take("attention_out_multiplier", 1.0),
            ),
            "ssm": BranchConfig(
                _read_mixer(fields, width, norm.eps),
                scale_in=fields.take("ssm_in_multiplier", 1.0),
                scale_out=fields.take("ssm_out_multiplier", 1.0),
            ),
        }
    )
    gate_scale, out_scale = fields.take("mlp_multipliers", None) or (1.0, 1.0)
    mlp = MlpConfig(
        "gated",
        fields.take("intermediate_size"),
        fields.choose("hidden_act", {"silu": ACTIVATIONS["silu"]}, "silu"),
        bias=mlp_bias,
        gate_scale=gate_scale,
        out_scale=out_scale,
    )
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(
        fields,
        width,
        [("hybrid", LayerConfig(mixer, mlp, norm, "pre", remat=False))] * depth,
        norm,
        tied=tied,
        embedding=EmbeddingConfig(scale=fields.take("embedding_multiplier", 1.0)),
        head=HeadConfig(scale=fields.take("lm_head_multiplier", 1.0)),
    )
    pieces = pieces_of_ends(tied, norm="model.final_layernorm")
    for i in range(depth):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        branches = f"{ours}.mixer.branches"
        pieces += [
            *pieces_of_norms(theirs, ours, second="pre_ff_layernorm"),
            *pieces_of_attention(f"{theirs}.self_attn", f"{branches}.attention", bias, bias),
            *pieces_of_mamba2(f"{theirs}.mamba", f"{branches}.ssm", mixer.branches["ssm"].mixer),
            *pieces_of_gated_mlp(f"{theirs}.feed_forward", f"{ours}.mlp", mlp_bias),
        ]
    return Translation(model, pieces, unused=(*tied_head(tied), r".*\.mup_vector"))


def _read_attention(fields: Fields, width: int, bias: bool) -> AttentionConfig:
    heads = fields.take("num_attention_heads", 32)
    head_width = fields.take("head_dim", None) or width // heads
    return AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 8) or heads,
        head_width=head_width,
        rope=read_rope(fields),
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
        scale=head_width**-0.5 * fields.take("key_multiplier", 1.0),  # a factor on every key is one on every score
        bias=bias,
        out_bias=bias,
    )


def _read_mixer(fields: Fields, width: int, eps: float):
    normed = fields.take("mamba_rms_norm", False)
    return read_mamba2(
        fields,
        width,
        eps if normed else None,
        inner=fields.take("mamba_d_ssm", 1024),
        out_bias=fields.take("projectors_bias", False),
        norm_before_gate=fields.take("mamba_norm_before_gate", True),
        multipliers=tuple(fields.take("ssm_multipliers", None) or ()),
    )
