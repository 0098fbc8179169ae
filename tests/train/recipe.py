"""The smallest run that has everything: a scanned period, a state space, sparse and full attention."""

from ml_collections import ConfigDict


def norm():
    return {"kind": "rms", "eps": 1e-6}


def layer(mixer):
    mlp = {"kind": "plain", "width": 16, "activation": "silu"}
    return {"mixer": mixer, "mlp": mlp, "norm": norm(), "norm_position": "pre", "remat": "none"}


def attention(pattern):
    return {
        "kind": "attention",
        "pattern": pattern,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 8,
        "rope": {"base": 10_000.0},
        "qk_norm": None,
        "impl": "auto",
    }


EXPERTS = {"kind": "experts", "experts": 6, "top_k": 2, "width": 8, "activation": "silu", "router": "sigmoid"}


def get_config():
    ssm = {"kind": "mamba", "inner": 16, "state": 4, "conv": 3, "dt_rank": 2, "dt_min": 1e-3, "dt_max": 0.1}
    return ConfigDict(
        {
            "model": {
                "vocab": 256,
                "width": 16,
                "schedule": "2x(ssm local) full",
                "layers": {
                    "ssm": layer(ssm),
                    "local": layer(attention("causal & (window(5) | sink(2))")),
                    "full": layer(attention("causal")),
                },
                "norm": norm(),
                "tied": True,
                "dtype": "float32",
                "scan": True,
            },
            "data": {"task": "text", "files": "", "length": 32},
            "train": {
                "steps": 20,
                "batch": 4,
                "accumulate": 1,
                "seed": 0,
                "log_every": 1,
                "bad_loss": "stop",
                "spike": 0.0,
                "check": False,
            },
            "optimizer": {
                "learning_rate": 1e-2,
                "final_rate": 0.1,
                "warmup": 4,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip": 1.0,
            },
            "checkpoint": {"every": 5, "keep_last": 2, "keep_best": 1},
            "sharding": {"data": -1, "fsdp": 1, "tensor": 1},
            "eval": {"every": 5, "batch": 4, "batches": 2, "sample": 0},
        }
    )
