"""Mamba (arXiv:2312.00752) and Mamba-2 (arXiv:2405.21060), and their mixers in hybrid models."""

from __future__ import annotations

import math
from typing import Any

from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import (
    TensorMap,
    identity,
    linear,
    norm,
    split_conv,
    split_linear,
    tied_head,
    transposed,
)
from sparsejax.interop.huggingface.translation import Translation, build_model, pre_norm_layer
from sparsejax.layers import Mamba2Config, MambaConfig, NormConfig

# Initial step sizes and implementation choices, which do not affect a trained model.
IGNORED = (
    "time_step_init_scheme time_step_scale time_step_min time_step_max time_step_floor rescale_prenorm_residual"
    " residual_in_fp32 use_mambapy use_associative_scan time_step_rank expand chunk_size intermediate_size"
    # Keys of the original implementation's files.
    " d_model d_inner n_layer ssm_cfg fused_add_norm pad_vocab_size_multiple norm_before_gate"
)
# Keys of the original implementation's `ssm_cfg`, by its layer -> those of transformers, and their defaults.
ORIGINAL: dict[str, dict[str, tuple[str, Any]]] = {
    "Mamba1": {
        "d_state": ("state_size", 16),
        "d_conv": ("conv_kernel", 4),
        "expand": ("expand", 2),
        "dt_rank": ("time_step_rank", "auto"),
        "bias": ("use_bias", False),
        "conv_bias": ("use_conv_bias", True),
    },
    "Mamba2": {
        "d_state": ("state_size", 128),
        "d_conv": ("conv_kernel", 4),
        "expand": ("expand", 2),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 1),
        "bias": ("use_bias", False),
        "conv_bias": ("use_conv_bias", True),
    },
}
OLDER_NAMES = ((r"^backbone\.embeddings\.", "backbone.embedding."),)


