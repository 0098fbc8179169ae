"""Norms against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import Norm, NormConfig
from tests.layers import reference
from tests.messages import rejects
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

X = np.random.default_rng(0).normal(1, 3, size=(2, 5, 12)).astype(np.float32)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_equals_the_reference(kind, eps):
    config = NormConfig(kind=kind, eps=eps)
    module = reference.fill(lambda: Norm(config, 12, nnx.Rngs(0)))
    assert_close(
        kind, module(jnp.asarray(X)), reference.norm(config, reference.weights(module), X.astype(np.float64)), "float32"
    )


def test_starts_as_the_plain_norm():
    y = np.asarray(Norm(NormConfig(kind="layer", eps=1e-8), 12, nnx.Rngs(0))(jnp.asarray(X)))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-5)
    y = np.asarray(Norm(NormConfig(kind="rms", eps=1e-8), 12, nnx.Rngs(0))(jnp.asarray(X)))
    np.testing.assert_allclose((y**2).mean(-1), 1, atol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    x = jnp.asarray(1000 + X, jnp.bfloat16)  # a mean in bfloat16 would lose the differences
    config = NormConfig(kind="layer", eps=1e-6)
    module = Norm(config, 12, nnx.Rngs(0))
    assert module(x).dtype == jnp.bfloat16
    expected = reference.norm(config, reference.weights(module), np.asarray(x, np.float64))
    assert_close("layer", module(x).astype(jnp.float32), expected, "bfloat16")


def test_a_row_of_zeros_gives_zeros():
    assert not Norm(NormConfig(kind="rms", eps=1e-6), 12, nnx.Rngs(0))(jnp.zeros((1, 12))).any()


def test_rejects_an_unknown_kind():
    with rejects(InputError, "kind"):
        NormConfig(kind="batch", eps=1e-6)
