"""The Mamba mixer against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import Mamba, MambaConfig, Stream
from tests.layers import reference
from tests.messages import rejects
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

LENGTH, WIDTH = 35, 6  # more than a chunk of the scan
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
CONFIG = MambaConfig(inner=10, state=3, conv=4, dt_rank=2, dt_min=1e-3, dt_max=0.1)


def build(config: MambaConfig, dtype=jnp.float32) -> Mamba:
    return reference.fill(lambda: Mamba(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


@pytest.mark.parametrize("change", [{}, {"conv": 1, "state": 1, "dt_rank": 1}, {"conv": 40}], ids=str)
def test_equals_the_reference(change):
    config = dataclasses.replace(CONFIG, **change)
    module = build(config)
    expected = reference.mamba(config, reference.weights(module), X)
    assert_close("mamba", jax.jit(lambda x: module(x))(X), expected, "float32")


def test_bfloat16_keeps_a_float32_state():
    module = build(CONFIG, jnp.bfloat16)
    assert {leaf.dtype for leaf in reference.parameters(module)} == {jnp.dtype("float32")}
    x = jnp.asarray(X, jnp.bfloat16)
    y = jax.jit(lambda x: module(x))(x)
    assert y.dtype == jnp.bfloat16
    expected = reference.mamba(CONFIG, reference.weights(module), np.asarray(x, np.float64))
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.03 * np.abs(expected).max())
    cache = module.init_cache(2, LENGTH)
    y, cache = jax.eval_shape(lambda x: module.extend(x, cache, jnp.zeros(2, jnp.int32), LENGTH), x)
    assert (y.dtype, cache["state"].dtype, cache["conv"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def test_starts_with_step_sizes_and_decays_of_the_paper():
    config = MambaConfig(inner=500, state=5, conv=4, dt_rank=2, dt_min=1e-3, dt_max=0.1)

    def start():
        module = Mamba(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0))
        return jax.nn.softplus(module.dt_bias[...]), jnp.exp(module.log_decay[...]), module.skip[...]

    steps, decays, skips = jax.jit(start)()
    assert 1e-3 * 0.999 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.1 * 1.001
    assert np.median(steps) == pytest.approx(0.01, rel=0.3)  # log-uniform
    np.testing.assert_allclose(decays, np.tile([1, 2, 3, 4, 5], (500, 1)), rtol=1e-6)
    assert (skips == 1).all()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"conv": 0}, "conv"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"dt_min": 0.2}, "dt_min"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(CONFIG, **change)
