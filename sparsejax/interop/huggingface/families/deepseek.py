"""DeepSeek-V3.2 and GLM-5: latent attention with keys selected by an indexer, and experts after a few dense layers.

Latent attention is defined in arXiv:2405.04434, the experts in arXiv:2412.19437, the indexer in arXiv:2512.02556. In
GLM-5 some layers reuse the selection of the last indexer before them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

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
from sparsejax.layers import ExpertsConfig, IndexerConfig, LatentConfig, LayerConfig, MlpConfig, NormConfig, yarn_growth

LATENT_NORM_EPS = INDEX_NORM_EPS = 1e-6  # for any `rms_norm_eps`


# Defaults of `DeepseekV32Config` and `GlmMoeDsaConfig`.
DEEPSEEK = {
    "hidden_size": 7168, "num_hidden_layers": 61, "rms_norm_eps": 1e-6, "intermediate_size": 18432,
    "num_attention_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128, "index_n_heads": 64,
    "n_group": 8, "topk_group": 4,
}  # fmt: skip
GLM = {
    "hidden_size": 6144, "num_hidden_layers": 78, "rms_norm_eps": 1e-5, "intermediate_size": 12288,
    "num_attention_heads": 64, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256, "index_n_heads": 32,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


def translate(fields: Fields) -> Translation:
    """Translates a `DeepseekV32Config`."""
    depth = fields.take("num_hidden_layers", DEEPSEEK["num_hidden_layers"])
    return _translate(fields, DEEPSEEK, [False] * depth, interleaved=False)


def translate_glm(fields: Fields) -> Translation:
    """Translates a `GlmMoeDsaConfig`."""
    return _translate(fields, GLM, _read_shared(fields), interleaved=True)


def _read_shared(fields: Fields) -> list[bool]:
    """Whether each layer of GLM-5 reuses a selection."""
    depth = fields.take("num_hidden_layers", GLM["num_hidden_layers"])
    pattern, types = fields.take("index_topk_pattern", None), {"F": "full", "S": "shared"}
    frequency, offset = fields.take("index_topk_freq", 1), fields.take("index_skip_topk_offset", 2)
    default = ["shared" if max(i - offset + 1, 0) % max(frequency, 1) else "full" for i in range(depth)]
    if pattern is not None:
        default = [types.get(name, name) for name in pattern]
    names = read_layer_types(fields, default, "indexer_types", allowed=("full", "shared"))
    if len(names) != depth:
        raise fields.error("index_topk_pattern", f"{len(names)} entries for {depth} layers")
    return [name == "shared" for name in names]


def _translate(fields: Fields, defaults: dict[str, Any], shared: Sequence[bool], *, interleaved: bool) -> Translation:
    """Translates a model of which some layers reuse the selection of the last indexer before them.

    Args:
      fields: The config.json.
      defaults: Defaults of its keys.
      shared: Whether each layer reuses a selection.
      interleaved: Whether the indexer rotates adjacent features.
    """

    def take(key: str) -> Any:
        return fields.take(key, defaults[key])

    fields.ignore("head_dim", "qk_head_dim", "mlp_bias", "pretraining_tp", "num_nextn_predict_layers", "ep_size")
    width, depth = take("hidden_size"), len(shared)
    read_layer_types(fields, ["indexed_attention"] * depth, allowed=("indexed_attention",))
    layer_norm = NormConfig(kind="rms", eps=take("rms_norm_eps"))
    mixer = _read_attention(fields, take, interleaved)
    activation = fields.choose("hidden_act", ACTIVATIONS, "silu")
    mlp = MlpConfig(kind="gated", width=take("intermediate_size"), activation=activation)
    experts, types = _read_experts(fields, take, activation), read_mlp_types(fields, depth, dense=3)

    def layer(mlp_type: str, reuses: bool) -> tuple[str, LayerConfig]:
        part = mlp if mlp_type == "dense" else experts
        if not reuses or mixer.indexer is None:
            return mlp_type, pre_norm_layer(mixer, part, layer_norm)
        reusing = dataclasses.replace(mixer, indexer=dataclasses.replace(mixer.indexer, shared=True))
        return f"{mlp_type}_shared", pre_norm_layer(reusing, part, layer_norm)

    tied = fields.take("tie_word_embeddings", False)
    layers = [layer(*types_of) for types_of in zip(types, shared, strict=True)]
    model = build_model(fields, width, layers, layer_norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i, (name, reuses) in enumerate(zip(types, shared, strict=True)):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [*tensors.pre_norms(source, target), *latent_tensors(f"{source}.self_attn", f"{target}.mixer", mixer)]
        if not reuses:
            maps += _indexer_tensors(f"{source}.self_attn.indexer", f"{target}.mixer.indexer")
        if name == "dense":
            maps += tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp")
        else:
            maps += routed_experts_tensors(f"{source}.mlp", f"{target}.mlp", experts)
    return Translation(model, maps, unused=tensors.tied_head(tied))


def _read_attention(fields: Fields, take: Callable[[str], Any], interleaved: bool) -> LatentConfig:
    config = LatentConfig(
        pattern="causal",
        heads=take("num_attention_heads"),
        query_rank=take("q_lora_rank"),
        kv_rank=fields.take("kv_lora_rank", 512),
        nope_width=take("qk_nope_head_dim"),
        rope_width=fields.take("qk_rope_head_dim", 64),
        value_width=take("v_head_dim"),
        rope=dataclasses.replace(read_rope(fields), interleaved=True),
        norm_eps=LATENT_NORM_EPS,
        impl="auto",
        bias=fields.take("attention_bias", False),
        indexer=IndexerConfig(
            heads=take("index_n_heads"),
            width=fields.take("index_head_dim", 128),
            top_k=fields.take("index_topk", 2048),
            interleaved=interleaved,
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
    return yarn_growth(float(rope["factor"]), float(mscale)) ** 2


def _read_experts(fields: Fields, take: Callable[[str], Any], activation: str) -> ExpertsConfig:
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
        groups=take("n_group"),
        top_groups=take("topk_group"),
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
