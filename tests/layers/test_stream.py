"""Linear maps and parameters."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.layers import Linear, Stream, parameter
from sparsejax.layers.stream import output_scale
from tests.layers import reference
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick


def build(**options) -> Linear:
    return Linear(200, 100, ("width", "heads"), rngs=nnx.Rngs(0), **{"dtype": jnp.float32} | options)


def test_linear_with_a_bias():
    module = reference.fill(lambda: build(bias=True))
    x = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    w = reference.weights(module)
    assert_close("linear", module(jnp.asarray(x)), x @ w["weight"] + w["bias"], "float32")
    assert module.bias.axes == ("heads",)
    assert module.weight.axes == ("width", "heads")


def test_linear_keeps_float32_parameters_and_computes_in_its_dtype():
    module = build(dtype=jnp.bfloat16)
    assert module.weight.dtype == jnp.float32
    assert module(jnp.ones((3, 200))).dtype == jnp.bfloat16


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_linear_starts_with_outputs_of_unit_variance(scale):
    deviation = float(build(scale=scale).weight[...].std())
    assert deviation == pytest.approx(scale * 200**-0.5, rel=0.03)


def test_output_projections_start_smaller_in_deeper_models():
    assert [output_scale(Stream(8, depth, jnp.float32)) for depth in (2, 8)] == [0.5, 0.25]


def test_a_parameter_names_its_axes():
    made = parameter(nnx.Rngs(0), lambda key, shape, dtype: jnp.zeros(shape, dtype), (2, 3), ("width", None))
    assert (made.shape, made.dtype, made.axes) == ((2, 3), jnp.float32, ("width", None))
