"""What the kernels for TPUs have that the suite of all implementations does not ask for."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sparsejax.ops import attend
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.kernels import tpu
from sparsejax.patterns import parse
from tests.tolerances import assert_close


def make_call(pattern: str, t: int, heads: tuple[int, int] = (2, 1), interpret=True, width: int = 8) -> AttentionCall:
    random = np.random.default_rng(t)
    q, k, v = (jnp.asarray(random.standard_normal((2, t, n, width), np.float32)) for n in (heads[0], *heads[1:] * 2))
    return AttentionCall(q, k, v, parse(pattern), width**-0.5, None, None, None, interpret)


def differentiate(run, call: AttentionCall) -> tuple[jax.Array, ...]:
    """Output, log-sum-exp, and gradients for q, k and v of a sum that weighs all of them differently."""

    def forward(q, k, v):
        out, lse = run(dataclasses.replace(call, q=q, k=k, v=v))
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.sin(out).sum() + (finite**2).sum(), (out, lse)

    (_, results), gradients = jax.value_and_grad(forward, (0, 1, 2), has_aux=True)(call.q, call.k, call.v)
    return *results, *gradients


def attend_densely(call: AttentionCall, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Under any mask [b, h, t, s]."""
    share = call.q.shape[2] // call.k.shape[2]
    k, v = (jnp.repeat(x, share, axis=2) for x in (call.k, call.v))
    scores = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", call.q, k, precision="highest") * call.scale, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1, where=mask)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    return jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest"), jnp.moveaxis(lse, 1, 2)


def check_same(found, expected):
    for name, one, other in zip(("out", "lse", "q", "k", "v"), found, expected, strict=True):
        assert_close(name, one, other, "float32")


def test_lists_too_long_for_scalar_memory_are_cut(monkeypatch):
    call = make_call("causal", 391, (2, 2))
    whole = differentiate(tpu.run, call)
    monkeypatch.setattr(tpu, "BACKEND", dataclasses.replace(tpu.BACKEND, most=3))
    cut = differentiate(tpu.run, call)
    for one, other in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pattern", ["full", "causal"])
def test_tiles_that_the_data_select(pattern):
    call, rows = make_call(pattern, 300, (4, 2)), 3
    random = np.random.default_rng(0)
    chosen = random.permuted(np.broadcast_to(np.arange(rows), (2, 4, rows, rows)), axis=-1)[..., :2].copy()
    chosen[:, 1, 2] = -1
    picked = (chosen[..., None] == np.arange(rows)).any(axis=-2)
    mask = picked.repeat(128, axis=2).repeat(128, axis=3)[:, :, :300, :300] & call.pattern.dense(300)

    @jax.jit
    def compute(chosen):
        return differentiate(lambda call: tpu.run(call, (128, 128), chosen), call)

    check_same(compute(chosen), differentiate(lambda call: attend_densely(call, jnp.asarray(mask)), call))


@pytest.mark.parametrize("tile", [(128, 256), (256, 128)])
def test_tiles_that_are_not_square(tile):
    call = make_call("causal & window(100) | globals(2)", 300)
    mask = jnp.broadcast_to(jnp.asarray(call.pattern.dense(300)), (2, 2, 300, 300))
    found = differentiate(lambda call: tpu.run(call, tile), call)
    check_same(found, differentiate(lambda call: attend_densely(call, mask), call))


def test_no_races():
    call = make_call("causal & window(100)", 256, interpret=pltpu.InterpretParams(detect_races=True))
    mask = jnp.broadcast_to(jnp.asarray(call.pattern.dense(256)), (2, 2, 256, 256))
    check_same(differentiate(tpu.run, call), differentiate(lambda call: attend_densely(call, mask), call))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


SHARDED = """
import re, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sparsejax.ops import attend
from sparsejax.patterns import parse

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor", None))
random = np.random.default_rng(0)
arrays = [random.standard_normal((4, 130, heads, 8), np.float32) for heads in (4, 2, 2, 4)]
ids = np.sort(random.integers(0, 3, (4, 130)))
sink = random.standard_normal(4, np.float32)
pattern = parse("causal & window(20)")

def gradients(impl, sink, q, k, v, d_out):
    options = dict(impl=impl, interpret=impl == "tpu", segment_ids=ids)
    out, backward = jax.vjp(lambda sink, *x: attend(*x, pattern, sink_logits=sink, **options), sink, q, k, v)
    return out, *backward(d_out)

expected = jax.jit(lambda *x: gradients("dense", *x))(sink, *arrays)
with jax.set_mesh(mesh):
    shardings = [NamedSharding(mesh, PartitionSpec("tensor")), *[spread] * 4]
    step = jax.jit(lambda *x: gradients("tpu", *x), in_shardings=shardings)
    compiled = step.lower(sink, *arrays).compile()
    found = compiled(*(jax.device_put(x, place) for x, place in zip((sink, *arrays), shardings)))
moved = re.findall(r"all-gather[a-z-]*\\(", compiled.as_text())
assert not moved, moved
for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
"""


def test_each_device_of_a_mesh_computes_its_own_sequences_and_heads():
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run([sys.executable, "-c", SHARDED], env=os.environ | devices, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


@pytest.mark.parametrize(
    ("pattern", "t", "tile"),
    [
        ("causal", 100, 128),  # no larger than the sequence
        ("causal", 8192, 512),
        ("causal & window(1023)", 8192, 512),
        ("causal & window(60)", 8192, 256),
        ("chunk(128)", 8192, 256),
    ],
)
def test_tiles_as_large_as_pay(pattern, t, tile):
    assert tpu.choose_tile(parse(pattern), t, t) == (tile, tile)


def test_too_many_tiles_for_a_word():
    call = jax.eval_shape(lambda: jnp.zeros((1, 2**21, 16, 8)))
    with pytest.raises(ValueError, match=r"tpu: 16384 x 16384 tiles of \(128, 128\) do not fit into a word: larger"):
        jax.eval_shape(
            lambda q: tpu.run(
                AttentionCall(q, q[:, :, :1], q[:, :, :1], parse("window(3)"), 1.0, None, None, None, True), (128, 128)
            ),
            call,
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"interpret": False}, "it needs a TPU v5e or newer, or interpret=True; here is cpu"),
        ({"alibi_slopes": jnp.zeros(2)}, "no ALiBi"),
        ({"pattern": parse("multiset(causal, sink(2))")}, "no keys that count more than once"),
        ({"q": jnp.zeros((1, 9, 2, 300)), "k": jnp.zeros((1, 9, 1, 300))}, "heads of at most 256, got 300"),
    ],
)
def test_refusals(change, reason):
    assert tpu.unsupported_reason(make_call("causal", 9)) is None
    shape = {"v": jnp.zeros((1, 9, 1, 8))} if "q" in change else {}
    assert tpu.unsupported_reason(dataclasses.replace(make_call("causal", 9), **change, **shape)) == reason


def test_auto_takes_them_where_they_serve():
    call = make_call("causal", 100)
    found = attend(call.q, call.k, call.v, call.pattern, interpret=True)
    assert_close("out", found, attend(call.q, call.k, call.v, call.pattern, impl="dense"), "float32")
