"""`attend` under the transformations of JAX, at every length and by every implementation in plain JAX."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.ops import IMPLEMENTATIONS, attend, attend_cached, linear_scan, selective_scan
from sparsejax.ops.experts import dispatch, multiply, sort_by_expert
from sparsejax.ops.reference import attend_reference
from sparsejax.patterns import PatternError, parse
from tests.devices import simulate
from tests.messages import rejects
from tests.ops.test_attend import SUPPORT_ALL, Case, attend_by, counts_of, draw_inputs
from tests.tolerances import assert_close

PLAIN = pytest.mark.parametrize("impl", sorted(SUPPORT_ALL))
KERNELS = [member.name for member in IMPLEMENTATIONS if member.verified_on is not None]
CASE = Case("causal & (window(20) | sink(2))", 70, 70, (2, 1), softcap=3.0, sink=True, alibi=True, dtype="float64")
ARRAYS = ("q", "k", "v", "sink")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def gradients(case, inputs, at):
    """Gradients of the float64 reference by array, for the arrays `at`."""
    options = {"softcap": case.softcap, "sink_logits": at["sink"], "alibi_slopes": np.asarray(case.slopes)}
    arrays, cotangents = (at[name] for name in "qkv"), (inputs.d_out, inputs.d_lse)
    result = attend_reference(*arrays, counts_of(case, inputs), *cotangents, **options)
    return {name: getattr(result, name) for name in ARRAYS}


def make_loss(impl, case, inputs):
    """A function of q, k, v and sink whose gradients are those of the reference."""

    def loss(q, k, v, sink):
        options = {"sink_logits": sink, "softcap": case.softcap, "alibi_slopes": case.slopes}
        out, lse = attend(q, k, v, case.pattern, impl=impl, return_lse=True, **options)
        return (out * inputs.d_out).sum() + (lse * inputs.d_lse).sum()

    return loss


@pytest.mark.usefixtures("float64")
@PLAIN
def test_forward_mode_and_second_derivatives(impl):
    inputs = draw_inputs(CASE, batch=1, width=4)
    at = {name: getattr(inputs, name) for name in ARRAYS}
    random = np.random.default_rng(0)
    direction = {name: random.standard_normal(array.shape) for name, array in at.items()}
    loss, primals, tangents = make_loss(impl, CASE, inputs), tuple(at.values()), tuple(direction.values())
    gradient = jax.grad(loss, argnums=range(4))
    step = 1e-5
    high, low = (
        gradients(CASE, inputs, {name: array + sign * step * direction[name] for name, array in at.items()})
        for sign in (1, -1)
    )
    expected = {name: (high[name] - low[name]) / (2 * step) for name in ARRAYS}  # the Hessian times the direction
    slope = sum((direction[name] * array).sum() for name, array in gradients(CASE, inputs, at).items())

    @jax.jit
    def differentiate(primals, tangents):
        forward = jax.jvp(loss, primals, tangents)[1]
        over_reverse = jax.jvp(gradient, primals, tangents)[1]
        over_forward = jax.grad(lambda *x: jax.jvp(loss, x, tangents)[1], argnums=range(4))(*primals)
        twice_reverse = jax.vjp(gradient, *primals)[1](tangents)
        return forward, over_reverse, over_forward, twice_reverse

    forward, *products = differentiate(primals, tangents)
    np.testing.assert_allclose(forward, slope, rtol=1e-12)
    for product in products:
        for name, actual in zip(ARRAYS, product, strict=True):
            np.testing.assert_allclose(actual, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("impl", KERNELS)
def test_forward_mode_of_a_kernel_is_refused_by_name(monkeypatch, impl):
    plain = next(member for member in IMPLEMENTATIONS if member.name == "gather")
    kernel = plain._replace(name=impl, verified_on=frozenset())
    monkeypatch.setattr("sparsejax.ops.attention.IMPLEMENTATIONS", (kernel,))
    q = jnp.ones((1, 9, 1, 4))
    loss = lambda q: attend(q, q, q, "causal", impl=impl).sum()  # noqa: E731
    assert jnp.isfinite(jax.grad(loss)(q)).all()
    for wrap in (lambda function: function, jax.jit):
        with rejects(TypeError, impl):
            wrap(lambda q: jax.jvp(loss, (q,), (q,)))(q)


@pytest.mark.usefixtures("float64")
def test_forward_mode_of_other_operations():
    """The directional derivative is the product with the gradient of reverse mode."""
    random = np.random.default_rng(0)
    x, decay = random.standard_normal((2, 70, 3)), -random.random((2, 70, 3))
    layout = sort_by_expert(jnp.asarray(random.integers(0, 3, (40, 2))), 3, tile=8)
    tokens, weights = random.standard_normal((40, 5)), random.standard_normal((3, 5, 4))
    functions = {
        "linear_scan": (lambda x, decay: linear_scan(x, decay)[0], (x, decay)),
        "selective_scan": (
            lambda x, dt: selective_scan(x, dt, -jnp.ones((3, 2)), x[..., :2], x[..., :2])[0],
            (x, -decay),
        ),
        "experts": (lambda x, w: multiply(dispatch(x, layout), w, layout, "loop"), (tokens, weights)),
    }
    for name, (function, arrays) in functions.items():
        loss = lambda *x, function=function: jnp.sin(function(*x)).sum()  # noqa: E731
        tangents = tuple(random.standard_normal(a.shape) for a in arrays)
        forward = jax.jit(lambda *x, loss=loss, tangents=tangents: jax.jvp(loss, x, tangents)[1])(*arrays)
        reverse = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arrays)
        slope = sum((gradient * tangent).sum() for gradient, tangent in zip(reverse, tangents, strict=True))
        np.testing.assert_allclose(forward, slope, rtol=1e-10, err_msg=name)


# NaN


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("array", ["k", "v"])
@pytest.mark.parametrize("impl", [*sorted(SUPPORT_ALL), pytest.param("tpu", marks=pytest.mark.nightly)])
def test_a_key_that_is_not_finite_affects_only_queries_that_attend_to_it(impl, array, value):
    case = Case("causal & window(30)", 130, 130, (2, 1), sink=True)
    inputs = draw_inputs(case)
    bad = 50
    reads = counts_of(case, inputs)[0, 0, :, bad] > 0
    arrays = {name: getattr(inputs, name).copy() for name in "qkv"}
    arrays[array][0, bad, 0, 1] = value

    def outputs(q, k, v):
        out, lse = attend_by(impl, q, k, v, parse(case.pattern), sink_logits=jnp.asarray(inputs.sink), return_lse=True)
        clean = ~reads[:, None]
        return (jnp.where(clean[..., None], out, 0) * inputs.d_out).sum(), (out, lse)

    run = jax.jit(jax.value_and_grad(outputs, argnums=(0, 1, 2), has_aux=True))
    (_, (out, lse)), grads = run(*arrays.values())
    (_, (expected, expected_lse)), expected_grads = run(*inputs[:3])
    assert np.isnan(out[0, reads]).all()
    assert np.isnan(lse[0, reads]).all() or impl not in SUPPORT_ALL
    np.testing.assert_array_equal(out[0, ~reads], expected[0, ~reads])
    np.testing.assert_array_equal(out[1], expected[1])
    np.testing.assert_array_equal(lse[0, ~reads], expected_lse[0, ~reads])
    for name, actual, wanted in zip("qkv", grads, expected_grads, strict=True):
        assert_close(name, actual, wanted, "float32")


@PLAIN
def test_keys_that_nobody_attends_to_may_be_nan(impl):
    case = Case("full", 70, 70, (2, 1), segments="pair")
    inputs = draw_inputs(case)
    padding = np.zeros((2, 70), int)
    padding[:, 60:] = 1
    segments = jnp.asarray(padding), jnp.asarray(np.where(padding, 2, 0))
    k, v = (np.where(padding[..., None, None], np.float32(np.nan), x) for x in inputs[1:3])
    q = np.where(padding[..., None, None], np.float32(np.nan), inputs.q)
    run = lambda q, k, v: attend(q, k, v, "full", impl=impl, segment_ids=segments)  # noqa: E731
    expected, backward = jax.vjp(run, *map(jnp.asarray, inputs[:3]))
    out, backward_nan = jax.vjp(run, *map(jnp.asarray, (q, k, v)))
    np.testing.assert_array_equal(out, expected)
    for actual, wanted in zip(
        backward_nan(jnp.asarray(inputs.d_out)), backward(jnp.asarray(inputs.d_out)), strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)


# Dtypes and arguments


@PLAIN
@pytest.mark.parametrize("low", ["q", "k", "v", "kv"])
def test_mixed_dtypes_have_the_precision_of_the_widest(impl, low):
    case = Case("causal", 70, 70, (2, 1))
    inputs = draw_inputs(case)
    arrays = {name: jnp.asarray(getattr(inputs, name)) for name in "qkv"}
    arrays = {name: x.astype(jnp.bfloat16) if name in low else x for name, x in arrays.items()}
    out = attend(**arrays, pattern="causal", impl=impl)
    assert out.dtype == arrays["q"].dtype
    wide = [np.asarray(x, np.float64) for x in arrays.values()]
    expected = attend_reference(*wide, counts_of(case, inputs), inputs.d_out, inputs.d_lse)
    assert_close("out", out, expected.out, str(out.dtype))


def short(pattern="causal", t=5, s=9, **options):
    return attend(jnp.ones((1, t, 2, 4)), jnp.ones((1, s, 1, 4)), jnp.ones((1, s, 1, 4)), pattern, **options)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("pattern", ["causal", "window(2, 2)", "chunk(4)", "per_head(full, causal)", "globals([2])"])
def test_fewer_queries_than_keys_require_an_offset(pattern):
    with rejects(InputError, "q_offset"):
        short(pattern)
    assert short(pattern, q_offset=4).shape == (1, 5, 2, 4)


@pytest.mark.parametrize("pattern", ["full", "sink(3)", "fixed(4, 1)", "global_keys([2, -1])"])
def test_patterns_without_positions_of_queries_require_no_offset(pattern):
    np.testing.assert_array_equal(short(pattern), short(pattern, q_offset=4))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("offset", [-1, 2**31, 1.0, True, np.zeros(2, int)], ids=str)
def test_invalid_offsets(offset):
    with rejects(InputError, "q_offset"):
        short(q_offset=offset)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "pattern", [None, np.ones((5, 5), bool), jnp.ones((5, 5)), ("causal",), 3, [[1]]], ids=lambda x: type(x).__name__
)
def test_patterns_are_patterns_or_text(pattern):
    with rejects(InputError, "pattern"):
        short(pattern, 5, 5)


def test_a_pattern_may_be_text():
    np.testing.assert_array_equal(short("causal", 5, 5), short(parse("causal"), 5, 5))
    with rejects(PatternError, "causl"):
        short("causl", 5, 5)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("limit", [0.0, -1.0, np.inf, np.nan])
def test_a_softcap_is_positive(limit):
    with rejects(InputError, "softcap"):
        short("full", 5, 5, softcap=limit)
    with rejects(InputError, "softcap"):
        q, k, at = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 5, 4)), jnp.arange(5)[None]
        attend_cached(q, k, k, parse("causal"), at[:, :1], at, 5, scale=1.0, softcap=limit)


# `jax.shard_map`

IN_SHARD_MAP = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from sparsejax.ops import attend
from tests.layers.test_mixers import MIXED, build, make_x

mesh, errors = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,)), {}

def compare(name, function, arrays, specs):
    def differentiate(*arrays):
        y, backward = jax.vjp(function, *arrays)
        return y, backward(jnp.sin(y))

    sharded = jax.shard_map(differentiate, mesh=mesh, in_specs=specs, out_specs=(P("batch"), specs))
    actual, expected = (jax.tree.leaves(jax.jit(run)(*arrays)) for run in (sharded, differentiate))
    errors[name] = max(
        float(abs(a - b).max() / max(1, float(abs(b).max()))) for a, b in zip(actual, expected, strict=True)
    )

random = np.random.default_rng(0)
q, k = (jnp.asarray(random.standard_normal((2, 130, 2, 4)), jnp.float32) for _ in range(2))
sink = jnp.asarray(random.standard_normal(2), jnp.float32)
for impl in ("dense", "gather", "segment", "auto"):
    def attend_shared(q, k, sink, impl=impl):
        k = jnp.broadcast_to(k, q.shape)
        return attend(q, k, k, "causal & window(20)", impl=impl, sink_logits=sink)

    compare(impl, attend_shared, (q, k, sink), (P("batch"), P("batch"), P()))
    compare(impl + ", one sequence of keys", attend_shared, (q, k[:1], sink), (P("batch"), P(), P()))
for kind, configs in MIXED.items():
    for name, config in list(configs.items())[-1:] if kind != "attention" else ():
        graph, state = nnx.split(build(config))
        leaves, tree = jax.tree.flatten(state)

        def mix(x, *leaves, graph=graph, tree=tree):
            return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x)

        compare(name, mix, (jnp.asarray(make_x(70)), *leaves), (P("batch"), *[P()] * len(leaves)))
print(json.dumps(errors))
"""


def test_shard_map_with_its_default_checks():
    command, root = [sys.executable, "-c", IN_SHARD_MAP], Path(__file__).parents[2]
    run = subprocess.run(command, env=os.environ | simulate(2), cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) > 14
    assert {name: error for name, error in errors.items() if not error < 3e-5} == {}
