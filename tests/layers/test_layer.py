"""Layers against float64 NumPy, over norm positions and residual connections."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import (
    Context,
    Dropout,
    Extras,
    Layer,
    LayerConfig,
    MambaConfig,
    MlpConfig,
    NormConfig,
    ResidualConfig,
    Stream,
)
from tests.layers import reference
from tests.layers.test_attention import CONFIG as ATTENTION
from tests.layers.test_mixers import decode
from tests.messages import rejects
from tests.tolerances import assert_close

LENGTH, WIDTH = 9, 10
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
CONFIG = LayerConfig(
    mixer=ATTENTION,
    mlp=MlpConfig(kind="gated", width=12, activation="silu"),
    norm=NormConfig(kind="rms", eps=1e-6),
    norm_position="pre",
    remat="none",
)
MAMBA = MambaConfig(inner=10, state=3, conv=4, dt_rank=2, dt_min=1e-3, dt_max=0.1)
CHANGES = {
    "pre": {},
    "post": {"norm_position": "post", "norm": NormConfig(kind="layer", eps=1e-6)},
    "without an mlp": {"mlp": None},
    "without norms": {"norm": None, "mlp": MlpConfig(kind="plain", width=7, activation="gelu_tanh")},
    "norms on both sides": {"norm_position": "both"},
    "norms of the outputs": {"norm_position": "output"},
    "parallel": {"parallel": True},
    "without a mixer": {"mixer": None},
    "without a norm before the mixer": {"mixer_norm": False},
    "residual of the norm": {
        "mixer_residual": ResidualConfig(base="norm", keep=1.3, scale=0.9),
        "mlp_residual": ResidualConfig(base="norm", keep=1.4, scale=1.1),
    },
    "deepnorm": {
        "norm_position": "post",
        "mixer_residual": ResidualConfig(keep=8**0.25),
        "mlp_residual": ResidualConfig(keep=8**0.25),
    },
    "mamba": {"mixer": MAMBA},
    "post mamba": {"mixer": MAMBA, "norm_position": "post"},
}
EVERY = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def build(**change) -> Layer:
    config = dataclasses.replace(CONFIG, **change)
    return reference.fill(lambda: Layer(config, Stream(WIDTH, 4, jnp.float32), nnx.Rngs(0)))


@EVERY
def test_equals_the_reference_whole_and_in_steps(change):
    layer = build(**change)
    expected = reference.layer(layer.config, reference.weights(layer), X)
    y, steps = jax.jit(lambda x: (layer(x)[0], decode(layer, x, LENGTH)))(X)
    assert_close("call", y, expected, "float32")
    assert_close("steps", steps, expected, "float32")


def test_remat_keeps_nothing_but_inputs_for_the_backward_pass():
    def kept(layer) -> int:
        graph, parameters = nnx.split(layer)
        x = jax.ShapeDtypeStruct((2, 200, WIDTH), jnp.float32)
        _, vjp = jax.eval_shape(lambda p, x: jax.vjp(lambda p, x: nnx.merge(graph, p)(x)[0], p, x), parameters, x)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    mixer = dataclasses.replace(CONFIG.mixer, impl="gather")  # `segment` would also keep its edge list
    size = sum(leaf.size for leaf in reference.parameters(build()))
    assert kept(build(mixer=mixer, remat="full")) < 2 * 200 * WIDTH + size + 100 < kept(build(mixer=mixer)) / 10


def test_the_cost_adds_the_mlp():
    layer = build()
    assert layer.cost(64).pairs == layer.mixer.cost(64).pairs
    assert layer.cost(64).flops == layer.mixer.cost(64).flops + 2 * 3 * WIDTH * 12
    bare = build(mlp=None)
    assert bare.cost(64) == bare.mixer.cost(64)


def test_rejects_an_unknown_norm_position():
    with rejects(InputError, "norm_position"):
        dataclasses.replace(CONFIG, norm_position="sandwich")


@pytest.mark.parametrize("change", [{"mlp": None}, {"mixer": None}, {"norm_position": "both"}], ids=str)
def test_rejects_parallel_branches_without_a_common_input(change):
    with rejects(InputError, "parallel"):
        dataclasses.replace(CONFIG, parallel=True, **change)


def test_rejects_parallel_branches_in_a_reversible_stream():
    with rejects(InputError, "parallel"):
        Layer(dataclasses.replace(CONFIG, parallel=True), Stream(WIDTH, 4, jnp.float32, reversible=True), nnx.Rngs(0))


def test_rejects_an_empty_layer():
    with rejects(InputError, "mixer"):
        dataclasses.replace(CONFIG, mixer=None, mlp=None)


def test_a_reversible_layer_can_be_undone():
    stream = Stream(WIDTH, 4, jnp.float32, reversible=True)
    layer = reference.fill(lambda: Layer(CONFIG, stream, nnx.Rngs(0)))
    w, x = reference.weights(layer), np.concatenate([X, X[::-1]], axis=-1)
    y, steps = jax.jit(lambda x: (layer(x)[0], decode(layer, x, LENGTH)))(x)
    assert_close("steps", steps, y, "float32")
    x1, x2 = np.split(np.asarray(y, np.float64), 2, axis=-1)
    before = [w[name]["before"] for name in ("mixer_residual", "mlp_residual")]
    x2 = x2 - reference.mlp(CONFIG.mlp, w["mlp"], reference.norm(CONFIG.norm, before[1], x1))
    x1 = x1 - reference.attention(CONFIG.mixer, w["mixer"], reference.norm(CONFIG.norm, before[0], x2))
    assert_close("undone", np.concatenate([x1, x2], axis=-1), x, "float32")


@pytest.mark.parametrize("position", ["pre", "both"])
def test_dropout_is_of_what_a_branch_adds_and_not_of_the_stream(position):
    layer = build(mixer=None, norm_position=position)
    context = Context(extras=Extras(dropout=Dropout(jax.random.key(0), 0.25)))
    added, dropped = (np.asarray(layer(jnp.asarray(X), argument)[0]) - X for argument in (Context(), context))
    kept = np.asarray(context.dropout(jnp.ones_like(X), 1))
    assert 0 < np.mean(kept == 0) < 0.5
    assert_close("added", dropped, added * kept, "float32")


def test_dropout_of_two_streams_is_of_the_one_that_is_written():
    stream = Stream(WIDTH, 4, jnp.float32, reversible=True)
    layer = reference.fill(lambda: Layer(dataclasses.replace(CONFIG, mixer=None), stream, nnx.Rngs(0)))
    x, context = np.concatenate([X, X[::-1]], axis=-1), Context(extras=Extras(dropout=Dropout(jax.random.key(0), 0.25)))
    added, dropped = (np.asarray(layer(jnp.asarray(x), argument)[0]) - x for argument in (Context(), context))
    kept = np.asarray(context.dropout(jnp.ones_like(X), 1))
    assert not dropped[..., :WIDTH].any()
    assert_close("added", dropped[..., WIDTH:], added[..., WIDTH:] * kept, "float32")
