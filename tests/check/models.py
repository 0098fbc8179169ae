"""Small models, one per kind of mixer."""

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
MIXERS["parallel"] = {
    "kind": "parallel",
    "branches": {
        "attention": {"mixer": MIXERS["window"], "scale_in": 0.5, "scale_out": 2.0},
        "ssm": {"mixer": MIXERS["mamba"], "scale_in": 2.0},
    },
}


def build(mixer: str | dict[str, Any], schedule: str = "3x(mix)", **changes: Any) -> ModelConfig:
    """A model of layers with one mixer, and no feed-forward part."""
    mixer = MIXERS[mixer] if isinstance(mixer, str) else mixer
    layer = {"mixer": mixer, "mlp": None, "norm": NORM, "norm_position": "pre", "remat": False}
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
