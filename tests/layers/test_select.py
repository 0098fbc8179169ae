"""Attention to keys that the data choose, as an option of the mixer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.config import ConfigError
from sparsejax.errors import InputError
from sparsejax.layers import Attention, Context, SelectConfig, Stream
from tests.check.models import ATTENTION, build
from tests.layers.properties import assert_chunks_equal_whole
from tests.messages import rejects

KINDS = {
    "tokens": {"kind": "tokens", "count": 9},
    "mass": {"kind": "tokens", "count": 30, "mass": 0.6},
    "tiles": {"kind": "tiles", "count": 3, "block": 5, "pooling": "logsumexp"},
    "moba": {"kind": "moba", "count": 2, "block": 8},
    "infllm": {"kind": "infllm", "count": 3, "block": 8, "window": 8, "stride": 4, "dense_below": 37},
}
LENGTH = 70


def make(select, causal=True, **options):
    """The mixer of a model."""
    mixer = ATTENTION | {"pattern": "causal", "impl": "auto", "select": select} | options
    config = build(mixer, causal=causal).layers["mix"].mixer
    return config, Attention(config, Stream(width=16, dtype=jnp.float32, depth=1), nnx.Rngs(0))


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, 16)), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_enough_groups_give_dense_attention(kind, x):
    enough = {"count": LENGTH} | ({"mass": 1.0} if kind == "mass" else {})
    config, mixer = make(KINDS[kind] | enough, impl="dense")
    mixer.config, expected = dataclasses.replace(config, select=None), jax.jit(mixer.__call__)
    dense = expected(x)
    mixer.config = config
    np.testing.assert_array_equal(jax.jit(lambda x: mixer(x))(x), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_ragged_rows_equal_the_whole(kind, x):
    _, mixer = make(KINDS[kind])
    chunks = (17, (17, 9)), (8, (8, 8)), (1, (1, 1)), (20, (20, 3)), (1, (1, 1))
    assert_chunks_equal_whole(mixer, x, chunks)


def test_a_cache_of_moba_has_the_sum_of_keys_per_block():
    """A step reads a mean per block instead of every key."""
    _, mixer = make(KINDS["moba"])
    assert mixer.init_cache(2, LENGTH)["sums"].shape == (2, 9, 1, 8)
    _, mixer = make(KINDS["moba"], rope=None, relative=8)  # the features of positions are not in the cache
    assert "sums" not in mixer.init_cache(2, LENGTH)


def test_the_account_counts_chosen_keys_and_scores():
    select = SelectConfig(kind="moba", count=2, block=4)
    _, mixer = make(dataclasses.asdict(select))
    attended = sum(1 + t % 4 + 4 * min(1, t // 4) for t in range(10))
    scored = sum(t // 4 for t in range(10))
    cost = mixer.cost(10)
    assert (cost.pairs, cost.index_pairs) == (2 * attended, 2 * scored)  # two heads
    assert cost.index_flops * 10 == 2 * cost.index_pairs * 8
    _, mixer = make(KINDS["infllm"])
    attended = sum(t + 1 if t < 37 else 1 + t % 8 + 8 * min(2, t // 8) for t in range(LENGTH))
    scored = sum(len(range(0, t - 6, 4)) for t in range(LENGTH))
    cost = mixer.cost(LENGTH)
    assert (cost.pairs, cost.index_pairs) == (2 * attended, 2 * scored)
    _, mixer = make({"kind": "tokens", "count": 3})
    cost = mixer.cost(10)
    assert (cost.pairs, cost.index_pairs) == (2 * sum(min(t + 1, 3) for t in range(10)), 2 * 55)


def test_the_summary_says_what_is_chosen():
    assert make(KINDS["moba"])[0].summary.endswith(", top 2 blocks of 8 (MoBA)")
    assert make(KINDS["infllm"])[0].summary.endswith(", top 3 blocks of 8 (InfLLM-V2)")
    assert make(KINDS["tokens"])[0].summary.endswith(", top 9 keys")


@pytest.mark.parametrize(
    ("key", "select", "options"),
    [
        ("select.kind", {"kind": "best"}, {}),
        ("select.count", {"count": 0}, {}),
        ("select.mass", {"kind": "tokens", "block": 1, "mass": 0.0}, {}),
        ("select.mass", {"mass": 0.5}, {}),
        ("select.block", {"kind": "tokens", "block": 2}, {}),
        ("select.block", {"block": 0}, {}),
        ("select.pooling", {"pooling": "max", "kind": "tiles"} | {"pooling": "sum"}, {}),
        ("select.pooling", {"kind": "moba", "pooling": "mean"}, {}),
        ("select.local", {"local": 2}, {}),
        ("select.window", KINDS["infllm"] | {"window": 6}, {}),
        ("select.block", KINDS["infllm"] | {"block": 6}, {}),
        ("select.count", KINDS["infllm"] | {"local": 3}, {}),
        ("select.stride", KINDS["infllm"] | {"stride": 0}, {}),
        ("select.dense_below", KINDS["infllm"] | {"dense_below": -1}, {}),
        ("pattern", KINDS["infllm"], {"pattern": "full"}),
        ("pattern", {}, {"pattern": "per_head(causal, causal & window(3))"}),
        ("pattern", {}, {"pattern": "full"}),
    ],
)
def test_invalid_sections(key, select, options):
    with rejects(ConfigError, key):
        make(KINDS["moba"] | select, **options)


def test_a_block_longer_than_the_sequence():
    with rejects(InputError, "select.block"):
        make(KINDS["moba"])[0].check(7)


def test_a_choice_does_not_support_globals(x):
    _, mixer = make({"kind": "tiles", "count": 2, "block": 8}, causal=False, pattern="window(9, 9)")
    context = Context().with_extras(globals=jnp.zeros((2, 1), jnp.int32))
    with rejects(InputError, "globals"):
        mixer(x, context)
