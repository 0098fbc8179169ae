"""Mamba (arXiv:2312.00752) and Mamba-2 (arXiv:2405.21060), and the parts that hybrids take from them."""

from __future__ import annotations

import math

from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, split_conv, split_linear, transposed
from sparsejax.interop.huggingface.translation import (
    Translation,
    build_model,
    tied_head,
)
from sparsejax.layers import LayerConfig, Mamba2Config, MambaConfig, NormConfig

# How step sizes start, and how the reference computes: nothing of it changes what a loaded model gives.
STARTS = (
    "time_step_init_scheme time_step_scale time_step_min time_step_max time_step_floor rescale_prenorm_residual"
    " residual_in_fp32 use_mambapy use_associative_scan time_step_rank expand chunk_size intermediate_size"
    # What the files of the first implementation have besides.
    " d_model d_inner n_layer ssm_cfg fused_add_norm pad_vocab_size_multiple norm_before_gate"
)


def translate(fields: Fields) -> Translation:
    """From the keys of a `MambaConfig`."""
    fields.ignore(*STARTS.split())
    fields.require("hidden_act", "silu")
    fields.require("rms_norm", True)
    width = fields.take("hidden_size", 768)
    rank = fields.take("time_step_rank", "auto")
    mixer = MambaConfig(
        inner=fields.take("intermediate_size", None) or int(fields.take("expand", 2) * width),
        state=fields.take("state_size", 16),
        conv=fields.take("conv_kernel", 4),
        dt_rank=math.ceil(width / 16) if rank == "auto" else rank,
        dt_min=1e-3,
        dt_max=0.1,
        bias=fields.take("use_bias", False),
        conv_bias=fields.take("use_conv_bias", True),
    )
    return _translate(fields, mixer, width, tied=True)


def translate_2(fields: Fields) -> Translation:
    """From the keys of a `Mamba2Config`."""
    fields.ignore(*STARTS.split())
    fields.require("hidden_act", "silu")
    fields.require("rms_norm", True)
    width = fields.take("hidden_size", 4096)
    groups, eps = fields.take("n_groups", 8), fields.take("layer_norm_epsilon", 1e-5)
    mixer = Mamba2Config(
        heads=fields.take("num_heads", 128),
        head_width=fields.take("head_dim", 64),
        state=fields.take("state_size", 128),
        groups=groups,
        conv=fields.take("conv_kernel", 4),
        dt_min=1e-3,
        dt_max=0.1,
        norm_eps=eps,
        norm_groups=groups,
        bias=fields.take("use_bias", False),
        out_bias=fields.take("use_bias", False),
        conv_bias=fields.take("use_conv_bias", True),
        **read_limits(fields),
    )
    if mixer.inner != int(fields.take("expand", 2) * width):
        raise fields.error("num_heads", f"{mixer.heads} heads of {mixer.head_width} are not expand * hidden_size")
    return _translate(fields, mixer, width, tied=False)


def _translate(fields: Fields, mixer: MambaConfig | Mamba2Config, width: int, tied: bool) -> Translation:
    depth, tied = fields.take("num_hidden_layers"), fields.take("tie_word_embeddings", tied)
    norm = NormConfig("rms", fields.take("layer_norm_epsilon", 1e-5))
    model = build_model(
        fields, width, [("ssm", LayerConfig(mixer, None, norm, "pre", remat=False))] * depth, norm, tied=tied
    )
    pieces = [same("backbone.embeddings.weight", "embedding.tokens"), same("backbone.norm_f.weight", "norm.scale")]
    pieces += [] if tied else [transposed("lm_head.weight", "head.weight")]
    pieces_of_mixer = pieces_of_mamba if isinstance(mixer, MambaConfig) else pieces_of_mamba2
    for i in range(depth):
        theirs, ours = f"backbone.layers.{i}", f"layers.{i}"
        pieces.append(same(f"{theirs}.norm.weight", f"{ours}.mixer_residual.before.scale"))
        pieces += pieces_of_mixer(f"{theirs}.mixer", f"{ours}.mixer", mixer)
    return Translation(model, pieces, unused=tied_head(tied))


def read_limits(fields: Fields, key: str = "time_step_limit") -> dict[str, float | None]:
    """Bounds on step sizes, as fields of `Mamba2Config`; an infinite one is none."""
    low, high = fields.take(key, None) or (0.0, math.inf)
    return {"dt_floor": float(low), "dt_ceiling": None if math.isinf(high) else float(high)}


def pieces_of_mamba(theirs: str, ours: str, config: MambaConfig) -> list[Piece]:
    """A Mamba mixer."""
    d = config.inner
    pieces = [
        *split_linear(f"{theirs}.in_proj", [f"{ours}.input", f"{ours}.gate"], [d, d], config.bias),
        *split_conv(f"{theirs}.conv1d", [f"{ours}.conv"], [d], config.conv_bias),
        *linear(f"{theirs}.x_proj", f"{ours}.select"),
        *linear(f"{theirs}.dt_proj", f"{ours}.dt"),
        same(f"{theirs}.dt_proj.bias", f"{ours}.dt_bias"),
        same(f"{theirs}.A_log", f"{ours}.log_decay"),
        same(f"{theirs}.D", f"{ours}.skip"),
        *linear(f"{theirs}.out_proj", f"{ours}.out", config.bias),
    ]
    if config.norm_eps is not None:
        names = ("dt_layernorm", "dt_norm"), ("b_layernorm", "B_norm"), ("c_layernorm", "C_norm")
        pieces += [same(f"{theirs}.{a}.weight", f"{ours}.{b}.scale") for a, b in names]
    return pieces


def pieces_of_mamba2(theirs: str, ours: str, config: Mamba2Config) -> list[Piece]:
    """A Mamba-2 mixer: gate, x, B, C and step sizes come from one linear map, x, B and C go through one convolution."""
    d, select = config.inner, 2 * config.groups * config.state
    parts = [f"{ours}.{name}" for name in ("gate", "input", "select", "dt")]
    return [
        *split_linear(f"{theirs}.in_proj", parts, [d, d, select, config.heads], config.bias),
        *split_conv(f"{theirs}.conv1d", [f"{ours}.conv", f"{ours}.conv_select"], [d, select], config.conv_bias),
        same(f"{theirs}.dt_bias", f"{ours}.dt_bias"),
        same(f"{theirs}.A_log", f"{ours}.log_decay"),
        same(f"{theirs}.D", f"{ours}.skip"),
        *([] if config.norm_eps is None else [same(f"{theirs}.norm.weight", f"{ours}.norm.scale")]),
        *linear(f"{theirs}.out_proj", f"{ours}.out", config.out_bias),
    ]
