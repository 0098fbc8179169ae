"""The TPU kernels, beyond what the suite of all implementations covers."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparsejax.errors import InputError
from sparsejax.ops import attend
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.kernels import tpu
from sparsejax.patterns import parse
from tests.devices import simulate
from tests.messages import check_message, rejects
from tests.ops.test_attend import CHOICES, Case, check
from tests.tolerances import assert_close


def make_call(
    pattern: str, t: int, heads: tuple[int, int] = (2, 1), width: int = 8, b: int = 2, dtype="float32"
) -> AttentionCall:
    random = np.random.default_rng(t)
    q, k, v = (jnp.asarray(random.standard_normal((b, t, n, width)), dtype) for n in (heads[0], *heads[1:] * 2))
    return AttentionCall(q, k, v, parse(pattern), width**-0.5, None, None, None, True)


def differentiate(run, call: AttentionCall) -> tuple[jax.Array, ...]:
    """Output, log-sum-exp, and the gradients of q, k and v for a loss in which all entries differ in weight."""

    def loss(q, k, v):
        out, lse = run(dataclasses.replace(call, q=q, k=k, v=v))
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.sin(out).sum() + (finite**2).sum(), (out, lse)

    (_, results), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(call.q, call.k, call.v)
    return *results, *gradients


def attend_densely(call: AttentionCall, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention under a dense mask, broadcast to [b, h, t, s]."""
    group_size = call.q.shape[2] // call.k.shape[2]
    k, v = (jnp.repeat(x, group_size, axis=2) for x in (call.k, call.v))
    scores = jnp.einsum("bthd,bshd->bhts", call.q, k, precision="highest") * call.scale
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1, where=jnp.broadcast_to(mask, scores.shape))
    p = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    return jnp.einsum("bhts,bshd->bthd", p, v, precision="highest"), jnp.moveaxis(lse, 1, 2)


def assert_agrees(run, call: AttentionCall, mask=None):
    """Compares values and gradients with dense attention in float32."""
    mask = jnp.asarray(call.pattern.dense(call.q.shape[1]) if mask is None else mask)
    compute = jax.jit(lambda q, k, v: differentiate(run, dataclasses.replace(call, q=q, k=k, v=v)))
    wide = dataclasses.replace(call, **{name: getattr(call, name).astype(jnp.float32) for name in "qkv"})
    expected = differentiate(lambda call: attend_densely(call, mask), wide)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), compute(call.q, call.k, call.v), expected, strict=True):
        assert_close(name, x, y, "float32" if name == "lse" else str(call.q.dtype))


def test_lists_too_long_for_scalar_memory_are_split(monkeypatch):
    call = make_call("causal", 391, (2, 2))
    whole = differentiate(tpu.run, call)
    monkeypatch.setattr(tpu, "BACKEND", dataclasses.replace(tpu.BACKEND, max_entries=3))
    for x, y in zip(differentiate(tpu.run, call), whole, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("case", "tile"),
    [
        (Case("causal", 300, 300, (4, 2), choice=(2, 2, 20)), (128, 128)),
        *(
            pytest.param(case, tile, marks=pytest.mark.nightly)
            for case in CHOICES
            for tile in ((128, 128), (128, 256), (256, 512))
        ),
    ],
    ids=str,
)
def test_chosen_blocks(monkeypatch, case, tile):
    monkeypatch.setattr(tpu, "choose_tile", lambda *_: tile)
    check("tpu", case)


def test_lists_of_choices_too_long_for_scalar_memory_are_split(monkeypatch):
    monkeypatch.setattr(tpu, "choose_tile", lambda *_: (128, 128))
    monkeypatch.setattr(tpu, "BACKEND", dataclasses.replace(tpu.BACKEND, max_entries=12))
    check("tpu", Case("causal", 391, 391, (2, 1), choice=(1, 1, 64)))


@pytest.mark.parametrize("tile", [(128, 256), pytest.param((256, 128), marks=pytest.mark.nightly)])
def test_tiles_that_are_not_square(tile):
    assert_agrees(lambda call: tpu.run(call, tile), make_call("causal & window(100) | globals(2)", 300))


