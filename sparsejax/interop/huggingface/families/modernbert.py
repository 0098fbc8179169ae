"""ModernBERT (arXiv:2412.13663): an encoder of windows and full layers, each with a rotary base of its own."""

from __future__ import annotations

from sparsejax.config import EmbeddingConfig, HeadConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, split_linear, transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    Translation,
    build_model,
    read_layer_types,
    read_ropes,
)
from sparsejax.layers import AttentionConfig, LayerConfig, MlpConfig, NormConfig

# Kinds of layers: the older key of their rotary base, and the base where there is none.
BASES = {
    "sliding_attention": ("local_rope_theta", 10_000.0),
    "full_attention": ("global_rope_theta", 160_000.0),
}


def translate(fields: Fields) -> Translation:
    """From the keys of a `ModernBertConfig`, with the head of its masked language model."""
    fields.ignore("sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn", "reference_compile")
    fields.ignore("classifier_pooling", "repad_logits_with_grad", "position_embedding_type", "layer_norm_eps")
    width, heads, depth = (fields.take(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    every = fields.take("global_attn_every_n_layers", 3)
    kinds = read_layer_types(fields, ["sliding_attention" if i % every else "full_attention" for i in range(depth)])
    half = fields.take("local_attention", 128) // 2
    patterns = {"sliding_attention": f"window({half}, {half})", "full_attention": "full"}
    ropes = read_ropes(fields, BASES, scaled=tuple(BASES))
    norm = NormConfig("layer", fields.take("norm_eps", 1e-5), bias=fields.take("norm_bias", False))
    bias, mlp_bias = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    inner = fields.take("intermediate_size")
    mlp = MlpConfig("gated", inner, fields.choose("hidden_activation", ACTIVATIONS, "gelu"), bias=mlp_bias)
    layers = []
    for number, kind in enumerate(kinds):
        mixer = AttentionConfig(
            pattern=patterns[kind],
            heads=heads,
            kv_heads=heads,
            head_width=width // heads,
            rope=ropes[kind],
            qk_norm=NormConfig("none", 1e-6),
            impl="auto",
            bias=bias,
            out_bias=bias,
        )
        first = NormConfig("none", 1e-5) if number == 0 else None  # the embedding is normed already
        layers.append((LAYER_NAMES[kind], LayerConfig(mixer, mlp, norm, "pre", remat=False, mixer_norm=first)))
    tied, head_bias = fields.take("tie_word_embeddings", True), fields.take("classifier_bias", False)
    decoder_bias = fields.take("decoder_bias", True)
    model = build_model(
        fields,
        width,
        layers,
        norm,
        tied=tied,
        causal=False,
        embedding=EmbeddingConfig(norm=norm),
        head=HeadConfig(
            activation=fields.choose("classifier_activation", ACTIVATIONS, "gelu"),
            linear_bias=head_bias,
            norm=norm,
            bias=decoder_bias,
        ),
    )
    pieces = [
        same("model.embeddings.tok_embeddings.weight", "embedding.tokens"),
        *_norm("model.embeddings.norm", "embedding.norm", norm.bias),
        *_norm("model.final_norm", "norm", norm.bias),
        *linear("head.dense", "head.linear", head_bias),
        *_norm("head.norm", "head.norm", norm.bias),
        *([same("decoder.bias", "head.bias")] if decoder_bias else []),
        *([] if tied else [transposed("decoder.weight", "head.weight")]),
    ]
    for i in range(depth):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        pieces += [
            *(_norm(f"{theirs}.attn_norm", f"{ours}.mixer_residual.before", norm.bias) if i else []),
            *_norm(f"{theirs}.mlp_norm", f"{ours}.mlp_residual.before", norm.bias),
            *split_linear(
                f"{theirs}.attn.Wqkv", [f"{ours}.mixer.{n}" for n in ("query", "key", "value")], [width] * 3, bias
            ),
            *linear(f"{theirs}.attn.Wo", f"{ours}.mixer.out", bias),
            *split_linear(f"{theirs}.mlp.Wi", [f"{ours}.mlp.{n}" for n in ("gate", "up")], [inner] * 2, mlp_bias),
            *linear(f"{theirs}.mlp.Wo", f"{ours}.mlp.down", mlp_bias),
        ]
    return Translation(model, pieces, unused=(r"decoder\.weight",) if tied else ())


def _norm(theirs: str, ours: str, bias: bool) -> list[Piece]:
    pieces = [same(f"{theirs}.weight", f"{ours}.scale")]
    return [*pieces, same(f"{theirs}.bias", f"{ours}.bias")] if bias else pieces
