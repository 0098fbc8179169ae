"""ModernBERT (arXiv:2412.13663): an encoder that alternates windows and full attention with separate rotary bases."""

from __future__ import annotations

from sparsejax.config import EmbeddingConfig, HeadConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_ropes
from sparsejax.interop.huggingface.tensors import identity, linear, norm, split_linear, transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    LAYER_NAMES,
    Translation,
    build_model,
    pre_norm_layer,
    read_layer_types,
)
from sparsejax.layers import AttentionConfig, MlpConfig, NormConfig

# Layer types -> the older key of the rotary base, and its default.
BASES = {
    "sliding_attention": ("local_rope_theta", 10_000.0),
    "full_attention": ("global_rope_theta", 160_000.0),
}


def translate(fields: Fields) -> Translation:
    """Translates a `ModernBertConfig` with a masked language model head."""
    fields.ignore("sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn", "reference_compile")
    fields.ignore("classifier_pooling", "repad_logits_with_grad", "position_embedding_type", "layer_norm_eps")
    width, heads, depth = (fields.take(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    period = fields.take("global_attn_every_n_layers", 3)
    types = read_layer_types(fields, ["sliding_attention" if i % period else "full_attention" for i in range(depth)])
    half = fields.take("local_attention", 128) // 2
    patterns = {"sliding_attention": f"window({half}, {half})", "full_attention": "full"}
    ropes = read_ropes(fields, BASES, scaled=tuple(BASES))
    layer_norm = NormConfig(kind="layer", eps=fields.take("norm_eps", 1e-5), bias=fields.take("norm_bias", False))
    bias, mlp_bias = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    inner = fields.take("intermediate_size")
    activation = fields.choose("hidden_activation", ACTIVATIONS, "gelu")
    mlp = MlpConfig(kind="gated", width=inner, activation=activation, bias=mlp_bias)
    mixers = {
        layer_type: AttentionConfig(
            pattern=pattern,
            heads=heads,
            kv_heads=heads,
            head_width=width // heads,
            rope=ropes[layer_type],
            qk_norm=None,
            impl="auto",
            bias=bias,
            out_bias=bias,
        )
        for layer_type, pattern in patterns.items()
    }
    layers = [
        # The first layer has no norm before its mixer: the embedding is normalized.
        (LAYER_NAMES[layer_type], pre_norm_layer(mixers[layer_type], mlp, layer_norm, mixer_norm=i > 0))
        for i, layer_type in enumerate(types)
    ]
    tied, head_bias = fields.take("tie_word_embeddings", True), fields.take("classifier_bias", False)
    decoder_bias = fields.take("decoder_bias", True)
    model = build_model(
        fields,
        width,
        layers,
        layer_norm,
        tied=tied,
        causal=False,
        embedding=EmbeddingConfig(norm=layer_norm),
        head=HeadConfig(
            activation=fields.choose("classifier_activation", ACTIVATIONS, "gelu"),
            linear_bias=head_bias,
            norm=layer_norm,
            bias=decoder_bias,
        ),
    )
    maps = [
        identity("model.embeddings.tok_embeddings.weight", "embedding.tokens"),
        *norm("model.embeddings.norm", "embedding.norm", layer_norm.bias),
        *norm("model.final_norm", "norm", layer_norm.bias),
        *linear("head.dense", "head.linear", head_bias),
        *norm("head.norm", "head.norm", layer_norm.bias),
        *([identity("decoder.bias", "head.bias")] if decoder_bias else []),
        *([] if tied else [transposed("decoder.weight", "head.weight")]),
    ]
    for i in range(depth):
        source, target = f"model.layers.{i}", f"layers.{i}"
        projections = [f"{target}.mixer.{name}" for name in ("query", "key", "value")]
        maps += [
            *(norm(f"{source}.attn_norm", f"{target}.mixer_residual.before", layer_norm.bias) if i else []),
            *norm(f"{source}.mlp_norm", f"{target}.mlp_residual.before", layer_norm.bias),
            *split_linear(f"{source}.attn.Wqkv", projections, [width] * 3, bias),
            *linear(f"{source}.attn.Wo", f"{target}.mixer.out", bias),
            *split_linear(f"{source}.mlp.Wi", [f"{target}.mlp.gate", f"{target}.mlp.up"], [inner] * 2, mlp_bias),
            *linear(f"{source}.mlp.Wo", f"{target}.mlp.down", mlp_bias),
        ]
    return Translation(model, maps, unused=(r"decoder\.weight",) if tied else ())
