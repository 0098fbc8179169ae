"""Mistral (arXiv:2310.06825): causal windows, which include the query's position, and gated MLPs."""

from __future__ import annotations

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_window,
)
from sparsejax.layers import MlpConfig, NormConfig


def translate(fields: Fields) -> Translation:
    """Translates a `MistralConfig`."""
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6))
    mixer = read_attention(fields, width, read_rope(fields), pattern=read_window(fields, 4096))
    activation = fields.choose("hidden_act", ACTIVATIONS, "silu")
    mlp = MlpConfig(kind="gated", width=fields.take("intermediate_size"), activation=activation)
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, [("local", pre_norm_layer(mixer, mlp, norm))] * depth, norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i in range(depth):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target),
            *tensors.attention(f"{source}.self_attn", f"{target}.mixer"),
            *tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp"),
        ]
    return Translation(model, maps, unused=tensors.tied_head(tied))
