"""How much temporary memory does a training step take, by rematerialization and by the chunk of the loss?

A windowed model of four layers of width 512 with a vocabulary of 131,072, at 32,768 tokens in float32. The step is
compiled for one device and never run; the bytes are those of XLA's memory analysis, and the FLOPs those of its cost
analysis, which counts the body of a loop once. Before: the logits of all tokens at once, and layers that keep every
activation.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Save, print_rows
from sparsejax import sharding
from sparsejax.config import ModelConfig, OptimizerConfig, ShardingConfig, TrainConfig, build
from sparsejax.layers.remat import POLICIES
from sparsejax.model import Functional
from sparsejax.runs import build_optimizer, build_schedule, state_shapes
from sparsejax.train import build_step

LAYERS, WIDTH, VOCAB, LENGTH, WINDOW = 4, 512, 131_072, 32_768, 512
MIB = 2**20


def build_model(remat: str, vocab: int, **changes: Any) -> ModelConfig:
    """A model of windowed layers."""
    norm = {"kind": "rms", "eps": 1e-6}
    heads = {"heads": WIDTH // 64, "kv_heads": WIDTH // 64, "head_width": 64, "qk_norm": None, "impl": "gather"}
    mixer = {"kind": "attention", "pattern": f"causal & window({WINDOW - 1})", "rope": {"base": 1e4}} | heads
    layer = {"mixer": mixer, "norm": norm, "norm_position": "pre", "remat": remat}
    layer["mlp"] = {"kind": "gated", "width": 3 * WIDTH, "activation": "silu"}
    section = {"vocab": vocab, "width": WIDTH, "schedule": f"{LAYERS}x(local)", "layers": {"local": layer}}
    return build(ModelConfig, section | {"norm": norm, "tied": True, "dtype": "float32", "scan": True} | changes)


def measure(config: ModelConfig, length: int, loss_chunk: int | None, **optimizer: Any) -> dict[str, Any]:
    """Compiles a training step of one sequence; returns its bytes and FLOPs."""
    train = TrainConfig(
        steps=100, batch=1, accumulate=1, seed=0, log_every=10, bad_loss="stop", spike=0.0, loss_chunk=loss_chunk
    )
    rates = {"learning_rate": 1e-3, "final_rate": 0.1, "warmup": 10, "weight_decay": 0.1, "clip": 1.0}
    settings = OptimizerConfig(**rates | optimizer)
    model, mesh = Functional(config), sharding.make_mesh(ShardingConfig(data=-1, fsdp=1, tensor=1))
    adam = build_optimizer(settings, train.steps, decay=model.decay, axes=model.axes)
    step = build_step(model, adam, build_schedule(settings, train.steps), train, mesh)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens, "weights": jax.ShapeDtypeStruct((1, length), jnp.float32)}
    state = state_shapes(model, adam, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch).compile()
    analysis = compiled.memory_analysis()
    return {
        "temporary MiB": round(analysis.temp_size_in_bytes / MIB, 1),
        "state MiB": round(sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.optimizer)) / MIB, 1),
        "parameters MiB": round(
            sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.parameters)) / MIB, 1
        ),
        "GFLOP": round(compiled.cost_analysis()["flops"] / 1e9, 1),
        "compile s": round(time.perf_counter() - start, 1),
    }


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures the whole logits with the most and the least memory of layers, and all policies with chunks."""
    vocab, length = (1024, 2048) if options.quick else (VOCAB, LENGTH)
    cases: list[tuple[str, int | None, str]] = [("none", length, "float32"), ("full", length, "float32")]
    cases += [*((policy, None, "float32") for policy in POLICIES), ("attention", None, "bfloat16")]
    rows = []
    for remat, chunk, dtype in cases:
        row = {"remat": remat, "loss_chunk": chunk or "default", "parameters and momenta": dtype}
        rows.append(row | measure(build_model(remat, vocab, param_dtype=dtype), length, chunk, moments=dtype))
    shape = {"layers": LAYERS, "width": WIDTH, "vocab": vocab, "tokens": length, "window": WINDOW}
    print_rows(rows, ", ".join(f"{name} {value}" for name, value in shape.items()))
    save(shape | {"rows": rows})
