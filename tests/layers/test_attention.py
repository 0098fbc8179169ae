"""The attention mixer against float64 NumPy."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.errors import InputError
from sparsejax.layers import (
    EMPTY,
    Attention,
    AttentionConfig,
    Context,
    Extras,
    NormConfig,
    RopeConfig,
    RopeScaling,
    Stream,
    Tokens,
)
from sparsejax.layers.attention import alibi_slopes
from tests.layers import reference
from tests.messages import rejects
from tests.tolerances import assert_close

LENGTH, WIDTH = 11, 10
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
CONFIG = AttentionConfig(
    pattern="causal & (window(3) | sink(2))",
    heads=4,
    kv_heads=2,
    head_width=6,
    rope=RopeConfig(base=100.0),
    qk_norm=None,
    impl="auto",
)


# Every option, some combined.
OPTIONS = [
    {"bias": True, "out_bias": True, "scale": 0.3},
    {"softcap": 1.2, "sinks": True},
    {"gate": True, "bias": True},
    {"alibi": True, "rope": None, "sinks": True, "softcap": 2.0},
    {"alibi": True, "pattern": "per_head(full, window(3, 3), causal, full)", "impl": "gather"},
    {"relative": 8, "rope": None},
    {"qk_norm": NormConfig(kind="rms", eps=1e-2), "qk_norm_joint": True},
    {"qk_norm": NormConfig(kind="rms", eps=1e-2, scale=False), "growth": 0.7, "growth_period": 3},
    {
        "relative": 4,
        "pattern": "window(3, 4)",
        "sinks": True,
        "scale": 0.5,
        "qk_norm": NormConfig(kind="rms", eps=1e-6),
    },
    {"rope": RopeConfig(base=50.0, fraction=0.5, interleaved=True), "head_width": 8},
    {
        "rope": RopeConfig(
            base=50.0, scaling=RopeScaling(kind="yarn", factor=4.0, original_length=7, fast=2.0, slow=0.5)
        )
    },
]


def build(config: AttentionConfig, dtype=jnp.float32) -> Attention:
    return reference.fill(lambda: Attention(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"rope": None, "head_width": 5},
        {"qk_norm": NormConfig(kind="rms", eps=1e-6)},
        {"qk_norm": NormConfig(kind="layer", eps=1e-2)},
        {"pattern": "per_head(causal, window(0), causal & chunk(4), window(2, 2))"},
        {"pattern": "full"},
        {"pattern": "window(2) | globals([0, -1])", "impl": "gather"},
        *OPTIONS,
    ],
    ids=str,
)
def test_equals_the_reference(change):
    config = dataclasses.replace(CONFIG, **change)
    module = build(config)
    expected = reference.attention(config, reference.weights(module), X)
    assert_close("attention", jax.jit(lambda x: module(x))(X), expected, "float32")


def test_bfloat16():
    config = dataclasses.replace(CONFIG, qk_norm=NormConfig(kind="rms", eps=1e-6))
    module = build(config, jnp.bfloat16)
    assert {leaf.dtype for leaf in reference.parameters(module)} == {jnp.dtype("float32")}
    y = jax.jit(lambda x: module(x))(X)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(lambda: module.init_cache(1, 8)))} == {
        jnp.dtype("bfloat16")
    }
    expected = reference.attention(config, reference.weights(module), X)
    assert_close("attention", y.astype(jnp.float32), expected, "bfloat16")


def test_parameters_are_the_four_projections_and_the_norms_if_any():
    shapes = {"query": (WIDTH, 24), "key": (WIDTH, 12), "value": (WIDTH, 12), "out": (24, WIDTH)}
    assert {name: w["weight"].shape for name, w in reference.weights(build(CONFIG)).items()} == shapes
    normed = reference.weights(build(dataclasses.replace(CONFIG, qk_norm=NormConfig(kind="layer", eps=1e-6))))
    assert {name: leaf.shape for name, leaf in normed["key_norm"].items()} == {"scale": (6,), "bias": (6,)}


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"heads": 4, "kv_heads": 3}, "heads"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"head_width": 5}, "rope.fraction"),
        ({"relative": 5}, "relative"),
        ({"softcap": 0.0}, "softcap"),
        ({"pattern": "window(3) | globals(1)", "global_projections": True}, "global_projections"),
        ({"pattern": "windw(3)"}, "pattern"),
        ({"pattern": "per_head(causal, full)"}, "pattern"),
    ],
)
def test_rejects(change, argument):
    with rejects(InputError, argument):
        dataclasses.replace(CONFIG, **change)


def slope(function, point, direction, step=1e-5):
    """Directional derivative of a function of float64 arrays, by central difference."""
    ends = (jax.tree.map(lambda x, d, sign=sign: x + sign * step * d, point, direction) for sign in (1, -1))
    return (function(*next(ends)) - function(*next(ends))) / (2 * step)


def check_gradients(module, expected, context=EMPTY):
    """Compares gradients with float64 NumPy along random directions of all parameters and of the input."""
    random = np.random.default_rng(2)
    cotangent = random.normal(size=X.shape)
    graph, state = nnx.split(module)
    weights = nnx.to_pure_dict(state)

    def loss(weights, x):
        nnx.replace_by_pure_dict(state, weights)
        return (nnx.merge(graph, state)(x, context) * cotangent).sum()

    actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, X)
    point = jax.tree.map(np.float64, (weights, X))
    wanted = lambda weights, x: (expected(weights, x) * cotangent).sum()  # noqa: E731
    for path, gradient in jax.tree_util.tree_leaves_with_path(actual):
        direction = jax.tree_util.tree_map_with_path(
            lambda p, leaf, path=path: random.normal(size=leaf.shape) * (p == path), point
        )
        along = sum(map(np.vdot, jax.tree.leaves(direction), jax.tree.leaves(actual)))
        scale = np.linalg.norm(gradient)
        assert scale > 0, path
        assert abs(along - slope(wanted, point, direction)) < 1e-5 * max(1.0, scale), path


@pytest.mark.parametrize("change", [OPTIONS[i] for i in (1, 2, 4, 6, 7)], ids=str)
def test_gradients_equal_the_reference(change):
    config = dataclasses.replace(CONFIG, **change)
    check_gradients(build(config), lambda w, x: reference.attention(config, w, x))


def test_alibi_slopes():
    # From the paper for 8 heads, and from its released code for numbers that are no power of two.
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    np.testing.assert_allclose(alibi_slopes(1), [1 / 256])


def test_a_mixer_may_read_more_than_the_stream_has():
    wide = np.random.default_rng(3).normal(size=(2, LENGTH, 17)).astype(np.float32)
    config = dataclasses.replace(CONFIG, gate=True)
    module = reference.fill(lambda: Attention(config, Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0), inputs=17))
    y = module(jnp.asarray(wide))
    assert y.shape == X.shape
    assert_close("attention", y, reference.attention(config, reference.weights(module), wide), "float32")


MASK = np.arange(LENGTH) < np.array([[LENGTH], [8]])
SEGMENTS = np.array([[0] * 4 + [1] * 7, [3] * 8 + [2] * 3])
# Inside and outside windows, unordered, a different number per sequence, and one of them at padding.
TOKENS = [[7, 0, 3], [5, 9]]
GLOBALS = np.array([[7, 0, 3, -1], [-1, 5, 9, -1]], np.int32)
BOTH_WAYS = {"pattern": "window(2, 3)", "bias": True, "out_bias": True}


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, {}),
        ({"global_projections": True}, {"mask": MASK}),
        ({"global_projections": True, "kv_heads": 4, "rope": None}, {"mask": MASK, "segments": SEGMENTS}),
        ({"gate": True, "softcap": 2.0, "qk_norm": NormConfig(kind="rms", eps=1e-6)}, {"segments": SEGMENTS}),
        ({"pattern": "full", "impl": "gather"}, {"mask": MASK}),
        ({"pattern": "per_head(full, window(1, 1), window(0, 2), globals([]))", "scale": 0.3}, {}),
    ],
    ids=str,
)
def test_global_tokens_of_the_batch(change, known):
    config = dataclasses.replace(CONFIG, **BOTH_WAYS | change)
    module, context = (
        build(config),
        Context(Tokens(**jax.tree.map(jnp.asarray, known)), Extras(globals=jnp.asarray(GLOBALS))),
    )
    expected = reference.attention(config, reference.weights(module), X, tokens=TOKENS, **known)
    assert_close("attention", jax.jit(lambda x: module(x, context))(X), expected, "float32")


def test_gradients_of_global_tokens_equal_the_reference():
    config = dataclasses.replace(CONFIG, **BOTH_WAYS, global_projections=True)
    context = Context(Tokens(mask=jnp.asarray(MASK)), Extras(globals=jnp.asarray(GLOBALS)))
    check_gradients(build(config), lambda w, x: reference.attention(config, w, x, mask=MASK, tokens=TOKENS), context)


def test_no_global_token_in_the_batch_is_as_if_there_were_none():
    config = dataclasses.replace(CONFIG, **BOTH_WAYS, global_projections=True)
    module = build(config)
    none = module(jnp.asarray(X), Context(extras=Extras(globals=jnp.full((2, 3), -1))))
    assert_close("attention", none, module(jnp.asarray(X)), "float32")


def test_global_tokens_take_no_array_of_all_pairs():
    config = dataclasses.replace(CONFIG, **BOTH_WAYS, global_projections=True)
    module, length = build(config), 2048
    x, positions = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    loss = jax.grad(lambda x, positions: module(x, Context(extras=Extras(globals=positions))).sum())
    text = jax.jit(loss).lower(x, positions).compile({"xla_backend_optimization_level": 0}).as_text()
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)
    assert max(math.prod(map(int, dims.split(","))) for dims in shapes) < length * length / 4


@pytest.mark.parametrize(
    "change",
    [{"pattern": "causal"}, {"pattern": "causal & window(3)"}, {"sinks": True}, {"alibi": True}, {"relative": 4}],
    ids=str,
)
def test_rejects_run_time_globals_beside(change):
    module = build(dataclasses.replace(CONFIG, **BOTH_WAYS | change))
    with rejects(InputError, "globals"):
        module(jnp.asarray(X), Context(extras=Extras(globals=jnp.asarray(GLOBALS))))


@pytest.mark.parametrize("change", [{}, *OPTIONS[3:6]], ids=str)
def test_padding_and_documents(change):
    config = dataclasses.replace(CONFIG, **change)
    module = build(config)
    expected = reference.attention(config, reference.weights(module), X, mask=MASK, segments=jnp.asarray(SEGMENTS))
    y = jax.jit(lambda x: module(x, Context(Tokens(mask=jnp.asarray(MASK), segments=jnp.asarray(SEGMENTS)))))(X)
    assert_close("attention", y, expected, "float32")
