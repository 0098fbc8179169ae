"""MiniMax-M3, the text model: blocks of keys that an index head per key/value head selects, and clamped experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import read_rope
from sparsejax.interop.huggingface.tensors import (
    TensorMap,
    identity,
    split_last,
    split_linear,
    transposed,
)
from sparsejax.interop.huggingface.translation import (
    SILU,
    Translation,
    build_model,
    pre_norm_layer,
    read_attention,
    read_layer_types,
    translate_text,
)
from sparsejax.layers import ExpertsConfig, IndexerConfig, MlpConfig, NormConfig

TYPES = {"full_attention": "full", "minimax_m3_sparse": "sparse"}  # entries of `layer_types` -> names in a schedule
# Keys of `sparse_attention_config` in released files, by those of transformers.
SPARSE_KEYS = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}
IMAGES = r"vision_tower\..*", r"multi_modal_projector\..*", r"patch_merge_mlp\..*"


def translate_multimodal(fields: Fields) -> Translation:
    """Translates the text model of a released file, a `MiniMaxM3VLConfig`, whose images are not supported."""
    fields.ignore(
        "image_token_index", "video_token_index", "image_seq_length", "image_grid_pinpoints", "process_image_mode",
        "image_token_compression_config", "image_token_compression_method", "spatial_merge_size", "temporal_patch_size",
        "multimodal_projector_bias", "projector_hidden_act", "projector_hidden_size", "vision_feature_layer",
        "vision_feature_select_strategy", "num_reward_heads",
    )  # fmt: skip
    return translate_text(fields, _translate_released, IMAGES)


def _translate_released(fields: Fields) -> Translation:
    """Translates the `text_config` of a released file."""
    flat = Fields(_flatten(fields), fields.path)
    fields.ignore(*fields.values)
    translation = translate(flat, released=True)
    flat.finish()
    return translation


def _flatten(fields: Fields) -> dict[str, Any]:
    """The `text_config` of a released file with the keys of transformers."""
    values = {key: value for key, value in fields.values.items() if key not in ("moe_layer_freq", "hidden_act")}
    values["hidden_act"] = fields.choose("hidden_act", {"swigluoai": "silu", "silu": "silu"}, "swigluoai")
    if (routed := fields.take("moe_layer_freq", None, list)) is not None:
        values["mlp_layer_types"] = ["sparse" if flag else "dense" for flag in routed]
    if (section := fields.take("sparse_attention_config", None, dict)) is None:
        return values
    del values["sparse_attention_config"]
    sparse = Fields(section, f"{fields.path}: sparse_attention_config")
    selects = sparse.take("sparse_attention_freq", kind=list)
    values["layer_types"] = ["minimax_m3_sparse" if flag else "full_attention" for flag in selects]
    values |= {key: sparse.take(older) for key, older in SPARSE_KEYS.items()}
    sparse.require("use_sparse_attention", True)
    sparse.require("sparse_score_type", "max")
    sparse.require("sparse_init_block", 0)
    sparse.require("sparse_disable_index_value", selects)  # no layer that selects has values of its index
    sparse.finish()
    return values


def translate(fields: Fields, released: bool = False) -> Translation:
    """Translates a `MiniMaxM3VLTextConfig` with the tensor names of transformers, or those of released files."""
    # The reference reads the fraction of `rope_parameters`.
    fields.ignore("rotary_dim", "num_mtp_modules", "num_nextn_predict_layers")
    for key, value in {
        "use_gemma_norm": True, "use_qk_norm": True, "qk_norm_type": "per_head", "attention_output_gate": False,
        "scoring_func": "sigmoid", "swiglu_beta": 1.0,
    }.items():  # fmt: skip
        fields.require(key, value)
    width, depth = fields.take("hidden_size", 6144), fields.take("num_hidden_layers", 60)
    types = read_layer_types(fields, ["full_attention"] * depth, allowed=tuple(TYPES))
    routed = read_layer_types(fields, ["sparse"] * depth, "mlp_layer_types", allowed=("dense", "sparse"))
    norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6), offset=True)
    rope = read_rope(fields, base=5_000_000.0, fraction=0.5)
    attention = read_attention(fields, width, rope, heads=64, kv_heads=4, head_width=128, qk_norm=norm)
    sparse = dataclasses.replace(attention, indexer=_read_indexer(fields, norm))
    mixers = {"full_attention": attention, "minimax_m3_sparse": sparse}
    experts, mlp = _read_feed_forward(fields)
    names = [TYPES[name] + ("_experts" if part == "sparse" else "") for name, part in zip(types, routed, strict=True)]
    layers = [
        (name, pre_norm_layer(mixers[layer_type], experts if part == "sparse" else mlp, norm))
        for name, layer_type, part in zip(names, types, routed, strict=True)
    ]
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, norm, tied=tied)
    maps = tensors.embedding_and_head(tied)
    for i, (layer_type, part) in enumerate(zip(types, routed, strict=True)):
        source, target = f"model.layers.{i}", f"layers.{i}"
        maps += [
            *tensors.pre_norms(source, target),
            *tensors.attention(f"{source}.self_attn", f"{target}.mixer"),
            *tensors.qk_norms(f"{source}.self_attn", f"{target}.mixer"),
        ]
        if layer_type == "minimax_m3_sparse":
            prefix = "index_" if released else "indexer."
            maps += _indexer_tensors(f"{source}.self_attn.{prefix}", f"{target}.mixer.indexer")
        if part == "sparse" and released:
            maps += _released_experts_tensors(f"{source}.block_sparse_moe", f"{target}.mlp", experts)
        elif part == "sparse":
            maps += _experts_tensors(f"{source}.mlp", f"{target}.mlp", experts, width)
        elif released:
            maps += tensors.gated_mlp(f"{source}.mlp", f"{target}.mlp")
        else:
            maps += _mlp_tensors(f"{source}.mlp", f"{target}.mlp", mlp.width)
    return Translation(model, maps, unused=tensors.tied_head(tied))


def _read_indexer(fields: Fields, norm: NormConfig) -> IndexerConfig:
    return IndexerConfig(
        heads=fields.take("index_n_heads", 4),
        width=fields.take("index_head_dim", 128),
        top_k=fields.take("index_topk_blocks", 16),
        block=fields.take("index_block_size", 128),
        scope="kv_head",
        local=fields.take("index_local_blocks", 1),
        weights=False,
        relu=False,
        norm=norm,
    )


def _read_feed_forward(fields: Fields) -> tuple[ExpertsConfig, MlpConfig]:
    """Reads the experts, and the MLP of the other layers."""
    activation = fields.choose("hidden_act", SILU, "silu")
    limit, alpha = float(fields.take("swiglu_limit", 7.0)), float(fields.take("swiglu_alpha", 1.702))
    fields.require("use_routing_bias", True)
    experts = ExpertsConfig(
        experts=fields.take("num_local_experts", 128),
        top_k=fields.take("num_experts_per_tok", 4),
        width=fields.take("intermediate_size", 3072),
        activation=activation,
        router="sigmoid",
        renormalize=True,
        scale=float(fields.take("routed_scaling_factor", 2.0)),
        selection_bias=True,
        shared_width=fields.take("shared_intermediate_size", 3072) * fields.take("n_shared_experts", 1),
        limit=limit,
        alpha=alpha,
    )
    width = fields.take("dense_intermediate_size", 12_288)
    return experts, MlpConfig(kind="gated", width=width, activation=activation, limit=limit, alpha=alpha)


def _indexer_tensors(prefix: str, target: str) -> list[TensorMap]:
    """The indexer, whose tensors have names with this prefix."""
    names = {"q": ("queries", "query_norm"), "k": ("keys", "key_norm")}
    return [
        tensor
        for short, (linear, norm) in names.items()
        for tensor in (
            *tensors.linear(f"{prefix}{short}_proj", f"{target}.{linear}"),
            *tensors.norm(f"{prefix}{short}_norm", f"{target}.{norm}"),
        )
    ]


def _mlp_tensors(source: str, target: str, width: int) -> list[TensorMap]:
    """An MLP whose gate and values are stored together."""
    return [
        *split_linear(f"{source}.gate_up_proj", [f"{target}.gate", f"{target}.up"], [width] * 2),
        transposed(f"{source}.down_proj.weight", f"{target}.down.weight"),
    ]


def _experts_tensors(source: str, target: str, config: ExpertsConfig, width: int) -> list[TensorMap]:
    """Experts whose gates and values are stored together, in one tensor for all experts."""
    experts = f"{source}.experts"
    return [
        transposed(f"{source}.gate.weight", f"{target}.router.weight"),
        identity(f"{source}.gate.e_score_correction_bias", f"{target}.selection_bias"),
        split_last(f"{experts}.gate_up_proj", [f"{target}.gate", f"{target}.up"], [config.width] * 2, swapped=True),
        split_last(f"{experts}.down_proj", [f"{target}.down"], [width], swapped=True),
        *_mlp_tensors(f"{source}.shared_experts", f"{target}.shared", config.shared_width),
    ]


def _released_experts_tensors(source: str, target: str, config: ExpertsConfig) -> list[TensorMap]:
    """Experts whose gates and values are stored apart, expert by expert."""
    return [
        *tensors.mixtral_experts(source, target, config.experts),
        identity(f"{source}.e_score_correction_bias", f"{target}.selection_bias"),
        *tensors.gated_mlp(f"{source}.shared_experts", f"{target}.shared"),
    ]
