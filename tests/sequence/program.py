"""Compares a sharded sequence with one device; run with eight host devices as `python -m tests.sequence.program TEST`.

Each test reads its cases as JSON from standard input and prints one JSON object per case.
"""

import collections
import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax import config as configs
from sparsejax import ops, patterns, sharding
from sparsejax.config.build import build
from sparsejax.model import Functional
from sparsejax.ops import attend
from sparsejax.ops.sequence import HEAD_AXIS
from sparsejax.plan.compiled import count_received
from sparsejax.traffic import count_traffic
from sparsejax.train.step import build_gradient
from tests.check import models
from tests.sequence.random_models import draw_case


def make_mesh(data=1, fsdp=1, sequence=1, tensor=1):
    sizes = data, fsdp, sequence, tensor
    return sharding.arrange_devices(sizes, devices=jax.devices()[: math.prod(sizes)])


def shard_heads(mesh, heads):
    """The sharding of arrays [b, t, heads, d]; one head is on every device."""
    return NamedSharding(mesh, PartitionSpec(*sharding.batch_sharding(mesh).spec, HEAD_AXIS if heads > 1 else None))


def difference(expected, actual):
    """Largest difference, relative to the largest entry of the same array."""
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)


def attention(
    pattern, length, shards, packed=False, dtype="float64", heads=(4, 2), sinks=True, alibi=False, sizes=None, **options
):
    """Values and gradients of `attend`, and the collectives of the latter; `sizes`: of the axes of the mesh."""
    draw = np.random.default_rng(length)
    b, (h, g), d, value = 2, heads, 8, 4
    shapes = [(b, length, h, d), (b, length, g, d), (b, length, g, value)]
    arrays = [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]
    sinks = jnp.asarray(draw.normal(size=h), dtype) if sinks else None
    slopes = jnp.asarray(draw.random(h), dtype) if alibi else None
    segments = jnp.asarray(np.cumsum(draw.random((b, length)) < 0.03, axis=1)) if packed else None
    weights = [jnp.asarray(draw.normal(size=shape), dtype) for shape in ((b, length, h, value), (b, length, h))]
    parsed = patterns.parse(pattern)

    def total(q, k, v, sinks):
        keys = {"sink_logits": sinks, "alibi_slopes": slopes, "segment_ids": segments}
        out, lse = attend(q, k, v, parsed, return_lse=True, **keys, **options)
        return (out * weights[0]).sum() + jnp.where(jnp.isfinite(lse), lse * weights[1], 0).sum()

    argnums = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    expected = jax.jit(jax.value_and_grad(total, argnums))(*arrays, sinks)
    mesh = make_mesh(*(sizes or (1, 1, shards, 1)))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, shard_heads(mesh, x.shape[2])) for x in arrays]
        compiled = jax.jit(jax.value_and_grad(total, argnums)).lower(*placed, sinks).compile()
        actual = compiled(*placed, sinks)
    return {
        "difference": difference(jax.device_get(expected), jax.device_get(actual)),
        "collectives": dict(count_received(compiled.as_text(), shards)),
    }


def selected(kind, sizes, heads, impl="auto", length=600, **options):
    """Values and gradients of attention to keys that queries choose, and the collectives of the latter."""
    draw = np.random.default_rng(length)
    b, (h, g), d = 4, heads, 8
    q, k, v = (jnp.asarray(draw.normal(size=(b, length, n, d))) for n in (h, g, g))
    segments = jnp.asarray(np.cumsum(draw.random((b, length)) < 0.01, axis=1))
    weights, causal = jnp.asarray(draw.normal(size=q.shape)), patterns.parse("causal")

    def total(q, k, v):
        chosen = {
            "blocks": lambda: ops.moba(q, k, 16, 3, causal, segments=(segments, segments)),
            "tokens": lambda: ops.top_tokens(q, k, 24, causal, segments=(segments, segments), scope="kv_head"),
        }[kind]()
        out = attend(q, k, v, causal, selection=chosen, segment_ids=segments, impl=impl, **options)
        return (out * weights).sum()

    expected = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placements = tuple(shard_heads(mesh, x.shape[2]) for x in (q, k, v))
        placed = jax.device_put((q, k, v), placements)
        step = jax.jit(jax.value_and_grad(total, (0, 1, 2)), out_shardings=(None, placements))
        compiled = step.lower(*placed).compile()
        actual = compiled(*placed)
    return {
        "difference": difference(jax.device_get(expected), jax.device_get(actual)),
        "collectives": dict(count_received(compiled.as_text(), mesh.size)),
    }


