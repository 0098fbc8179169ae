"""Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786).

Norms on both sides of every branch, with scales that are stored less 1; local and global layers; embeddings times
sqrt(width); scores by `query_pre_attn_scalar`.
"""

from __future__ import annotations

import dataclasses
import functools

from sparsejax.config import EmbeddingConfig, HeadConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, same
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    Translation,
    build_model,
    pieces_of_attention,
    pieces_of_ends,
    pieces_of_gated_mlp,
    read_layer_types,
    read_rope,
    read_ropes,
    read_window,
    tied_head,
)
from sparsejax.layers import AttentionConfig, LayerConfig, MlpConfig, NormConfig

# Kinds of layers of Gemma 3: the older key of their rotary base, and the base where there is none.
BASES = {
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
    "full_attention": ("rope_theta", 1_000_000.0),
}


def _translate(fields: Fields, generation: int) -> Translation:
    """From the keys of a `Gemma2Config` or a `Gemma3TextConfig`."""
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    fields.require("use_bidirectional_attention", None, False)
    period = fields.take("sliding_window_pattern", None) or 6 if generation == 3 else 2
    fields.ignore("_sliding_window_pattern", "cache_implementation")
    fields.ignore("hidden_act")  # `hidden_activation` is what counts
    kinds = read_layer_types(
        fields, ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(depth)]
    )
    if generation == 3:
        fields.require("attn_logit_softcapping", None)  # the reference has the key, but caps nothing
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-6), offset=True)
    bias = fields.take("attention_bias", False)
    patterns = {"sliding_attention": read_window(fields, default=4096), "full_attention": "causal"}
    if generation == 3:
        ropes = read_ropes(fields, BASES, scaled=("full_attention",))
    else:
        ropes = dict.fromkeys(patterns, read_rope(fields))
    attention = AttentionConfig(
        pattern="causal",
        heads=fields.take("num_attention_heads", 8),
        kv_heads=fields.take("num_key_value_heads", 4),
        head_width=fields.take("head_dim", 256),
        rope=None,
        qk_norm=norm if generation == 3 else NormConfig("none", 1e-6),
        impl="auto",
        scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        softcap=fields.take("attn_logit_softcapping", None if generation == 3 else 50.0),
        bias=bias,
        out_bias=bias,
    )
    mlp = MlpConfig(
        "gated",
        fields.take("intermediate_size"),
        fields.choose("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
    )
    layers = []
    for kind in kinds:
        mixer = dataclasses.replace(attention, pattern=patterns[kind], rope=ropes[kind])
        layers.append((LAYER_NAMES[kind], LayerConfig(mixer, mlp, norm, "both", remat=False)))
    tied = fields.take("tie_word_embeddings", True)
    model = build_model(
        fields,
        width,
        layers,
        norm,
        tied=tied,
        embedding=EmbeddingConfig(scale=width**0.5),
        head=HeadConfig(softcap=fields.take("final_logit_softcapping", None if generation == 3 else 30.0)),
    )
    pieces = pieces_of_ends(tied)
    for i in range(depth):
        pieces += _pieces_of_layer(f"model.layers.{i}", f"layers.{i}", bias, normed=generation == 3)
    return Translation(model, pieces, unused=tied_head(tied))


def _pieces_of_layer(theirs: str, ours: str, bias: bool, normed: bool) -> list[Piece]:
    names = {
        "input_layernorm": "mixer_residual.before",
        "post_attention_layernorm": "mixer_residual.within",
        "pre_feedforward_layernorm": "mlp_residual.before",
        "post_feedforward_layernorm": "mlp_residual.within",
    }
    if normed:
        names |= {"self_attn.q_norm": "mixer.query_norm", "self_attn.k_norm": "mixer.key_norm"}
    return [
        *(same(f"{theirs}.{a}.weight", f"{ours}.{b}.scale") for a, b in names.items()),
        *pieces_of_attention(f"{theirs}.self_attn", f"{ours}.mixer", bias, bias),
        *pieces_of_gated_mlp(f"{theirs}.mlp", f"{ours}.mlp"),
    ]


translate_2 = functools.partial(_translate, generation=2)
translate_3 = functools.partial(_translate, generation=3)
