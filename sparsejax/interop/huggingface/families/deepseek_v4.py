"""DeepSeek-V4: a window of tokens beside compressed entries, hyper-connections, and experts in every layer.

The tensors have the names of the released checkpoints. Folders that transformers writes have other ones in part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sparsejax.interop.huggingface import tensors
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.rope import build_rope, read_rope_parameters
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linears, norm, transposed
from sparsejax.interop.huggingface.translation import SILU, Translation, build_model, pre_norm_layer, read_layer_types
from sparsejax.layers import (
    CompressedConfig,
    CompressionConfig,
    EntryIndexerConfig,
    ExpertsConfig,
    HyperConfig,
    NormConfig,
    RopeConfig,
)

# Entries of `layer_types` -> names in a schedule, and the ratio of released files, which have `compress_ratios`.
KINDS = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
RATIOS = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
LEGACY_RATIOS = {
    "compressed_sparse_attention": "compress_rate_csa",
    "heavily_compressed_attention": "compress_rate_hca",
}
EXPERTS = ("w1", "w3", "w2")  # gate, up and down


def translate(fields: Fields) -> Translation:
    """Translates a `DeepseekV4Config`."""
    fields.ignore("num_nextn_predict_layers", "expert_dtype", "pretraining_tp", "ep_size", "mlp_bias")
    width, depth = fields.take("hidden_size", 4096), fields.take("num_hidden_layers", 43)
    layer_norm = NormConfig(kind="rms", eps=fields.take("rms_norm_eps", 1e-6))
    mixers = _read_mixers(fields, layer_norm.eps)
    experts = _read_experts(fields)
    kinds, routers = _read_kinds(fields, depth), _read_routers(fields, depth)
    layers = []
    for kind, router in zip(kinds, routers, strict=True):
        name = KINDS[kind] + ("_hash" if router == "hash_moe" else "")
        layers.append((name, pre_norm_layer(mixers[kind], experts[router], layer_norm)))
    hyper = HyperConfig(
        kind="sinkhorn",
        streams=fields.take("hc_mult", 4),
        eps=layer_norm.eps,
        steps=fields.take("hc_sinkhorn_iters", 20),
        floor=fields.take("hc_eps", 1e-6),
    )
    tied = fields.take("tie_word_embeddings", False)
    model = build_model(fields, width, layers, layer_norm, tied=tied, hyper=hyper)
    maps = [
        identity("embed.weight", "embedding.tokens"),
        *norm("norm", "norm"),
        *_hyper_tensors("hc_head_", "hyper"),
        *([] if tied else [transposed("head.weight", "head.weight")]),
    ]
    for i, (kind, router) in enumerate(zip(kinds, routers, strict=True)):
        maps += _layer_tensors(f"layers.{i}", mixers[kind], experts[router])
    older = ((r"^layers\.", "model.layers."), (r"\.attn\.kv_norm\.", ".attn.norm."))
    return Translation(model, maps, unused=(r"mtp\..*", *((r"head\.weight",) if tied else ())), older_names=older)


def _read_kinds(fields: Fields, depth: int) -> list[str]:
    """Reads the type of each layer, from the ratios in older files; some list a ratio per layer of prediction too."""
    ratios = fields.take("compress_ratios", None, list)
    default = ["heavily_compressed_attention"] * min(depth, 2)
    default += [("heavily_compressed_attention", "compressed_sparse_attention")[i % 2] for i in range(depth - 2)]
    if ratios is not None:
        by_ratio = {0: "sliding_attention"} | {ratio: kind for kind, ratio in RATIOS.items()}
        for ratio in ratios:
            if ratio not in by_ratio:
                raise fields.unsupported("compress_ratios", ratio, by_ratio)
        default = [by_ratio[ratio] for ratio in ratios[:depth]]
    return read_layer_types(fields, default, allowed=tuple(KINDS))


def _read_routers(fields: Fields, depth: int) -> list[str]:
    hashed = min(fields.take("num_hash_layers", 3), depth)
    default = ["hash_moe"] * hashed + ["moe"] * (depth - hashed)
    return read_layer_types(fields, default, "mlp_layer_types", allowed=("hash_moe", "moe"))


def _read_mixers(fields: Fields, eps: float) -> dict[str, CompressedConfig]:
    """The mixer by type of layer."""
    fields.require("num_key_value_heads", 1)
    fields.require("attention_bias", False)
    width = fields.take("head_dim", 512)
    rope_width, main, compressed = _read_ropes(fields, width)
    plain = CompressedConfig(
        heads=fields.take("num_attention_heads", 64),
        head_width=width,
        query_rank=fields.take("q_lora_rank", 1024),
        window=fields.take("sliding_window", 128),
        rope_width=rope_width,
        rope=main,
        groups=fields.take("o_groups", 8),
        out_rank=fields.take("o_lora_rank", 1024),
        norm_eps=eps,
        impl="auto",
    )
    indexer = EntryIndexerConfig(
        heads=fields.take("index_n_heads", 64),
        width=fields.take("index_head_dim", 128),
        top_k=fields.take("index_topk", 512),
    )
    ratios, (sparse, heavy) = _read_ratios(fields), RATIOS
    return {
        "sliding_attention": plain,
        sparse: dataclasses.replace(
            plain, rope=compressed, compression=CompressionConfig(ratio=ratios[sparse], overlap=True, indexer=indexer)
        ),
        heavy: dataclasses.replace(plain, rope=compressed, compression=CompressionConfig(ratio=ratios[heavy])),
    }


def _read_ratios(fields: Fields) -> dict[str, int]:
    """Reads the tokens per window by type of layer."""
    ratios = fields.take("compress_rates", None, dict) or {}
    for kind, ratio in ratios.items():
        if kind not in RATIOS or type(ratio) is not int:
            raise fields.error("compress_rates", f"expected integers for {' and '.join(RATIOS)}")
    older = {kind: fields.take(key, None, int) for kind, key in LEGACY_RATIOS.items()}
    return RATIOS | ratios | {kind: ratio for kind, ratio in older.items() if ratio is not None}


def _read_ropes(fields: Fields, width: int) -> tuple[int, RopeConfig, RopeConfig]:
    """Reads the number of rotated features, and the positions of layers without and with entries."""
    parameters, older = read_rope_parameters(fields), fields.take("qk_rope_head_dim", None, int)
    fraction = fields.take("partial_rotary_factor", None, float)
    bases = fields.take("rope_theta", 10_000.0), fields.take("compress_rope_theta", 160_000.0)
    if "main" in parameters and "compress" in parameters:
        main, compressed = (dict(parameters[name]) for name in ("main", "compress"))
        # The factor stands in both places, and in older files it is the share of `qk_rope_head_dim`.
        fraction = compressed.get("partial_rotary_factor", fraction)
    else:
        main, compressed = {}, {"attention_factor": 1.0} | parameters
        if (compressed.get("rope_type") or compressed.get("type")) != "yarn":
            compressed.pop("attention_factor")
    if fraction is None:
        fraction = 0.125 if older is None else older / width
    ropes = []
    for values, base in ((main, bases[0]), (compressed, bases[1])):
        values = {"rope_theta": base} | {key: x for key, x in values.items() if key != "partial_rotary_factor"}
        ropes.append(dataclasses.replace(build_rope(fields, values), interleaved=True))
    return int(width * fraction), *ropes


def _read_experts(fields: Fields) -> dict[str, ExpertsConfig]:
    """The experts by type of router."""
    fields.require("topk_method", "noaux_tc")
    fields.require("norm_topk_prob", True)
    inner = fields.take("moe_intermediate_size", 2048)
    scores = {name: name for name in ("sqrtsoftplus", "softmax", "sigmoid")}
    plain = ExpertsConfig(
        experts=fields.take("n_routed_experts", 256),
        top_k=fields.take("num_experts_per_tok", 6),
        width=inner,
        activation=fields.choose("hidden_act", SILU, "silu"),
        router=fields.choose("scoring_func", scores, "sqrtsoftplus"),
        renormalize=True,
        scale=float(fields.take("routed_scaling_factor", 1.5)),
        selection_bias=True,
        shared_width=inner * fields.take("n_shared_experts", 1),
        limit=fields.take("swiglu_limit", 10.0),
        limit_offset=0.0,
    )
    return {"moe": plain, "hash_moe": dataclasses.replace(plain, selection_bias=False, by_token=True)}


def _layer_tensors(source: str, mixer: CompressedConfig, experts: ExpertsConfig) -> list[TensorMap]:
    target = f"layers.{source.rpartition('.')[2]}"
    attention, maps = (
        f"{source}.attn",
        [
            *norm(f"{source}.attn_norm", f"{target}.mixer_residual.before"),
            *norm(f"{source}.ffn_norm", f"{target}.mlp_residual.before"),
            *_hyper_tensors(f"{source}.hc_attn_", f"{target}.mixer_hyper"),
            *_hyper_tensors(f"{source}.hc_ffn_", f"{target}.mlp_hyper"),
            *_attention_tensors(f"{source}.attn", f"{target}.mixer", mixer),
            *_experts_tensors(f"{source}.ffn", f"{target}.mlp", experts),
        ],
    )
    if mixer.compression is not None:
        maps += _compressor_tensors(f"{attention}.compressor", f"{target}.mixer.compressor")
    if mixer.indexer is not None:
        names = {"wq_b": "queries", "weights_proj": "weights"}
        maps += linears(f"{attention}.indexer", f"{target}.mixer.indexer", names)
        maps += _compressor_tensors(f"{attention}.indexer.compressor", f"{target}.mixer.indexer.compressor")
    return maps


def _hyper_tensors(source: str, target: str) -> list[TensorMap]:
    plain = [identity(f"{source}{name}", f"{target}.{name}") for name in ("base", "scale")]
    return [transposed(f"{source}fn", f"{target}.weights.weight"), *plain]


def _attention_tensors(source: str, target: str, config: CompressedConfig) -> list[TensorMap]:
    names = {"wq_a": "query_latent", "wq_b": "query", "wkv": "key", "wo_b": "out"}
    shape = config.groups, config.out_rank, config.heads // config.groups * config.head_width

    def load(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [arrays[0].reshape(shape).swapaxes(1, 2)]

    def store(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [arrays[0].swapaxes(1, 2).reshape(-1, shape[2])]

    return [
        *linears(source, target, names),
        *norm(f"{source}.q_norm", f"{target}.query_norm"),
        *norm(f"{source}.kv_norm", f"{target}.key_norm"),
        identity(f"{source}.attn_sink", f"{target}.sinks"),
        TensorMap((f"{source}.wo_a.weight",), (f"{target}.group",), load, store),
    ]


def _compressor_tensors(source: str, target: str) -> list[TensorMap]:
    return [
        *linears(source, target, {"wkv": "values", "wgate": "gates"}),
        *norm(f"{source}.norm", f"{target}.norm"),
        identity(f"{source}.ape", f"{target}.bias"),
    ]


def _experts_tensors(source: str, target: str, config: ExpertsConfig) -> list[TensorMap]:
    names: dict[str, Any] = dict(zip(EXPERTS, ("gate", "up", "down"), strict=True))
    chosen = tensors.table(f"{source}.gate.tid2eid", f"{target}.table")
    return [
        transposed(f"{source}.gate.weight", f"{target}.router.weight"),
        chosen if config.by_token else identity(f"{source}.gate.bias", f"{target}.selection_bias"),
        *tensors.experts(f"{source}.experts", target, config.experts, EXPERTS),
        *(linears(f"{source}.shared_experts", f"{target}.shared", names) if config.shared_width else []),
    ]