def build_batch(model, length, rows, packed, seed=0):
    draw = np.random.default_rng(seed)
    batch = {name: draw.integers(0, model.vocab, (rows, length)).astype(np.int32) for name in ("inputs", "targets")}
    batch["weights"] = (draw.random((rows, length)) < 0.9).astype(np.float32)
    if packed:
        starts = draw.random((rows, length)) < max(0.03, 2 / length)
        starts[:, 0] = True
        first = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        batch["segments"] = np.cumsum(starts, axis=1).astype(np.int32)
        batch["positions"] = (np.arange(length) - first).astype(np.int32)
        padding = np.arange(length) >= length - draw.integers(0, max(length // 3, 1), (rows, 1))
        batch["segments"][padding], batch["weights"][padding] = 0, 0
    return batch


def model(config, length, shards, packed=True, dtype="float64", overrides=None, dropout=0.0):
    """The loss and the gradient of a training step of a config."""
    settings = build(configs.Config, configs.load(config, overrides or {}).to_dict())
    mesh = (8 // shards if shards > 4 else 2, 1, shards, 1)
    described = dataclasses.replace(settings.model, dropout=dropout)
    return differentiate(described, length, mesh, packed, dtype, train=settings.train)


def mixer(mixer, length, shards):
    """The loss and the gradient of a model of one kind of mixer, see `tests.check.models`."""
    described = models.build(mixer, "2x(mix)", allow_leaks=True)
    return differentiate(described, length, (1, 1, shards, 1), True, "float64", length)


def random_model(seed):
    """The loss and the gradient of a random model, see `tests.sequence.random_models`."""
    case = draw_case(seed)
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    case.model.check(case.length)
    case.model.check_sharded(case.length, case.mesh[2])
    described = dataclasses.replace(case.model, dropout=case.dropout)
    result = differentiate(described, case.length, case.mesh, case.packed, case.dtype, seed)
    return result | {"dtype": case.dtype, "case": str(case)}


def differentiate(described, length, mesh, packed, dtype, seed=0, train=None):
    """Differences between a mesh and one device: of the loss, and of the gradient relative to its largest entry."""
    described = dataclasses.replace(described, dtype="float32")
    object.__setattr__(described, "dtype", dtype)
    functional = Functional(described)
    draw = np.random.default_rng(seed)
    parameters = jax.tree.map(  # no parameter is zero
        lambda x: np.asarray(x, dtype) + 0.1 * draw.normal(size=x.shape).astype(dtype),
        functional.init(jax.random.key(seed)),
    )
    batch = build_batch(described, length, 2, packed, seed)
    frozen = jax.tree.map(lambda _: False, functional.shapes)
    key = jax.random.key(1) if described.dropout else None
    train = train or configs.check(configs.load("preset:quickstart")).train
    results = []
    for sizes in ((1, 1, 1, 1), mesh):
        devices = make_mesh(*sizes)
        gradient = jax.jit(build_gradient(functional, train, devices, frozen, None))
        with jax.set_mesh(devices):
            placed = {name: jax.device_put(x, sharding.batch_sharding(devices)) for name, x in batch.items()}
            shardings = sharding.parameter_shardings(devices, functional.shapes, functional.axes)
            objective, gradients = jax.device_get(gradient(jax.device_put(parameters, shardings), placed, key, None))
        results.append((objective.total, gradients))
    (expected, gradients), (total, others) = results
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True)
    worst = max(float(np.abs(a - b).max() / largest) for a, b in pairs)
    return {"loss": float(abs(total - expected) / abs(expected)), "gradient": worst}


def compile_layers(config, length, shards, overrides=None):
    """The model of a config, and its compiled gradient on shards."""
    settings = build(configs.Config, configs.load(config, overrides or {}).to_dict())
    described = dataclasses.replace(settings.model, scan=False, dtype="float32")
    return described, compile_model(described, length, make_mesh(sequence=shards), 1)


def compile_model(described, length, mesh, rows):
    """The compiled gradient of a model whose parameters are on every device."""
    functional = Functional(described)

    def total(parameters, tokens):
        return functional.bind(parameters).forward(tokens, constrain=sharding.constrain_batch(mesh)).features.sum()

    with jax.set_mesh(mesh):
        placed = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=placed[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[1]), functional.shapes)
        return jax.jit(jax.grad(total), out_shardings=placed[1]).lower(shapes, tokens).compile()


def rows(mixer, length):
    """The collectives of a model of one kind of mixer on four devices that share the rows of a batch."""
    compiled = compile_model(models.build(mixer, "mix", allow_leaks=True), length, make_mesh(data=4), 8)
    return {"collectives": dict(count_received(compiled.as_text(), 4))}


def traffic(config, length, shards, overrides=None):
    """Bytes by collective in the compiled program and in the account; those of parameters are only all-reduced."""
    described, compiled = compile_layers(config, length, shards, overrides)
    counted = collections.Counter()
    for layer in count_traffic(described, length, shards):
        counted.update(layer.received)
    return {"hlo": dict(count_received(compiled.as_text(), shards)), "account": dict(counted)}


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
    y, last = jax.eval_shape(lambda arguments: run(*arguments, state=state, starts=starts, chunk=8), arguments)
    weights = normal(*y.shape), normal(*last.shape)

    def total(arguments, state):
        y, last = run(*arguments, state=state, starts=starts, chunk=8)
        return (y * weights[0]).sum() + (last * weights[1]).sum()

    expected = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(arguments, state)
    with jax.set_mesh(make_mesh(sequence=shards)):
        compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(arguments, state).compile()
        actual = compiled(arguments, state)
    return {
        "difference": difference(jax.device_get(expected), jax.device_get(actual)),
        "collectives": dict(count_received(compiled.as_text(), shards)),
    }


TESTS = {
    "attention": attention,
    "selected": selected,
    "recurrence": recurrence,
    "model": model,
    "mixer": mixer,
    "random_model": random_model,
    "traffic": traffic,
    "memory": memory,
    "rows": rows,
}

if __name__ == "__main__":
    cases = json.load(sys.stdin)
    for case in cases:
        jax.config.update(
            "jax_enable_x64",
            case.get("dtype", "float64") == "float64"
            and sys.argv[1] in ("attention", "mixer", "model", "recurrence", "selected"),
        )
        print(json.dumps(TESTS[sys.argv[1]](**case)), flush=True)