def test_no_races(monkeypatch):
    pallas_call = pl.pallas_call
    detect = {"interpret": pltpu.InterpretParams(detect_races=True)}
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **options: pallas_call(*args, **options | detect))
    assert_agrees(tpu.run, make_call("causal & window(100)", 256))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


SHARDED = """
import re, sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sparsejax.ops import Selection, attend
from sparsejax.ops.blocks import make_blocks
from sparsejax.ops.sequence import HEAD_AXIS
from sparsejax.patterns import parse

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", HEAD_AXIS), axis_types=(AxisType.Auto,) * 3)
sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, HEAD_AXIS, None))
random = np.random.default_rng(0)
arrays = [random.standard_normal((4, 130, heads, 8), np.float32) for heads in (4, 2, 2, 4)]
ids = np.sort(random.integers(0, 3, (4, 130)))
sink = random.standard_normal(4, np.float32)
pattern, selection = parse("causal & window(20)"), None
if sys.argv[1] == "choice":
    groups = np.sort(random.random((4, 2, 130, 7)).argsort(axis=-1)[..., :3])
    selection = Selection(jnp.asarray(groups), make_blocks(130, 20, jnp.asarray(ids)))

def gradients(impl, sink, q, k, v, do):
    options = dict(impl=impl, interpret=impl == "tpu", segment_ids=ids, selection=selection)
    out, backward = jax.vjp(lambda sink, *x: attend(*x, pattern, sink_logits=sink, **options), sink, q, k, v)
    return out, *backward(do)

expected = jax.jit(lambda *x: gradients("dense", *x))(sink, *arrays)
with jax.set_mesh(mesh):
    shardings = [NamedSharding(mesh, PartitionSpec(HEAD_AXIS)), *[sharding] * 4]
    step = jax.jit(lambda *x: gradients("tpu", *x), in_shardings=shardings)
    compiled = step.lower(sink, *arrays).compile()
    results = compiled(*(jax.device_put(x, y) for x, y in zip((sink, *arrays), shardings)))
gathers = re.findall(r"all-gather[a-z-]*\\(", compiled.as_text())
assert not gathers, gathers
for x, y in zip(results, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("keys", ["pattern", pytest.param("choice", marks=pytest.mark.nightly)])
def test_each_device_of_a_mesh_computes_its_sequences_and_heads(keys):
    run = subprocess.run([sys.executable, "-c", SHARDED, keys], env=os.environ | simulate(8), capture_output=True)
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
def test_tiles_are_as_large_as_pays(pattern, t, tile):
    assert tpu.choose_tile(parse(pattern), t, t) == (tile, tile)


def test_too_many_tiles_for_a_list_entry():
    q = jax.ShapeDtypeStruct((1, 2**21, 16, 8), jnp.float32)
    call = make_call("window(3)", 9)
    with rejects(InputError, "tile"):
        jax.eval_shape(lambda q: tpu.run(dataclasses.replace(call, q=q, k=q[:, :, :1], v=q[:, :, :1]), (128, 128)), q)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"interpret": False}, id="device"),
        pytest.param({"alibi_slopes": jnp.zeros(2)}, id="alibi"),
        pytest.param({"pattern": parse("multiset(causal, sink(2))")}, id="multiplicity"),
        pytest.param({"q": jnp.zeros((2, 9, 2, 300)), "k": jnp.zeros((2, 9, 1, 300))}, id="width"),
    ],
)
def test_unsupported_calls(change):
    call = make_call("causal", 9)
    assert tpu.unsupported_reason(call) is None
    check_message(tpu.unsupported_reason(dataclasses.replace(call, **change)))


def test_auto_selects_the_kernels_if_they_serve_the_call():
    call = make_call("causal", 100)
    out = attend(call.q, call.k, call.v, call.pattern, interpret=True)
    assert_close("out", out, attend(call.q, call.k, call.v, call.pattern, impl="dense"), "float32")
