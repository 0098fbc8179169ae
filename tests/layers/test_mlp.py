"""Feed-forward parts against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import Mlp, MlpConfig, Stream
from tests.layers import reference
from tests.messages import rejects
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

X = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)


def build(config: MlpConfig, dtype=jnp.float32) -> Mlp:
    return reference.fill(lambda: Mlp(config, Stream(6, 1, dtype), nnx.Rngs(0)))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_equals_the_reference(kind, activation):
    config = MlpConfig(kind=kind, width=10, activation=activation)
    module = build(config)
    assert_close(kind, module(jnp.asarray(X))[0], reference.mlp(config, reference.weights(module), X), "float32")
    assert_close("one token", module(jnp.asarray(X[:, 3]))[0], module(jnp.asarray(X))[0][:, 3], "float32")


@pytest.mark.parametrize(("kind", "matrices"), [("gated", 3), ("plain", 2)])
def test_flops_are_two_for_each_weight(kind, matrices):
    assert build(MlpConfig(kind=kind, width=10, activation="relu")).flops == 2 * matrices * 6 * 10


def test_bfloat16():
    config = MlpConfig(kind="gated", width=10, activation="silu")
    module = build(config, jnp.bfloat16)
    assert {leaf.dtype for leaf in reference.parameters(module)} == {jnp.dtype("float32")}
    assert module(jnp.asarray(X))[0].dtype == jnp.bfloat16
    expected = reference.mlp(config, reference.weights(module), X)
    assert_close("gated", module(jnp.asarray(X))[0].astype(jnp.float32), expected, "bfloat16")


@pytest.mark.parametrize(
    ("kind", "width", "activation", "argument"),
    [
        ("glu", 4, "silu", "kind"),
        ("plain", 4, "tanh", "activation"),
        ("gated", 0, "silu", "width"),
    ],
)
def test_rejects(kind, width, activation, argument):
    with rejects(InputError, argument):
        MlpConfig(kind=kind, width=width, activation=activation)
