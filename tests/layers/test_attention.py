"""The attention mixer against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.layers import Attention, AttentionConfig, NormConfig, RopeConfig, Stream
from tests.layers import reference
from tests.tolerances import assert_close

LENGTH, WIDTH = 11, 10
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
CONFIG = AttentionConfig(
    pattern="causal & (window(3) | sink(2))",
    heads=4,
    kv_heads=2,
    head_width=6,
    rope=RopeConfig(100.0),
    qk_norm=NormConfig("none", 1e-6),
    impl="auto",
)


def build(config: AttentionConfig, dtype=jnp.float32) -> Attention:
    return reference.fill(lambda: Attention(config, Stream(WIDTH, 1, dtype), nnx.Rngs(0)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"rope": None, "head_width": 5},
        {"qk_norm": NormConfig("rms", 1e-6)},
        {"qk_norm": NormConfig("layer", 1e-2)},
        {"pattern": "per_head(causal, window(0), causal & chunk(4), window(2, 2))"},
        {"pattern": "full"},
        {"pattern": "window(2) | globals([0, -1])", "impl": "gather"},
    ],
    ids=str,
)
def test_equals_the_reference(change):
    config = dataclasses.replace(CONFIG, **change)
    module = build(config)
    expected = reference.attention(config, reference.weights(module), X)
    assert_close("attention", jax.jit(lambda x: module(x))(X), expected, "float32")


def test_bfloat16():
    config = dataclasses.replace(CONFIG, qk_norm=NormConfig("rms", 1e-6))
    module = build(config, jnp.bfloat16)
    assert {leaf.dtype for leaf in reference.parameters(module)} == {jnp.dtype("float32")}
    y = jax.jit(lambda x: module(x))(X)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(lambda: module.init_cache(1, 8)))} == {
        jnp.dtype("bfloat16"),
        jnp.dtype("int32"),
    }
    expected = reference.attention(config, reference.weights(module), X)
    assert_close("attention", y.astype(jnp.float32), expected, "bfloat16")


def test_parameters_are_the_four_projections_and_the_norms_if_any():
    shapes = {"query": (WIDTH, 24), "key": (WIDTH, 12), "value": (WIDTH, 12), "out": (24, WIDTH)}
    assert {name: w["weight"].shape for name, w in reference.weights(build(CONFIG)).items()} == shapes
    normed = reference.weights(build(dataclasses.replace(CONFIG, qk_norm=NormConfig("layer", 1e-6))))
    assert {name: leaf.shape for name, leaf in normed["key_norm"].items()} == {"scale": (6,), "bias": (6,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "heads = 4 is not divisible by kv_heads = 3"),
        ({"kv_heads": 0}, "must be at least 1"),
        ({"head_width": 5}, "rotary positions turn pairs; 1 of head_width = 5 is 5"),
        ({"pattern": "windw(3)"}, "did you mean 'window'"),
        ({"pattern": "per_head(causal, full)"}, "pattern is for 2 heads, heads = 4"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
