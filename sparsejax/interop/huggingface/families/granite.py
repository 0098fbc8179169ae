"""Granite 4: Mamba-2 layers with a few attention layers, experts beside a shared MLP, and constant factors."""

from __future__ import annotations

from sparsejax.config import EmbeddingConfig, HeadConfig
from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.families.bamba import read_mamba2
from sparsejax.interop.huggingface.families.mamba import mamba2_tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import TensorMap, linear, split_last, split_linear
from sparsejax.interop.huggingface.translation import (
    SILU,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
)
from sparsejax.layers import ExpertsConfig, FeedForwardConfig, MixerConfig, MlpConfig, NormConfig, ResidualConfig


def translate(fields: Fields) -> Translation:
    """Translates a `GraniteMoeHybridConfig`; without experts, the shared MLP is the only one."""
    fields.ignore("mamba_chunk_size", "init_method")
    fields.require("normalization_function", "rmsnorm")
    width, depth = fields.take("hidden_size"), fields.take("num_hidden_layers")
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6))
    bias = fields.take("attention_bias", False)
    rope = read_rope(fields)
    rotates = fields.choose("position_embedding_type", {"rope": True, "nope": False, None: False}, None)
    attention = read_attention(
        fields,
        width,
        rope if rotates else None,
        heads=32,
        kv_heads=None,
        scale=float(fields.take("attention_multiplier", 1.0)),
        bias=bias,
        out_bias=bias,
    )
    mamba = read_mamba2(fields, width, norm.eps, out_bias=fields.take("mamba_proj_bias", False))
    mlp = _read_feed_forward(fields)
    residual = ResidualConfig(scale=float(fields.take("residual_multiplier", 1.0)))

    def layer(mixer: MixerConfig):
        return pre_norm_layer(mixer, mlp, norm, mixer_residual=residual, mlp_residual=residual)

    types = read_layer_types(fields, ["linear_attention"] * depth, allowed=("full_attention", "linear_attention"))
    layers = {"full_attention": ("full", layer(attention)), "linear_attention": ("ssm", layer(mamba))}
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(
        fields,
        width,
        [layers[layer_type] for layer_type in types],
        norm,
        tied=tied,
        embedding=EmbeddingConfig(scale=float(fields.take("embedding_multiplier", 1.0))),
        head=HeadConfig(scale=1 / fields.take("logits_scaling", 1.0)),
    )
    maps = tensors.embedding_and_head(tied)
    for i, layer_type in enumerate(types):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [*tensors.pre_norms(source, target), *_feed_forward_tensors(source, f"{target}.mlp", mlp, width)]
        if layer_type == "full_attention":
            maps += tensors.attention(f"{source}.self_attn", f"{target}.mixer", bias, bias)
        else:
            maps += mamba2_tensors(f"{source}.mamba", f"{target}.mixer", mamba)
    return Translation(model, maps, unused=tensors.tied_head(tied))


def _read_feed_forward(fields: Fields) -> FeedForwardConfig:
    activation = fields.choose("hidden_act", SILU, "silu")
    inner, shared = fields.take("intermediate_size", 11008), fields.take("shared_intermediate_size", 1024)
    count, top_k = fields.take("num_local_experts", 8), fields.take("num_experts_per_tok", 2)
    if not count:
        return MlpConfig(kind="gated", width=shared, activation=activation)
    return ExpertsConfig(
        experts=count, top_k=top_k, width=inner, activation=activation, renormalize=True, shared_width=shared
    )


def _feed_forward_tensors(source: str, target: str, config: FeedForwardConfig, width: int) -> list[TensorMap]:
    """All experts in one tensor, with gate and up side by side."""
    maps, shared, hidden = [], target, config.width
    if isinstance(config, ExpertsConfig):
        moe, shared, hidden = f"{source}.block_sparse_moe", f"{target}.shared", config.shared_width
        maps = [
            *linear(f"{moe}.router.layer", f"{target}.router"),
            split_last(
                f"{moe}.input_linear.weight", [f"{target}.gate", f"{target}.up"], [config.width] * 2, swapped=True
            ),
            split_last(f"{moe}.output_linear.weight", [f"{target}.down"], [width], swapped=True),
        ]
    return [
        *maps,
        *split_linear(f"{source}.shared_mlp.input_linear", [f"{shared}.gate", f"{shared}.up"], [hidden] * 2),
        *linear(f"{source}.shared_mlp.output_linear", f"{shared}.down"),
    ]
