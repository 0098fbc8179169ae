"""DeepSeek-V3.2: latent attention whose keys an indexer selects, and experts behind a few dense layers.

arXiv:2405.04434 (the attention), arXiv:2412.19437 (the experts), arXiv:2512.02556 (the indexer).
"""

from __future__ import annotations

import dataclasses

from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, transposed
from sparsejax.interop.huggingface.translation import (
    ACTIVATIONS,
    Translation,
    build_model,
    find_rope,
    pieces_of_ends,
    pieces_of_experts,
    pieces_of_gated_mlp,
    pieces_of_norms,
    read_layer_types,
    read_rope,
    tied_head,
)
from sparsejax.layers import (
    ExpertsConfig,
    IndexerConfig,
    LatentConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    yarn_growth,
)

LATENT_NORM_EPS = INDEX_NORM_EPS = 1e-6  # whatever `rms_norm_eps` is


def translate(fields: Fields) -> Translation:
    """From the keys of a `DeepseekV32Config`."""
    fields.ignore("head_dim", "qk_head_dim", "mlp_bias", "pretraining_tp", "num_nextn_predict_layers", "ep_size")
    width, depth = fields.take("hidden_size", 7168), fields.take("num_hidden_layers", 61)
    read_layer_types(fields, ["indexed_attention"] * depth, allowed=("indexed_attention",))
    norm = NormConfig("rms", fields.take("rms_norm_eps", 1e-6))
    mixer = _read_attention(fields)
    activation = fields.choose("hidden_act", ACTIVATIONS, "silu")
    mlp = MlpConfig("gated", fields.take("intermediate_size", 18432), activation)
    experts = _read_experts(fields, activation)
    kinds = read_mlp_types(fields, depth, dense=3)
    layers = [
        (kind, LayerConfig(mixer, mlp if kind == "dense" else experts, norm, "pre", remat=False)) for kind in kinds
    ]
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    pieces = pieces_of_ends(tied)
    for i, kind in enumerate(kinds):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        pieces += [
            *pieces_of_norms(theirs, ours),
            *pieces_of_latent(f"{theirs}.self_attn", f"{ours}.mixer", mixer),
            *_pieces_of_indexer(f"{theirs}.self_attn.indexer", f"{ours}.mixer.indexer"),
        ]
        if kind == "dense":
            pieces += pieces_of_gated_mlp(f"{theirs}.mlp", f"{ours}.mlp")
        else:
            pieces += pieces_of_routed_experts(f"{theirs}.mlp", f"{ours}.mlp", experts)
    return Translation(model, pieces, unused=tied_head(tied))


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
    require_heads(fields, config.heads)
    width = config.nope_width + config.rope_width
    return dataclasses.replace(config, scale=width**-0.5 * _read_scale_factor(fields))


def require_heads(fields: Fields, heads: int) -> None:
    """Refuses heads of keys and values that are not as many as those of queries: all are expanded from one latent."""
    if fields.take("num_key_value_heads", None) not in (None, heads):
        raise fields.error("num_key_value_heads", f"only {heads} is supported, as many as num_attention_heads")


def _read_scale_factor(fields: Fields) -> float:
    """What YaRN's `mscale_all_dim` multiplies scores by."""
    rope = find_rope(fields)
    every, kind = rope.get("mscale_all_dim"), rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" or not every or rope["factor"] <= 1:
        return 1.0
    return yarn_growth(rope["factor"], every) ** 2


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
    """Whether the feed-forward part of each layer is "dense", as the first `dense` are by default, or "experts"."""
    first = min(fields.take("first_k_dense_replace", dense), depth)
    given = read_layer_types(
        fields, ["dense"] * first + ["sparse"] * (depth - first), "mlp_layer_types", allowed=("dense", "sparse")
    )
    return ["dense" if kind == "dense" else "experts" for kind in given]


def pieces_of_latent(theirs: str, ours: str, config: LatentConfig) -> list[Piece]:
    """Latent attention without its indexer."""
    if config.query_rank is None:
        pieces = linear(f"{theirs}.q_proj", f"{ours}.query")
    else:
        pieces = [
            *linear(f"{theirs}.q_a_proj", f"{ours}.query_latent", config.bias),
            same(f"{theirs}.q_a_layernorm.weight", f"{ours}.query_norm.scale"),
            *linear(f"{theirs}.q_b_proj", f"{ours}.query"),
        ]
    return [
        *pieces,
        *linear(f"{theirs}.kv_a_proj_with_mqa", f"{ours}.latent", config.bias),
        same(f"{theirs}.kv_a_layernorm.weight", f"{ours}.latent_norm.scale"),
        *linear(f"{theirs}.kv_b_proj", f"{ours}.expand"),
        *linear(f"{theirs}.o_proj", f"{ours}.out", config.bias),
    ]


def _pieces_of_indexer(theirs: str, ours: str) -> list[Piece]:
    return [
        *linear(f"{theirs}.wq_b", f"{ours}.queries"),
        *linear(f"{theirs}.wk", f"{ours}.keys"),
        same(f"{theirs}.k_norm.weight", f"{ours}.key_norm.scale"),
        same(f"{theirs}.k_norm.bias", f"{ours}.key_norm.bias"),
        *linear(f"{theirs}.weights_proj", f"{ours}.weights"),
    ]


def pieces_of_routed_experts(theirs: str, ours: str, config: ExpertsConfig, **names) -> list[Piece]:
    """Experts that a router with a bias for the choice selects, and one that serves every token."""
    return [
        transposed(f"{theirs}.gate.weight", f"{ours}.router.weight"),
        same(f"{theirs}.gate.e_score_correction_bias", f"{ours}.selection_bias"),
        *pieces_of_experts(f"{theirs}.experts", ours, config.experts, **names),
        *(pieces_of_gated_mlp(f"{theirs}.shared_experts", f"{ours}.shared") if config.shared_width else []),
    ]
