"""Griffin's recurrent block against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import Context, RgLru, RgLruConfig, Stream, Tokens
from tests.layers import reference
from tests.messages import rejects
from tests.tolerances import assert_close

LENGTH, WIDTH = 70, 6  # more than a chunk of the scan
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
CONFIG = RgLruConfig(inner=12, heads=3, conv=4, power=0.5)  # keeps more than the default


def build(config: RgLruConfig, dtype=jnp.float32) -> RgLru:
    return reference.fill(lambda: RgLru(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


def rglru(config, w, x):
    """The recurrence, position by position; the first input is not scaled."""

    def block(name, u):
        parts = np.split(u, config.heads, axis=-1)
        whole = [
            part @ matrix + bias for part, matrix, bias in zip(parts, w[name]["weight"], w[name]["bias"], strict=True)
        ]
        return reference.sigmoid(np.concatenate(whole, axis=-1))

    u = reference.conv(w["conv"], reference.linear(w["input"], x))
    kept = np.exp(-config.power * np.log1p(np.exp(w["decay"])) * block("recurrence_gate", u))
    gated, y, state = block("input_gate", u) * u, np.zeros_like(u), 0.0
    for now in range(x.shape[1]):
        scale = np.sqrt(1 - kept[:, now] ** 2) if now else 1.0
        y[:, now] = state = kept[:, now] * state + scale * gated[:, now]
    gate = reference.ACTIVATIONS["gelu_tanh"](reference.linear(w["gate"], x))
    return reference.linear(w["out"], gate * y)


@pytest.mark.parametrize(
    "change", [{}, {"conv": 1, "heads": 1, "power": 8.0}, {"bias": False, "conv_bias": False, "heads": 12}], ids=str
)
def test_equals_the_reference(change):
    config = dataclasses.replace(CONFIG, **change)
    module = build(config)
    assert_close("rglru", jax.jit(lambda x: module(x))(X), rglru(config, reference.weights(module), X), "float32")


def test_padding_on_the_left_changes_nothing():
    module, pad = build(CONFIG), 5
    mask = np.ones((2, LENGTH), bool)
    mask[0, :pad] = False
    y = jax.jit(lambda x: module(x, Context(Tokens(mask=jnp.asarray(mask)))))(X)
    w = reference.weights(module)
    assert_close("real tokens", y[:1, pad:], rglru(CONFIG, w, X[:1, pad:]), "float32")
    assert_close("no padding", y[1:], rglru(CONFIG, w, X[1:]), "float32")


@pytest.mark.parametrize("pad", [0, 3])
def test_documents_are_apart(pad):
    module, cut = build(CONFIG), 30
    segments, mask = np.zeros((2, LENGTH), np.int32), np.ones((2, LENGTH), bool)
    segments[:, cut:], mask[:, cut : cut + pad] = 1, False  # the second document begins with padding
    y = jax.jit(lambda x: module(x, Context(Tokens(segments=jnp.asarray(segments), mask=jnp.asarray(mask)))))(X)
    w = reference.weights(module)
    assert_close("first", y[:, :cut], rglru(CONFIG, w, X[:, :cut]), "float32")
    assert_close("second", y[:, cut + pad :], rglru(CONFIG, w, X[:, cut + pad :]), "float32")


def test_padding_inside_a_document_begins_none():
    module, mask = build(CONFIG), np.ones((2, LENGTH), bool)
    mask[:, 9] = False
    y = jax.jit(lambda x: module(x, Context(Tokens(mask=jnp.asarray(mask)))))(X)
    alone = jax.jit(lambda x: module(x))(X[:, 10:])
    assert np.abs(y[:, 13:18] - alone[:, 3:8]).max() > 1e-2  # the state of the first tokens is kept


def test_gradients_are_finite_where_everything_is_kept():
    module = build(CONFIG)
    module.decay[...] = jnp.full_like(module.decay[...], -200.0)  # softplus gives exactly 0
    graph, state = nnx.split(module)
    gradients = jax.jit(jax.grad(lambda state: (nnx.merge(graph, state)(jnp.asarray(X)) ** 2).sum()))(state)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()


def test_bfloat16_keeps_a_float32_state():
    module = build(CONFIG, jnp.bfloat16)
    assert {leaf.dtype for leaf in reference.parameters(module)} == {jnp.dtype("float32")}
    x = jnp.asarray(X, jnp.bfloat16)
    y = jax.jit(lambda x: module(x))(x)
    assert y.dtype == jnp.bfloat16
    expected = rglru(CONFIG, reference.weights(module), np.asarray(x, np.float64))
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.03 * np.abs(expected).max())
    cache = module.init_cache(2, LENGTH)
    y, cache = jax.eval_shape(lambda x: module.extend(x, cache, jnp.zeros(2, jnp.int32), LENGTH), x)
    assert (y.dtype, cache["state"].dtype, cache["conv"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def test_starts_with_what_an_open_gate_keeps_in_its_range():
    config = RgLruConfig(inner=500, heads=1, conv=2)
    decay = jax.jit(lambda: RgLru(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0)).decay[...])()
    kept = np.exp(-8 * np.log1p(np.exp(np.float64(decay))))
    assert 0.9 * 0.9999 < kept.min() < 0.905
    assert 0.994 < kept.max() < 0.999 * 1.0001
    assert kept.mean() == pytest.approx((0.9 + 0.999) / 2, abs=0.005)


def test_the_cost_does_not_depend_on_the_length():
    linear, conv, gates = 3 * WIDTH * 12, 4 * 12, 2 * 3 * 4 * 4
    assert [build(CONFIG).cost(length).pairs for length in (1, 1000)] == [0, 0]
    assert [build(CONFIG).cost(length).flops for length in (1, 1000)] == [2 * (linear + conv + gates) + 10 * 12] * 2


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"conv": 0}, "conv"),
        ({"heads": 5}, "inner"),
        ({"decay_max": 1.0}, "decay_min"),
        ({"power": 0.0}, "power"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(CONFIG, **change)
