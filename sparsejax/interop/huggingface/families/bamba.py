"""Bamba: Mamba-2 layers, a few of attention with rotary positions on half of the head, an MLP in each."""

from __future__ import annotations

from sparsejax.interop.huggingface.families.mamba import pieces_of_mamba2, read_limits
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
from sparsejax.layers import AttentionConfig, LayerConfig, Mamba2Config, MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """From the keys of a `BambaConfig`."""
    fields.ignore("z_loss_coefficient", "mamba_chunk_size")
    fields.require("partial_rotary_factor", 0.5)  # another counts in `rope_parameters` only
    width, heads, depth = (fields.take(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-5))
    activation = fields.choose("hidden_act", ACTIVATIONS, "silu")
    bias, mlp_bias = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    attention = AttentionConfig(
        pattern="causal",
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 8) or heads,
        head_width=fields.take("head_dim", None) or width // heads,
        rope=read_rope(fields, fraction=0.5),
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
        bias=bias,
        out_bias=bias,
    )
    fields.require("attn_rotary_emb", attention.rope.width(attention.head_width))  # another name of older files
    mamba = read_mamba2(fields, width, norm.eps, out_bias=fields.take("mamba_proj_bias", False))
    if activation != "silu":
        raise fields.error("hidden_act", "only silu is supported")  # it is the activation of the mixers too
    mlp = MlpConfig("gated", fields.take("intermediate_size"), activation, bias=mlp_bias)
    chosen = fields.take("attn_layer_indices", None) or []
    layers = [
        ("full", LayerConfig(attention, mlp, norm, "pre", remat=False))
        if i in chosen
        else ("ssm", LayerConfig(mamba, mlp, norm, "pre", remat=False))
        for i in range(depth)
    ]
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    pieces = pieces_of_ends(tied, norm="model.final_layernorm")
    for i in range(depth):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        pieces += [
            *pieces_of_norms(theirs, ours, second="pre_ff_layernorm"),
            *pieces_of_gated_mlp(f"{theirs}.feed_forward", f"{ours}.mlp", mlp_bias),
        ]
        if i in chosen:
            pieces += pieces_of_attention(f"{theirs}.self_attn", f"{ours}.mixer", bias, bias)
        else:
            pieces += pieces_of_mamba2(f"{theirs}.mamba", f"{ours}.mixer", mamba)
    return Translation(model, pieces, unused=tied_head(tied))


def read_mamba2(fields: Fields, width: int, eps: float | None, inner: int | None = None, **more) -> Mamba2Config:
    """The mixer as Bamba and Falcon-H1 write it; `inner` channels, or `mamba_expand` times the width."""
    heads, groups = fields.take("mamba_n_heads", 128), fields.take("mamba_n_groups", 1)
    expand = fields.take("mamba_expand", 2)
    inner = expand * width if inner is None else inner
    each = fields.take("mamba_d_head", "auto")
    config = Mamba2Config(
        heads=heads,
        head_width=inner // heads if each == "auto" else each,
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
        **more,
    )
    if config.inner != inner:
        raise fields.error("mamba_n_heads", f"{heads} heads of {config.head_width} do not make up {inner} channels")
    return config
