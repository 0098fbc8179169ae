"""Sequences in chunks against NumPy over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops.chunks import broadcast_axis, scan_chunks

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
