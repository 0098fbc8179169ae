"""Small models, one per kind of mixer."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sparsejax import config
from sparsejax.config import ModelConfig

NORM = {"kind": "rms", "eps": 1e-6, "offset": False, "bias": False}
ATTENTION = {
    "kind": "attention",
    "heads": 2,
    "kv_heads": 1,
    "head_width": 8,
    "rope": {"base": 100.0},
    "qk_norm": None,
    "impl": "gather",
}
RANGE = {"dt_min": 0.05, "dt_max": 0.5}
MIXERS: dict[str, dict[str, Any]] = {
    "causal": ATTENTION | {"pattern": "causal"},
    "window": ATTENTION | {"pattern": "causal & window(6)"},
    "wide": ATTENTION | {"pattern": "causal & window(140)"},
    "chunk": ATTENTION | {"pattern": "causal & chunk(8)"},
    "pinned": ATTENTION | {"pattern": "causal & (window(5) | sink(2))", "sinks": True},
    "grouped": ATTENTION | {"pattern": "causal", "heads": 4, "kv_heads": 2},
    "moba": ATTENTION | {"pattern": "causal", "select": {"kind": "moba", "count": 2, "block": 16}},
    "infllm": ATTENTION
    | {"pattern": "causal", "heads": 4, "kv_heads": 2}
    | {"select": {"kind": "infllm", "count": 3, "block": 8, "window": 8, "stride": 4, "dense_below": 40}},
    "tiles": ATTENTION | {"pattern": "causal", "select": {"kind": "tiles", "count": 3, "block": 4}, "kv_heads": 2},
    "indexed": ATTENTION
    | {"pattern": "causal", "kv_heads": 2}
    | {"indexer": {"heads": 2, "width": 8, "top_k": 3, "block": 8, "scope": "kv_head", "weights": False, "local": 1}},
    "pooled": ATTENTION
    | {"pattern": "causal"}
    | {"indexer": {"heads": 2, "width": 8, "top_k": 3, "block": 4, "pool": "keys", "weights": False}},
    "routing": {"kind": "routing", "heads": 2, "kv_heads": 1, "head_width": 8, "clusters": 3, "members": 6}
    | {"rope": {"base": 100.0}},
    "nsa": {
        "kind": "nsa",
        "heads": 4,
        "kv_heads": 2,
        "head_width": 8,
        "rope": {"base": 100.0},
        "qk_norm": None,
        "impl": "gather",
        "compress_length": 8,
        "compress_stride": 4,
        "select_block": 8,
        "count": 4,
        "window": 8,
    },
    "compressed": {
        "kind": "compressed",
        "heads": 2,
        "head_width": 8,
        "query_rank": 8,
        "window": 6,
        "rope_width": 4,
        "rope": {"base": 100.0},
        "groups": 2,
        "out_rank": 4,
        "norm_eps": 1e-6,
        "impl": "gather",
        "compression": {"ratio": 4, "overlap": True, "indexer": {"heads": 2, "width": 8, "top_k": 8}},
    },
    "strict lsh": {"kind": "lsh", "heads": 2, "head_width": 8, "chunk": 4, "buckets": [4], "hashes": 2, "causal": True}
    | {"seed": 0, "strict": True},
    "conv": {"kind": "conv", "conv": 3},
    "mamba": {"kind": "mamba", "inner": 16, "state": 4, "conv": 3, "dt_rank": 2} | RANGE,
    "mamba2": {"kind": "mamba2", "heads": 2, "head_width": 8, "state": 4, "groups": 1, "conv": 3, "norm_eps": 1e-6}
    | {"chunk": 16}
    | RANGE,
    "lightning": {"kind": "lightning", "heads": 2, "head_width": 8, "chunk": 16},
    "delta": {"kind": "delta", "heads": 2, "key_heads": 1, "key_width": 8, "value_width": 8, "conv": 3}
    | {"norm_eps": 1e-6, "chunk": 16}
    | RANGE,
    "rglru": {"kind": "rglru", "inner": 16, "heads": 2, "conv": 3},
    "selected": {
        "kind": "latent",
        "pattern": "causal",
        "heads": 2,
        "query_rank": 8,
        "kv_rank": 8,
        "nope_width": 8,
        "rope_width": 4,
        "value_width": 8,
        "rope": {"base": 100.0, "interleaved": True},
        "norm_eps": 1e-6,
        "impl": "gather",
        "indexer": {"heads": 2, "width": 8, "top_k": 8},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {  # of mixers in `MIXERS`
    "alibi": ATTENTION | {"pattern": "causal", "rope": None, "alibi": True},
    "softcap": ATTENTION | {"pattern": "causal", "softcap": 1.0},
    "gate": ATTENTION | {"pattern": "causal", "gate": True},
    "relative": ATTENTION | {"pattern": "causal", "rope": None, "relative": 8},
    "edges": ATTENTION | {"pattern": "causal & window(6)", "impl": "segment"},
    "latent": MIXERS["selected"] | {"indexer": None},
    "lsh": {"kind": "lsh", "heads": 2, "head_width": 8, "chunk": 8, "buckets": [4], "hashes": 2, "causal": True}
    | {"seed": 0},
}
MIXERS["parallel"] = {
    "kind": "parallel",
    "branches": {
        "attention": {"mixer": MIXERS["window"], "scale_in": 0.5, "scale_out": 2.0},
        "ssm": {"mixer": MIXERS["mamba"], "scale_in": 2.0},
    },
}


EXPERTS = {"kind": "experts", "experts": 4, "top_k": 2, "width": 8, "activation": "silu"}
# A shared block, and its use by a layer.
BLOCK = {
    "mixer": {key: MIXERS["causal"][key] for key in MIXERS["causal"] if key != "kind"},
    "mlp": {"kind": "gated", "width": 16, "activation": "gelu"},
    "norm": NORM,
}
SIDE = {"shared": "block", "mixer_rank": 2, "mlp_rank": None}


def build(
    mixer: str | dict[str, Any], schedule: str = "3x(mix)", layer: Mapping[str, Any] = MappingProxyType({}), **changes
) -> ModelConfig:
    """A model of layers with one mixer, and no feed-forward part unless `layer` has one."""
    mixer = (MIXERS | VARIANTS)[mixer] if isinstance(mixer, str) else mixer
    layer = {"mixer": mixer, "mlp": None, "norm": NORM, "norm_position": "pre", "remat": "none"} | layer
    section = {
        "vocab": 32,
        "width": 16,
        "schedule": schedule,
        "layers": {"mix": layer},
        "norm": NORM,
        "tied": True,
        "dtype": "float32",
        "scan": True,
    }
    return config.build(ModelConfig, section | changes)
