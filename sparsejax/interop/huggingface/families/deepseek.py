"""DeepSeek-V3.2: latent attention with keys selected by an indexer, and experts after a few dense layers.

Latent attention is defined in arXiv:2405.04434, the experts in arXiv:2412.19437, the indexer in arXiv:2512.02556.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope, read_rope_parameters
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linear, linears, norm, transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    pre_norm_layer,
    read_layer_types,
)
from sparsejax.layers import ExpertsConfig, IndexerConfig, LatentConfig, MlpConfig, NormConfig, yarn_growth

LATENT_NORM_EPS = INDEX_NORM_EPS = 1e-6  # for any `rms_norm_eps`


def translate(fields: Fields) -> Translation:
    """Translates a `DeepseekV32Config`."""
    fields.ignore("head_dim", "qk_head_dim", "mlp_bias", "pretraining_tp", "num_nextn_predict_layers", "ep_size")
    width, depth = fields.take("hidden_size", 7168), fields.take("num_hidden_layers", 61)
    read_layer_types(fields, ["indexed_attention"] * depth, allowed=("indexed_attention",))
    layer_norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6))
    mixer = _read_attention(fields)
    activation = fields.choose("hidden_act", ACTIVATIONS, "silu")
    mlp = MlpConfig(kind="gated", width=fields.take("intermediate_size", 18432), activation=activation)
    experts = _read_experts(fields, activation)
    layers = {
        "dense": pre_norm_layer(mixer, mlp, layer_norm),
        "experts": pre_norm_layer(mixer, experts, layer_norm),
    }
    names = read_mlp_types(fields, depth, dense=3)
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, [(name, layers[name]) for name in names], layer_norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i, name in enumerate(names):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target),
            *latent_tensors(f"{source}.self_attn", f"{target}.mixer", mixer),
            *_indexer_tensors(f"{source}.self_attn.indexer", f"{target}.mixer.indexer"),
        ]
        if name == "dense":
            maps += tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp")
        else:
            maps += routed_experts_tensors(f"{source}.mlp", f"{target}.mlp", experts)
    return Translation(model, maps, unused=tensors.tied_head(tied))


def _read_attention(fields: Fields) -> LatentConfig:
    config = LatentConfig(
        pattern="causal",
        heads=fields.take("num_attention_heads", 128),
        query_rank=fields.take("q_lora_rank", 1536),
        kv_rank=fields.take("kv_lora_rank", 512),
        nope_width=fields.take("qk_nope_head_dim", 128),
        rope_width=fields.take("qk_rope_head_dim", 64),
        value_width=fields.take("v_head_dim", 128),
        rope=dataclasses.replace(read_rope(fields), interleaved=True),
        norm_eps=LATENT_NORM_EPS,
        impl="auto",
        bias=fields.take("attention_bias", False),
        indexer=IndexerConfig(
            heads=fields.take("index_n_heads", 64),
            width=fields.take("index_head_dim", 128),
            top_k=fields.take("index_topk", 2048),
            norm_eps=INDEX_NORM_EPS,
        ),
    )
    require_kv_heads(fields, config.heads)
    width = config.nope_width + config.rope_width
    return dataclasses.replace(config, scale=width**-0.5 * _read_scale_factor(fields))


def require_kv_heads(fields: Fields, heads: int) -> None:
    """Rejects grouped keys and values: latent attention expands as many as there are query heads."""
    kv_heads = fields.take("num_key_value_heads", None, int)
    if kv_heads not in (None, heads):
        raise fields.error("num_key_value_heads", f"{kv_heads} differs from num_attention_heads = {heads}")


def _read_scale_factor(fields: Fields) -> float:
    """Factor on attention scores that YaRN's `mscale_all_dim` adds."""
    rope = read_rope_parameters(fields)
    mscale, name = rope.get("mscale_all_dim"), rope.get("rope_type") or rope.get("type") or "default"
    if name == "default" or not mscale or rope["factor"] <= 1:
        return 1.0
    return yarn_growth(rope["factor"], mscale) ** 2


def _read_experts(fields: Fields, activation: str) -> ExpertsConfig:
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    fields.require("moe_layer_freq", 1)
    inner = fields.take("moe_intermediate_size", 2048)
    return ExpertsConfig(
        experts=fields.take("n_routed_experts", 256),
        top_k=fields.take("num_experts_per_tok", 8),
        width=inner,
        activation=activation,
        router="sigmoid",
        renormalize=fields.take("norm_topk_prob", True),
        scale=float(fields.take("routed_scaling_factor", 2.5)),
        selection_bias=True,
        groups=fields.take("n_group", 8),
        top_groups=fields.take("topk_group", 4),
        shared_width=inner * fields.take("n_shared_experts", 1),
    )


def read_mlp_types(fields: Fields, depth: int, dense: int) -> list[str]:
    """Reads whether the feed-forward part of each layer is "dense" or "experts"; the first `dense` are by default."""
    first = min(fields.take("first_k_dense_replace", dense), depth)
    types = read_layer_types(
        fields, ["dense"] * first + ["sparse"] * (depth - first), "mlp_layer_types", allowed=("dense", "sparse")
    )
    return ["dense" if name == "dense" else "experts" for name in types]


def latent_tensors(source: str, target: str, config: LatentConfig) -> list[TensorMap]:
    """Latent attention without an indexer."""
    if config.query_rank is None:
        queries = linear(f"{source}.q_proj", f"{target}.query")
    else:
        queries = [
            *linear(f"{source}.q_a_proj", f"{target}.query_latent", config.bias),
            *norm(f"{source}.q_a_layernorm", f"{target}.query_norm"),
            *linear(f"{source}.q_b_proj", f"{target}.query"),
        ]
    return [
        *queries,
        *linear(f"{source}.kv_a_proj_with_mqa", f"{target}.latent", config.bias),
        *norm(f"{source}.kv_a_layernorm", f"{target}.latent_norm"),
        *linear(f"{source}.kv_b_proj", f"{target}.expand"),
        *linear(f"{source}.o_proj", f"{target}.out", config.bias),
    ]


def _indexer_tensors(source: str, target: str) -> list[TensorMap]:
    return [
        *linears(source, target, {"wq_b": "queries", "wk": "keys", "weights_proj": "weights"}),
        *norm(f"{source}.k_norm", f"{target}.key_norm", bias=True),
    ]


def routed_experts_tensors(
    source: str,
    target: str,
    config: ExpertsConfig,
    names: Sequence[str | None] = ("gate_proj", "up_proj", "down_proj"),
) -> list[TensorMap]:
    """Experts with a selection bias, and a shared expert; `names` as in `tensors.experts`."""
    return [
        transposed(f"{source}.gate.weight", f"{target}.router.weight"),
        identity(f"{source}.gate.e_score_correction_bias", f"{target}.selection_bias"),
        *tensors.experts(f"{source}.experts", target, config.experts, names),
        *(tensors.gated_mlp(f"{source}.shared_experts", f"{target}.shared") if config.shared_width else []),
    ]