def translate(fields: Fields) -> Translation:
    """Translates a `MambaConfig`."""
    width = _read_width(fields, 768)
    rank = fields.take("time_step_rank", "auto")
    mixer = MambaConfig(
        inner=fields.take("intermediate_size", None, int) or int(fields.take("expand", 2, float) * width),
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
    """Translates a `Mamba2Config`."""
    width, groups, bias = _read_width(fields, 4096), fields.take("n_groups", 8), fields.take("use_bias", False)
    mixer = Mamba2Config(
        heads=fields.take("num_heads", 128),
        head_width=fields.take("head_dim", 64),
        state=fields.take("state_size", 128),
        groups=groups,
        conv=fields.take("conv_kernel", 4),
        dt_min=1e-3,
        dt_max=0.1,
        norm_eps=fields.take("layer_norm_epsilon", 1e-5),
        norm_groups=groups,
        bias=bias,
        out_bias=bias,
        conv_bias=fields.take("use_conv_bias", True),
        **read_limits(fields),
    )
    if mixer.inner != (inner := int(fields.take("expand", 2, float) * width)):
        raise fields.error("num_heads", f"{mixer.heads} heads of width {mixer.head_width} are not {inner} channels")
    return _translate(fields, mixer, width, tied=False)


def translate_original(fields: Fields) -> Translation:
    """Translates the config.json of the original implementation, of which mamba_ssm writes either generation."""
    fields.ignore("fused_add_norm", "residual_in_fp32")
    fields.require("rms_norm", True)
    fields.require("d_intermediate", 0)
    fields.require("attn_layer_idx", [])
    fields.require("attn_cfg", {})
    cell = Fields(fields.take("ssm_cfg", None, dict) or {}, f"{fields.path}: ssm_cfg")
    cell.ignore("chunk_size", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path")
    layer = cell.choose("layer", {name: name for name in ORIGINAL}, "Mamba1")
    values = {newer: cell.take(key, default) for key, (newer, default) in ORIGINAL[layer].items()}
    cell.finish()
    multiple = fields.take("pad_vocab_size_multiple", 8)
    values |= {
        "hidden_size": fields.take("d_model"),
        "num_hidden_layers": fields.take("n_layer"),
        "vocab_size": multiple * -(-fields.take("vocab_size") // multiple),
        "tie_word_embeddings": fields.take("tie_embeddings", True),
    }
    if layer == "Mamba2":
        values["num_heads"] = values["expand"] * values["hidden_size"] // values["head_dim"]
    return (translate_2 if layer == "Mamba2" else translate)(Fields(values, fields.path))


def _read_width(fields: Fields, default: int) -> int:
    fields.ignore(*IGNORED.split())
    fields.require("hidden_act", "silu")
    fields.require("rms_norm", True)
    return fields.take("hidden_size", default)


def _translate(fields: Fields, mixer: MambaConfig | Mamba2Config, width: int, tied: bool) -> Translation:
    depth, tied = fields.take("num_hidden_layers"), fields.take("tie_word_embeddings", tied)
    layer_norm = NormConfig(kind="rms", eps=fields.take("layer_norm_epsilon", 1e-5))
    layers = [("ssm", pre_norm_layer(mixer, None, layer_norm))] * depth
    model = build_model(fields, width, layers, layer_norm, tied=tied)
    maps = backbone_tensors(tied)
    for i in range(depth):
        source, target = f"backbone.layers.{i}", f"layers.{i}"
        maps += norm(f"{source}.norm", f"{target}.mixer_residual.before")
        if isinstance(mixer, MambaConfig):
            maps += mamba_tensors(f"{source}.mixer", f"{target}.mixer", mixer)
        else:
            maps += mamba2_tensors(f"{source}.mixer", f"{target}.mixer", mixer)
    return Translation(model, maps, unused=tied_head(tied), older_names=OLDER_NAMES)


def backbone_tensors(tied: bool) -> list[TensorMap]:
    """The embedding, the last norm, and the head unless it is tied, under the names of Mamba."""
    maps = [identity("backbone.embeddings.weight", "embedding.tokens"), *norm("backbone.norm_f", "norm")]
    return maps if tied else [*maps, transposed("lm_head.weight", "head.weight")]


def read_limits(fields: Fields) -> dict[str, Any]:
    """Reads the bounds of step sizes, by default (0, infinity), as fields of `Mamba2Config`.

    `time_step_min` and `time_step_max` bound initial step sizes only. transformers 5.23 clamps the step sizes of
    Nemotron-H and Zamba2 to `time_step_min` and ignores `time_step_limit`; the released models do not (Megatron-LM,
    and transformers pull request 48989).
    """
    low, high = fields.take("time_step_limit", None) or (0.0, math.inf)
    bounded = high is not None and math.isfinite(high)
    return {"dt_floor": float(low), "dt_ceiling": float(high) if bounded else None}


def mamba_tensors(source: str, target: str, config: MambaConfig) -> list[TensorMap]:
    """A Mamba mixer."""
    d = config.inner
    maps = [
        *split_linear(f"{source}.in_proj", [f"{target}.input", f"{target}.gate"], [d, d], config.bias),
        *split_conv(f"{source}.conv1d", [f"{target}.conv"], [d], config.conv_bias),
        *linear(f"{source}.x_proj", f"{target}.select"),
        *linear(f"{source}.dt_proj", f"{target}.dt"),
        identity(f"{source}.dt_proj.bias", f"{target}.dt_bias"),
        *_ssm_tensors(source, target),
        *linear(f"{source}.out_proj", f"{target}.out", config.bias),
    ]
    if config.norm_eps is not None:
        names = ("dt_layernorm", "dt_norm"), ("b_layernorm", "B_norm"), ("c_layernorm", "C_norm")
        maps += [part for a, b in names for part in norm(f"{source}.{a}", f"{target}.{b}")]
    return maps


def mamba2_tensors(source: str, target: str, config: Mamba2Config) -> list[TensorMap]:
    """A Mamba-2 mixer: one linear layer gives the gate, x, B, C and step sizes; one convolution covers x, B and C."""
    d, select = config.inner, 2 * config.groups * config.state
    projections = [f"{target}.{name}" for name in ("gate", "input", "select", "dt")]
    return [
        *split_linear(f"{source}.in_proj", projections, [d, d, select, config.heads], config.bias),
        *split_conv(f"{source}.conv1d", [f"{target}.conv", f"{target}.conv_select"], [d, select], config.conv_bias),
        identity(f"{source}.dt_bias", f"{target}.dt_bias"),
        *_ssm_tensors(source, target),
        *([] if config.norm_eps is None else norm(f"{source}.norm", f"{target}.norm")),
        *linear(f"{source}.out_proj", f"{target}.out", config.out_bias),
    ]


def _ssm_tensors(source: str, target: str) -> list[TensorMap]:
    return [identity(f"{source}.A_log", f"{target}.log_decay"), identity(f"{source}.D", f"{target}.skip")]
