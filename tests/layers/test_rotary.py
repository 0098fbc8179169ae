"""Rotary positions: a turn by position and pair, so that scores depend on distances alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.layers.rotary import RopeConfig, rotate
from tests.layers import reference
from tests.tolerances import assert_close

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 40, 3, 8)).astype(np.float32)


@pytest.mark.parametrize("base", [10_000.0, 10.0])
def test_equals_complex_turns(base):
    assert_close(
        "rotate", rotate(X, jnp.arange(40), RopeConfig(base)), reference.rotate(X.astype(np.float64), base), "float32"
    )


def test_position_zero_stays():
    np.testing.assert_array_equal(rotate(X, jnp.zeros(40, int), RopeConfig(10_000.0)), X)


def test_scores_depend_on_the_distance_alone():
    q, k = (np.broadcast_to(RANDOM.normal(size=8).astype(np.float32), (40, 1, 8)) for _ in range(2))

    def scores(shift):
        turned = (np.asarray(rotate(x, shift + jnp.arange(40), RopeConfig(100.0)))[:, 0] for x in (q, k))
        return np.einsum("td,sd->ts", *turned)

    near = scores(0)
    for distance in range(-39, 40):
        np.testing.assert_allclose(np.diagonal(near, distance), np.diagonal(near, distance)[0], atol=1e-4)
    np.testing.assert_allclose(scores(500), near, atol=1e-3)
    assert np.ptp(near[0]) > 1  # and do depend on it


def test_any_positions_in_any_order():
    order, config = RANDOM.permutation(40), RopeConfig(50.0)
    expected = rotate(X, jnp.arange(40), config)[:, order]
    np.testing.assert_allclose(rotate(X[:, order], order, config), expected, atol=1e-6)


def test_bfloat16_is_turned_in_float32():
    x = jnp.asarray(X, jnp.bfloat16)
    y = rotate(x, jnp.arange(40) + 1000, RopeConfig(10_000.0))
    assert y.dtype == jnp.bfloat16
    expected = rotate(x.astype(jnp.float32), jnp.arange(40) + 1000, RopeConfig(10_000.0))
    np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))
