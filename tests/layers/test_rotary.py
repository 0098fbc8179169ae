"""Rotary positions against float64 NumPy; scores depend only on distances."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.layers.rotary import RopeConfig, RopeScaling, rotate
from tests.layers import reference
from tests.messages import rejects
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 40, 3, 8)).astype(np.float32)


CONFIGS = [
    RopeConfig(base=10_000.0),
    RopeConfig(base=10.0, interleaved=True),
    RopeConfig(base=10.0, fraction=0.5),
    RopeConfig(base=10.0, fraction=0.6, interleaved=True),  # 4 of 8
    RopeConfig(base=50.0, scaling=RopeScaling(kind="linear", factor=4.0)),
    RopeConfig(base=50.0, scaling=RopeScaling(kind="ntk", factor=4.0)),
    RopeConfig(base=50.0, scaling=RopeScaling(kind="llama3", factor=8.0, original_length=30, fast=4.0, slow=1.0)),
    RopeConfig(
        base=50.0, fraction=0.5, scaling=RopeScaling(kind="llama3", factor=8.0, original_length=12, fast=1.5, slow=0.1)
    ),
    RopeConfig(base=50.0, scaling=RopeScaling(kind="yarn", factor=4.0, original_length=30)),
    RopeConfig(
        base=50.0,
        interleaved=True,
        scaling=RopeScaling(kind="yarn", factor=4.0, original_length=30, fast=3.0, slow=0.2, truncate=False),
    ),
    RopeConfig(
        base=50.0,
        scaling=RopeScaling(kind="yarn", factor=4.0, original_length=30, fast=3.0, slow=0.5, attention_factor=1.7),
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_complex_turns(config):
    expected = reference.rotate(X.astype(np.float64), config)
    assert_close("rotate", rotate(jnp.asarray(X), jnp.arange(40), config), expected, "float32")


LONG = RopeScaling(kind="yarn", factor=32.0, original_length=4096, truncate=False)  # gpt-oss
LLAMA = RopeScaling(kind="llama3", factor=8.0, original_length=8192, fast=4.0, slow=1.0)  # Llama 3.1


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (RopeConfig(base=150_000.0, scaling=LONG), 64),
        (RopeConfig(base=150_000.0, scaling=dataclasses.replace(LONG, truncate=True)), 64),
        (RopeConfig(base=500_000.0, scaling=LLAMA), 128),
        (RopeConfig(base=10_000.0, scaling=RopeScaling(kind="ntk", factor=4.0)), 128),
    ],
    ids=str,
)
def test_frequencies_of_models(config, width):
    actual, grow = config.frequencies(width)
    expected, growth = reference.frequencies(config, width)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert grow == pytest.approx(growth, rel=1e-12)
    plain, _ = RopeConfig(base=config.base).frequencies(width)
    factor = config.scaling.factor
    assert (actual <= plain * (1 + 1e-12)).all()
    assert (actual >= plain / factor * (1 - 1e-12)).all()
    np.testing.assert_allclose([actual[0], actual[-1]], [plain[0], plain[-1] / factor], rtol=1e-12)


def test_yarn_turns_fast_pairs_as_before_and_slow_pairs_by_less():
    config = RopeConfig(base=10_000.0, scaling=RopeScaling(kind="yarn", factor=16.0, original_length=4096))
    (actual, grow), (plain, _) = config.frequencies(128), RopeConfig(base=10_000.0).frequencies(128)
    rotations = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(actual[rotations > 40], plain[rotations > 40])
    np.testing.assert_allclose(actual[rotations < 0.9], plain[rotations < 0.9] / 16)
    between = (rotations > 1.2) & (rotations < 28)
    assert ((actual[between] < plain[between]) & (actual[between] > plain[between] / 16)).all()
    assert grow == pytest.approx(1.2772588722239782)  # 0.1 ln 16 + 1


def test_rejects_rope_of_no_base_and_no_pairs():
    with rejects(InputError, "base"):
        RopeConfig(base=1.0)
    with rejects(InputError, "fraction"):
        RopeConfig(base=10.0, fraction=0.0)
    with rejects(InputError, "rope.fraction"):
        RopeConfig(base=10.0, fraction=0.25).width(12)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"kind": "longrope", "factor": 2.0}, "kind"),
        ({"kind": "linear", "factor": 0.5}, "factor"),
        ({"kind": "yarn", "factor": 2.0}, "original_length"),
        ({"kind": "llama3", "factor": 2.0, "original_length": 100, "fast": 1.0}, "fast"),
    ],
)
def test_rejects_scalings(options, argument):
    with rejects(InputError, argument):
        RopeScaling(**options)


def test_position_zero_stays():
    np.testing.assert_array_equal(rotate(jnp.asarray(X), jnp.zeros(40, int), RopeConfig(base=10_000.0)), X)


def test_scores_depend_on_the_distance_alone():
    q, k = (np.broadcast_to(RANDOM.normal(size=8).astype(np.float32), (1, 40, 1, 8)) for _ in range(2))

    def scores(shift):
        rotated = (rotate(jnp.asarray(x), shift + jnp.arange(40), RopeConfig(base=100.0))[0, :, 0] for x in (q, k))
        return np.einsum("td,sd->ts", *rotated)

    near = scores(0)
    for distance in range(-39, 40):
        np.testing.assert_allclose(np.diagonal(near, distance), np.diagonal(near, distance)[0], atol=1e-4)
    np.testing.assert_allclose(scores(500), near, atol=1e-3)
    assert np.ptp(near[0]) > 1  # and they do depend on it


def test_any_positions_in_any_order():
    order, config = RANDOM.permutation(40), RopeConfig(base=50.0)
    expected = rotate(jnp.asarray(X), jnp.arange(40), config)[:, order]
    np.testing.assert_allclose(rotate(jnp.asarray(X[:, order]), jnp.asarray(order), config), expected, atol=1e-6)


def test_bfloat16_is_turned_in_float32():
    x = jnp.asarray(X, jnp.bfloat16)
    y = rotate(x, jnp.arange(40) + 1000, RopeConfig(base=10_000.0))
    assert y.dtype == jnp.bfloat16
    expected = rotate(x.astype(jnp.float32), jnp.arange(40) + 1000, RopeConfig(base=10_000.0))
    np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))
