"""Mistral (arXiv:2310.06825): causal windows (W keys, the own one included), gated MLPs."""

from __future__ import annotations

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
    read_window,
    tied_head,
)
from sparsejax.layers import AttentionConfig, LayerConfig, MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """From the keys of a `MistralConfig`."""
    width, heads, depth = (fields.take(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-6))
    mixer = AttentionConfig(
        pattern=read_window(fields, default=4096),
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 8) or heads,
        head_width=fields.take("head_dim", None) or width // heads,
        rope=read_rope(fields),
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
    )
    mlp = MlpConfig("gated", fields.take("intermediate_size"), fields.choose("hidden_act", ACTIVATIONS, "silu"))
    layer = LayerConfig(mixer, mlp, norm, "pre", remat=False)
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, [("local", layer)] * depth, norm, tied=tied)
    pieces = pieces_of_ends(tied)
    for i in range(depth):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        pieces += [
            *pieces_of_norms(theirs, ours),
            *pieces_of_attention(f"{theirs}.self_attn", f"{ours}.mixer"),
            *pieces_of_gated_mlp(f"{theirs}.mlp", f"{ours}.mlp"),
        ]
    return Translation(model, pieces, unused=tied_head(tied))
