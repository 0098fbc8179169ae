"""Bamba: Mamba-2 layers with a few attention layers, whose rotary positions cover half of the head, and gated MLPs."""

from __future__ import annotations

from typing import Any

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.families.mamba import mamba2_tensors, read_limits
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.translation import SILU, Translation, build_model, pre_norm_layer, read_attention
from sparsejax.layers import Mamba2Config, MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """Translates a `BambaConfig`."""
    fields.ignore("z_loss_coefficient", "mamba_chunk_size")
    fields.require("partial_rotary_factor", 0.5)  # other values take effect in `rope_parameters` only
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-5))
    activation = fields.choose("hidden_act", SILU, "silu")
    bias, mlp_bias = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    rope = read_rope(fields, fraction=0.5)
    attention = read_attention(fields, width, rope, bias=bias, out_bias=bias)
    fields.require("attn_rotary_emb", rope.width(attention.head_width))  # the name in older files
    mamba = read_mamba2(fields, width, norm.eps, out_bias=fields.take("mamba_proj_bias", False))
    mlp = MlpConfig(kind="gated", width=fields.take("intermediate_size"), activation=activation, bias=mlp_bias)
    full, ssm = pre_norm_layer(attention, mlp, norm), pre_norm_layer(mamba, mlp, norm)
    full_layers = fields.take("attn_layer_indices", None) or []
    layers = [("full", full) if i in full_layers else ("ssm", ssm) for i in range(depth)]
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    maps = tensors.embedding_and_head(tied, norm="model.final_layernorm")
    for i in range(depth):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target, mlp="pre_ff_layernorm"),
            *tensors.gated_mlp(f"{source}.feed_forward", f"{target}.mlp", mlp_bias),
        ]
        if i in full_layers:
            maps += tensors.attention(f"{source}.self_attn", f"{target}.mixer", bias, bias)
        else:
            maps += mamba2_tensors(f"{source}.mamba", f"{target}.mixer", mamba)
    return Translation(model, maps, unused=tensors.tied_head(tied))


def read_mamba2(
    fields: Fields, width: int, eps: float | None, inner: int | None = None, **settings: Any
) -> Mamba2Config:
    """Reads the Mamba-2 mixer of Bamba and Falcon-H1.

    Args:
      fields: The config.json.
      width: Width of the residual stream.
      eps: Epsilon of the gated norm; None if there is no norm.
      inner: Number of channels; defaults to `mamba_expand` times the width.
      **settings: Other fields of `Mamba2Config`.
    """
    heads, groups = fields.take("mamba_n_heads", 128), fields.take("mamba_n_groups", 1)
    expand = fields.take("mamba_expand", 2)
    inner = expand * width if inner is None else inner
    head_width = fields.take("mamba_d_head", "auto")
    config = Mamba2Config(
        heads=heads,
        head_width=inner // heads if head_width == "auto" else head_width,
        state=fields.take("mamba_d_state", 256),
        groups=groups,
        conv=fields.take("mamba_d_conv", 4),
        dt_min=1e-3,
        dt_max=0.1,
        norm_eps=eps,
        norm_groups=groups,
        bias=fields.take("mamba_proj_bias", False),
        conv_bias=fields.take("mamba_conv_bias", True),
        **read_limits(fields),
        **settings,
    )
    if config.inner != inner:
        raise fields.error("mamba_n_heads", f"{heads} heads of width {config.head_width} are not {inner} channels")
    return config
