"""Sequences in chunks against NumPy over the whole sequence."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.ops import delta_rule, linear_scan, selective_scan, ssd
from sparsejax.ops.chunks import broadcast_axis, scan_chunks
from tests.messages import rejects

pytestmark = pytest.mark.quick

CHUNK = 4


def run(state, chunk):
    """Cumulative sums of two arrays of different shapes."""
    a, b = chunk["a"], chunk["b"]
    sums = state["a"][:, None] + jnp.cumsum(a, axis=1), state["b"][:, None] + jnp.cumsum(b, axis=1)
    return {"a": sums[0][:, -1], "b": sums[1][:, -1]}, sums


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 3])
def test_scan_chunks_computes_cumulative_sums(length):
    random = np.random.default_rng(0)
    a, b = random.integers(9, size=(2, length)), random.integers(9, size=(2, length, 3, 5))
    start = {"a": np.array([1, 2]), "b": np.ones((2, 3, 5), int)}
    inputs = jax.tree.map(jnp.asarray, (start, {"a": a, "b": b}))
    state, (sums_a, sums_b) = jax.jit(lambda state, inputs: scan_chunks(run, state, inputs, CHUNK))(*inputs)
    np.testing.assert_array_equal(sums_a, start["a"][:, None] + np.cumsum(a, axis=1))
    np.testing.assert_array_equal(sums_b, start["b"][:, None] + np.cumsum(b, axis=1))
    np.testing.assert_array_equal(state["a"], sums_a[:, -1])
    np.testing.assert_array_equal(state["b"], sums_b[:, -1])


@pytest.mark.parametrize(("axis", "shape"), [(-1, (2, 3, 4)), (0, (4, 2, 3)), (1, (2, 4, 3))])
def test_broadcast_axis_and_its_transpose(axis, shape):
    x, weights = np.random.default_rng(0).normal(size=(2, 3)), np.random.default_rng(1).normal(size=shape)
    with jax.enable_x64(True):
        repeated, transpose = jax.vjp(lambda x: broadcast_axis(x, 4, axis), jnp.asarray(x))
        (gradient,) = transpose(jnp.asarray(weights))
    np.testing.assert_array_equal(repeated, np.broadcast_to(np.expand_dims(x, axis), shape))
    np.testing.assert_allclose(gradient, weights.sum(axis), rtol=1e-14)


def test_broadcast_axis_is_exact_in_float32():
    x = np.float32(1) + np.float32(2**-23)
    assert (np.asarray(jax.jit(lambda x: broadcast_axis(x, 3))(jnp.asarray([x]))) == x).all()


# Per scan: its arguments, and the name and the shape of one that is wrong.
SHAPES = {
    linear_scan: ({"x": (1, 8, 3), "log_decay": (1, 8, 3)}, "log_decay", (1, 5, 3)),
    selective_scan: (
        {"x": (1, 8, 3), "dt": (1, 8, 3), "A": (3, 2), "B": (1, 8, 2), "C": (1, 8, 2)},
        "dt",
        (1, 5, 3),
    ),
    ssd: (
        {"x": (1, 8, 4, 3), "dt": (1, 8, 4), "A": (4,), "B": (1, 8, 2, 5), "C": (1, 8, 2, 5)},
        "C",
        (1, 8, 2, 6),
    ),
    delta_rule: (
        {"q": (1, 8, 2, 3), "k": (1, 8, 2, 3), "v": (1, 8, 4, 5), "log_decay": (1, 8, 4), "beta": (1, 8, 4)},
        "beta",
        (1, 8),
    ),
}


@pytest.mark.parametrize("scan", SHAPES, ids=lambda scan: scan.__name__)
def test_scans_reject_arrays_that_do_not_fit(scan):
    """Without the checks of the test suite, as installed: zero padding would hide a missing position."""
    shapes, name, wrong = SHAPES[scan]
    arrays = {argument: jnp.zeros(shape) for argument, shape in shapes.items()}
    with rejects(InputError, name):
        inspect.unwrap(scan)(**arrays | {name: jnp.zeros(wrong)})
