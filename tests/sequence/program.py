"""Compares a sharded sequence with one device; run with eight host devices as `python -m tests.sequence.program TEST`.

Each test reads its cases as JSON from standard input and prints one JSON object per case.
"""

import collections
import dataclasses
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import config as configs
from sparsejax import ops, patterns, sharding
from sparsejax.config.build import build
from sparsejax.model import Functional
from sparsejax.ops import attend
from sparsejax.traffic import count_traffic
from sparsejax.train.step import build_gradient

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "f64": 8, "s64": 8}
COLLECTIVES = "all-gather|all-reduce|collective-permute|reduce-scatter|all-to-all"


def make_mesh(data, sequence):
    count = data * sequence
    return sharding._make_mesh((data, 1, sequence, 1), devices=jax.devices()[:count])


def received(text, shards):
    """Bytes that a device receives by collective, from the text of a compiled program."""
    factors = {
        "all-gather": (shards - 1) / shards,
        "reduce-scatter": shards - 1,
        "all-reduce": 2 * (shards - 1) / shards,
    }
    sums, text = collections.Counter(), re.sub(r"/\*.*?\*/", "", text)
    for result, kind in re.findall(rf"= (\(?[^=]*?) ({COLLECTIVES})(?:-start)?\(", text):
        for dtype, shape in re.findall(rf"({'|'.join(BYTES)})\[([\d,]*)\]", result):
            size = BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            sums[kind] += size * factors.get(kind, 1)
    return dict(sums)


def difference(expected, actual):
    """Largest difference, relative to the largest entry of the same array."""
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)


def attention(pattern, length, shards, packed=False, dtype="float64", heads=(4, 2), options=()):
    """Values and gradients of `attend`."""
    draw = np.random.default_rng(length)
    b, (h, g), d, value = 2, heads, 8, 4
    shapes = [(b, length, h, d), (b, length, g, d), (b, length, g, value)]
    arrays = [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]
    sinks = jnp.asarray(draw.normal(size=h), dtype)
    segments = jnp.asarray(np.cumsum(draw.random((b, length)) < 0.03, axis=1)) if packed else None
    weights = [jnp.asarray(draw.normal(size=shape), dtype) for shape in ((b, length, h, value), (b, length, h))]
    parsed = patterns.parse(pattern)

    def total(q, k, v, sinks):
        out, lse = attend(
            q,
            k,
            v,
            parsed,
            sink_logits=sinks,
            segment_ids=segments,
            return_lse=True,
            softcap=dict(options).get("softcap"),
        )
        return (out * weights[0]).sum() + jnp.where(jnp.isfinite(lse), lse * weights[1], 0).sum()

    differentiate = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))
    expected = differentiate(*arrays, sinks)
    mesh = make_mesh(1, shards)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in arrays]
        actual = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(*placed, sinks)
    return {"difference": difference(jax.device_get(expected), jax.device_get(actual))}


def build_batch(model, length, rows, packed):
    draw = np.random.default_rng(0)
    batch = {name: draw.integers(0, model.vocab, (rows, length)).astype(np.int32) for name in ("inputs", "targets")}
    batch["weights"] = (draw.random((rows, length)) < 0.9).astype(np.float32)
    if packed:
        starts = draw.random((rows, length)) < 0.03
        starts[:, 0] = True
        first = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        batch["segments"] = np.cumsum(starts, axis=1).astype(np.int32)
        batch["positions"] = (np.arange(length) - first).astype(np.int32)
    return batch


