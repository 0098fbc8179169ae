"""Hyper-connections against float64 NumPy, token by token, and models that run on several streams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.account import account_model
from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.layers import (
    Context,
    Dropout,
    Extras,
    HyperConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    ResidualConfig,
    SideConfig,
)
from sparsejax.layers.hyper import make_connection
from sparsejax.model import Functional
from tests.layers import reference
from tests.layers.test_mixers import attention
from tests.messages import rejects
from tests.tolerances import assert_close

pytestmark = pytest.mark.quick

WIDTH = 6
NORM = NormConfig(kind="rms", eps=1e-6)
SINKHORN = HyperConfig(kind="sinkhorn", streams=3, eps=1e-6, steps=4, floor=1e-3)
GATED = HyperConfig(kind="gated", streams=2, eps=1e-6, rank=4)
BOTH = pytest.mark.parametrize("hyper", [SINKHORN, GATED], ids=["sinkhorn", "gated"])
LAYER = LayerConfig(
    mixer=attention("causal & window(4)"),
    mlp=MlpConfig(kind="gated", width=8, activation="silu"),
    norm=NORM,
    norm_position="pre",
    remat="full",
)
CONFIG = ModelConfig(
    vocab=11,
    width=WIDTH,
    schedule="3x(a)",
    layers={"a": LAYER},
    norm=NORM,
    tied=True,
    dtype="float32",
    scan=True,
    hyper=SINKHORN,
)
TOKENS = np.random.default_rng(0).integers(0, 11, size=(2, 9))


def read(config, w, x):
    """Input of a branch, and weights and matrix of its output, for the streams x [n, m] of a token."""
    n = len(x)
    if config.kind == "gated":
        normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + config.eps) * (1 + w["scale"]).reshape(n, -1)
        hidden = reference.ACTIVATIONS["silu"](normed.ravel() @ w["down"]["weight"] / n)
        gates = reference.sigmoid(hidden @ w["up"]["weight"]).reshape(n, -1)
        added = 2 * reference.sigmoid(normed.ravel() @ w["weights"]["weight"] / n) if "weights" in w else None
        return (gates * normed).mean(axis=0), added, np.eye(n)
    flat = x.ravel() / np.sqrt((x**2).mean() + config.eps)
    logits, base, scale = flat @ w["weights"]["weight"], w["base"], w["scale"]
    shares = reference.sigmoid(scale[0] * logits[:n] + base[:n]) + config.floor
    if len(scale) == 1:
        return shares @ x, None, None
    added = 2 * reference.sigmoid(scale[1] * logits[n : 2 * n] + base[n : 2 * n])
    mixed = np.exp(scale[2] * logits[2 * n :] + base[2 * n :]).reshape(n, n)
    mixed = mixed / mixed.sum(axis=1, keepdims=True) + config.floor
    for step in range(config.steps):
        if step:
            mixed = mixed / (mixed.sum(axis=1, keepdims=True) + config.floor)
        mixed = mixed / (mixed.sum(axis=0, keepdims=True) + config.floor)
    return shares @ x, added, mixed


def write(added, mixed, x, y):
    return np.array([added[i] * y + sum(mixed[j, i] * x[j] for j in range(len(x))) for i in range(len(x))])


def apply(config, w, x, branch):
    """The streams x [b, t, n, m] after a branch of all tokens."""
    reads = [[read(config, w, token) for token in row] for row in x]
    y = branch(np.array([[token[0] for token in row] for row in reads]))
    rows = zip(reads, x, y, strict=True)
    return np.array([[write(*r[1:], *pair) for r, *pair in zip(*row, strict=True)] for row in rows])


def run_reference(config, w, tokens):
    """The streams [b, t, n, m] before and after each layer, and the logits."""
    x = np.repeat(w["embedding"]["tokens"][tokens][:, :, None], config.hyper.streams, axis=2)
    streams = [x]
    for layer in reference.layer_weights(config, w):
        scales = [layer[name]["before"] for name in ("mixer_residual", "mlp_residual")]
        mix = lambda y: reference.attention(LAYER.mixer, layer["mixer"], reference.norm(NORM, scales[0], y))  # noqa: B023, E731
        feed = lambda y: reference.mlp(LAYER.mlp, layer["mlp"], reference.norm(NORM, scales[1], y))  # noqa: B023, E731
        x = apply(config.hyper, layer["mixer_hyper"], x, mix)
        x = apply(config.hyper, layer["mlp_hyper"], x, feed)
        streams.append(x)
    last = np.array([[read(config.hyper, w["hyper"], token)[0] for token in row] for row in x])
    return streams, reference.norm(NORM, w["norm"], last) @ w["embedding"]["tokens"].T


def fill(config):
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0.4 if len(leaf.shape) == 1 else 0, 0.5, leaf.shape), jnp.float32),
        Functional(config).shapes,
    )


@BOTH
def test_a_model_equals_the_reference_whole_scanned_and_in_steps(hyper):
    config = dataclasses.replace(CONFIG, hyper=hyper)
    parameters = fill(config)
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
    streams, expected = run_reference(config, w, TOKENS)

    @jax.jit
    def run(parameters, tokens):
        model = Functional(config).bind(parameters)
        output = model.forward(tokens, Context(extras=Extras(traced=True)))
        cache, steps = model.init_cache(2, 9), []
        for at in (0, 4, 5):
            chunk = tokens[:, at : {0: 4, 4: 5, 5: 9}[at]]
            y, cache = model.extend(chunk, cache, jnp.full(2, at), 9)
            steps.append(y)
        return output.traces, model.logits(output.features), model.streams(tokens), jnp.concatenate(steps, axis=1)

    traces, logits, actual, steps = run(parameters, TOKENS)
    assert_close("logits", logits, expected, "float32")
    assert_close("steps", steps, expected, "float32")
    for trace, stream, y in zip([None, *traces], actual[:-1], streams, strict=True):
        assert_close("streams", stream, y.reshape(*TOKENS.shape, -1), "float32")
        assert trace is None or trace.stream.shape == stream.shape


@BOTH
def test_all_parameters_have_gradients(hyper):
    config = dataclasses.replace(CONFIG, hyper=hyper)
    run = jax.jit(jax.grad(lambda p: (Functional(config).bind(p)(jnp.asarray(TOKENS)) ** 2).mean()))
    gradient = run(fill(config))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_the_matrix_of_sinkhorn_is_nearly_doubly_stochastic():
    hyper = HyperConfig(kind="sinkhorn", streams=4, eps=1e-6)
    module = reference.fill(lambda: make_connection(hyper, WIDTH, jnp.float32, nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(5, 4 * WIDTH)).astype(np.float32)
    _, (_, mixed) = module.read(jnp.asarray(x))
    for axis in (1, 2):
        np.testing.assert_allclose(mixed.sum(axis=axis), 1, atol=1e-3)


@BOTH
def test_a_new_connection_adds_to_streams_that_stay(hyper):
    module = make_connection(hyper, WIDTH, jnp.float32, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, hyper.streams, WIDTH)).astype(np.float32)
    _, weights = module.read(jnp.asarray(x.reshape(5, -1)))
    y = module.write(jnp.asarray(x.reshape(5, -1)), jnp.zeros((5, WIDTH)), weights)
    np.testing.assert_allclose(np.asarray(y).reshape(x.shape), x, atol=0.05)


def test_dropout_is_of_the_output_of_a_branch():
    config = dataclasses.replace(CONFIG, dropout=0.25)
    model = Functional(config)
    context = Context(extras=Extras(dropout=Dropout(jax.random.key(0), 0.25)))
    parameters = fill(config)
    dropped = jax.jit(lambda p: model.bind(p)(jnp.asarray(TOKENS), context))(parameters)
    assert np.isfinite(dropped).all()
    assert np.abs(dropped - jax.jit(lambda p: model.bind(p)(jnp.asarray(TOKENS)))(parameters)).max() > 1e-3


def test_the_cost_and_the_head():
    config = dataclasses.replace(CONFIG, schedule="a")
    (layer,), ends = account_model(config, 8)
    (plain,), plain_ends = account_model(dataclasses.replace(config, hyper=None), 8)
    n, m = SINKHORN.streams, WIDTH
    weights = n * (n + 2)
    assert layer.parameters - plain.parameters == 2 * (n * m * weights + weights + 3)
    assert layer.flops - plain.flops == 2 * (2 * n * m * weights + 2 * weights * m)
    assert ends.parameters - plain_ends.parameters == n * m * n + n + 1
    (layer,), _ = account_model(dataclasses.replace(config, hyper=GATED), 8)
    assert layer.parameters - plain.parameters == 2 * (2 * m + 2 * 2 * m * 4 + 2 * m * 2)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"norm_position": "post"}, "layers.a.norm_position"),
        ({"parallel": True}, "layers.a.parallel"),
        ({"side": SideConfig(shared="block")}, "layers.a.side"),
        ({"mlp_residual": ResidualConfig(keep=2.0)}, "layers.a.mlp_residual"),
    ],
)
def test_rejects_options_of_layers(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(CONFIG, layers={"a": dataclasses.replace(LAYER, **change)})


def test_rejects_a_reversible_model():
    with rejects(InputError, "reversible"):
        dataclasses.replace(CONFIG, reversible=True, tied=False)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"kind": "plain"}, "kind"),
        ({"streams": 1}, "streams"),
        ({"steps": 0}, "steps"),
        ({"eps": 0.0}, "eps"),
        ({"rank": 4}, "rank"),
        ({"kind": "gated"}, "rank"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(SINKHORN, **change)
