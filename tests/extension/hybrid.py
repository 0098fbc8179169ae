"""A tiny hybrid of the user's mixer and attention under the user's pattern."""

import ema  # noqa: F401
import older  # noqa: F401
from ml_collections import ConfigDict


def get_config():
    norm = {"kind": "rms", "eps": 1e-6}
    mlp = {"kind": "gated", "width": 16, "activation": "silu"}
    layer = {"mlp": mlp, "norm": norm, "norm_position": "pre", "remat": "none"}
    sizes = {"heads": 2, "kv_heads": 2, "head_width": 4, "rope": None, "qk_norm": None, "impl": "auto"}
    attention = {"kind": "attention", "pattern": "older_or_near(4)"} | sizes
    layers = {"ema": layer | {"mixer": {"kind": "ema", "inner": 8}}, "old": layer | {"mixer": attention}}
    return ConfigDict(
        {
            "model": {
                "vocab": 8,
                "width": 8,
                "schedule": "ema old",
                "layers": layers,
                "norm": norm,
                "tied": True,
                "dtype": "float32",
                "scan": True,
            },
            "data": {
                "task": "induction_heads",
                "files": "",
                "length": 16,
                "probe": {"length": 16, "vocab": 8},
            },
            "train": {
                "steps": 4,
                "batch": 4,
                "accumulate": 1,
                "seed": 0,
                "log_every": 2,
                "bad_loss": "stop",
                "spike": 0.0,
                "check": False,
            },
            "optimizer": {
                "learning_rate": 3e-3,
                "final_rate": 0.1,
                "warmup": 1,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip": 1.0,
            },
            "checkpoint": {"every": 2, "keep_last": 1, "keep_best": 0},
            "sharding": {"data": -1, "fsdp": 1, "tensor": 1},
            "eval": {"every": 2, "batch": 4, "batches": 1, "final": 1, "sample": 0},
        }
    )