def model(config, length, shards, packed=True, dtype="float64", overrides=None, dropout=0.0):
    """The loss and the gradient of a training step of a config."""
    settings = build(configs.Config, configs.load(config, overrides or {}).to_dict())
    described = dataclasses.replace(settings.model, dtype="float32", dropout=dropout)
    object.__setattr__(described, "dtype", dtype)
    functional = Functional(described)
    parameters = jax.tree.map(lambda x: x.astype(dtype), functional.init(jax.random.key(0)))
    batch = build_batch(described, length, 2, packed)
    frozen = jax.tree.map(lambda _: False, functional.shapes)
    key = jax.random.key(1) if dropout else None
    results = []
    for mesh in (make_mesh(1, 1), make_mesh(8 // shards if shards > 4 else 2, shards)):
        gradient = jax.jit(build_gradient(functional, settings.train, mesh, frozen, None))
        with jax.set_mesh(mesh):
            placed = {name: jax.device_put(x, sharding.batch_sharding(mesh)) for name, x in batch.items()}
            replicated = jax.device_put(parameters, sharding.replicated(mesh))
            objective, gradients = jax.device_get(gradient(replicated, placed, key, None))
        results.append((objective.total, gradients))
    (expected, gradients), (total, others) = results
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True)
    worst = max(float(np.abs(a - b).max() / largest) for a, b in pairs)
    return {"loss": float(abs(total - expected)), "gradient": worst}


def compile_layers(config, length, shards, overrides=None):
    """The model of a config, its compiled gradient on shards and that program's text."""
    settings = build(configs.Config, configs.load(config, overrides or {}).to_dict())
    described = dataclasses.replace(settings.model, scan=False, dtype="float32")
    functional = Functional(described)
    mesh = make_mesh(1, shards)

    def total(parameters, tokens):
        return functional.bind(parameters).forward(tokens, constrain=sharding.constrain_batch(mesh)).features.sum()

    with jax.set_mesh(mesh):
        placed = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=placed[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[1]), functional.shapes)
        return described, jax.jit(jax.grad(total)).lower(shapes, tokens).compile()


def traffic(config, length, shards, overrides=None):
    """Bytes by collective in the compiled program and in the account; those of parameters are only all-reduced."""
    described, compiled = compile_layers(config, length, shards, overrides)
    counted = collections.Counter()
    for layer in count_traffic(described, length, shards):
        counted.update(layer.received)
    return {"hlo": received(compiled.as_text(), shards), "account": dict(counted)}


def memory(config, tokens, shards, overrides=None):
    """Bytes of temporary arrays per device, with `tokens` tokens per device."""
    _, compiled = compile_layers(config, tokens * shards, shards, overrides)
    return {"bytes": compiled.memory_analysis().temp_size_in_bytes}


def recurrence(op, length, shards, packed, initial):
    """Values and gradients of a recurrence, and its collectives."""
    draw = np.random.default_rng(length)
    b, h, g, n, p = 2, 4, 2, 3, 5

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape))

    def positive(*shape):
        return jnp.asarray(draw.random(shape))

    starts = jnp.asarray(draw.random((b, length)) < 0.04) if packed else None
    B, C = normal(b, length, g, n), normal(b, length, g, n)
    keys = B / jnp.linalg.norm(B, axis=-1, keepdims=True)
    arguments, state, run = {
        "selective_scan": (
            (normal(b, length, p), positive(b, length, p), -positive(p, n), B[:, :, 0], C[:, :, 0]),
            normal(b, p, n),
            ops.selective_scan,
        ),
        "ssd": (
            (normal(b, length, h, p), positive(b, length, h), -positive(h), B, C),
            normal(b, h, p, n),
            ops.ssd,
        ),
        "delta": (
            (C, keys, normal(b, length, h, p), -positive(b, length, h), positive(b, length, h)),
            normal(b, h, n, p),
            ops.delta_rule,
        ),
        "kimi_delta": (
            (C, keys, normal(b, length, h, p), -positive(b, length, h, n), positive(b, length, h)),
            normal(b, h, n, p),
            ops.delta_rule,
        ),
        "linear_scan": ((normal(b, length, p), -positive(b, length, p)), normal(b, p), ops.linear_scan),
        "conv": (
            (normal(b, length, p), normal(4, p)),
            None,
            lambda x, taps, state, starts, chunk: (ops.causal_conv(x, taps, starts), jnp.zeros(())),
        ),
    }[op]
    state = state if initial else None
    y, last = run(*arguments, state=state, starts=starts, chunk=8)
    weights = normal(*y.shape), normal(*last.shape)

    def total(arguments, state):
        y, last = run(*arguments, state=state, starts=starts, chunk=8)
        return (y * weights[0]).sum() + (last * weights[1]).sum()

    expected = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(arguments, state)
    with jax.set_mesh(make_mesh(1, shards)):
        compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(arguments, state).compile()
        actual = compiled(arguments, state)
    return {
        "difference": difference(jax.device_get(expected), jax.device_get(actual)),
        "collectives": received(compiled.as_text(), shards),
    }


TESTS = {"attention": attention, "recurrence": recurrence, "model": model, "traffic": traffic, "memory": memory}

if __name__ == "__main__":
    cases = json.load(sys.stdin)
    for case in cases:
        jax.config.update(
            "jax_enable_x64",
            case.get("dtype", "float64") == "float64" and sys.argv[1] in ("attention", "model", "recurrence"),
        )
        print(json.dumps(TESTS[sys.argv[1]](**case)), flush=True)
