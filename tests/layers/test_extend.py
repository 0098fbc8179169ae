"""Chunks of any sizes give what the call over the whole sequence gives, in rows at different positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.layers import AttentionConfig, Context, LshConfig, Stream, Tokens
from sparsejax.layers.mixers import make_mixer
from sparsejax.layers.protocols import Mixer, MixerConfig
from tests.layers import reference
from tests.layers.test_mixers import BATCH, EVERY, LENGTH, MIXED, WIDTH, attention, build, make_x
from tests.patterns.strategies import patterns
from tests.tolerances import assert_close

MISSING = 7.0  # input at tokens that do not exist


def extend(module: nnx.Module, x: np.ndarray, length: int, advances: np.ndarray) -> np.ndarray:
    """Outputs of a mixer for rows that advance by `advances` [chunks, b] tokens per chunk."""
    run = jax.jit(lambda *chunk: module.extend(*chunk[:3], length, Context(Tokens(mask=chunk[3]))))
    cache, positions, y = module.init_cache(len(x), length), np.zeros(len(x), int), np.zeros_like(x)
    shapes, size = jax.tree.map(lambda a: (a.shape, a.dtype), cache), max(int(advances.max()), 1)
    for counts in advances:
        at, mask = positions[:, None] + np.arange(size), np.arange(size) < counts[:, None]
        chunk = np.where(mask[..., None], np.take_along_axis(x, np.minimum(at, x.shape[1] - 1)[..., None], 1), MISSING)
        outputs, cache = run(jnp.asarray(chunk), cache, positions, mask)
        for row, count in enumerate(counts):
            y[row, positions[row] : positions[row] + count] = outputs[row, :count]
        positions = positions + counts
        assert jax.tree.map(lambda a: (a.shape, a.dtype), cache) == shapes
    assert (positions == x.shape[1]).all()
    return y


def cut(length: int, size: int) -> np.ndarray:
    """Chunks of `size` tokens, the last of which may be shorter."""
    sizes = [size] * (length // size) + [length % size] * (length % size > 0)
    return np.repeat(np.array(sizes)[:, None], BATCH, axis=1)


def stagger(length: int, size: int, seed: int = 0) -> np.ndarray:
    """Chunks of up to `size` tokens, of which each row takes another number, none included."""
    random, advances, left = np.random.default_rng(seed), [], np.full(BATCH, length)
    while left.any():
        advances.append(np.minimum(random.integers(0, size + 1, BATCH), left))
        left = left - advances[-1]
    return np.array(advances)


@EVERY
def test_chunks_of_any_size_equal_the_call(config):
    length = LENGTH if isinstance(config, AttentionConfig) else 40  # more than a chunk of a scan
    module, x = build(config), make_x(length)
    y = jax.jit(module)(x)
    for size in (3, length):
        assert_close(f"chunks of {size}", extend(module, x, length, cut(length, size)), y, "float32")
    assert_close("staggered rows", extend(module, x, length, stagger(length, 5)), y, "float32")


WINDOW = 32
SIZES = [3, WINDOW, WINDOW + 1, *(pytest.param(size, marks=pytest.mark.nightly) for size in (1, WINDOW - 1, 100))]
WRAPS = {
    "ring": attention(f"causal & window({WINDOW - 1})"),
    "ring and pinned": attention(f"causal & (window({WINDOW - 1}) | sink(3))"),
    "per head": attention(f"per_head(window({WINDOW - 1}), window(3), causal & chunk(16), window(5))"),
    "latent": dataclasses.replace(MIXED["latent"]["latent"], pattern=f"causal & window({WINDOW - 1})"),
}


@pytest.mark.parametrize("config", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("size", SIZES)
def test_a_ring_may_be_shorter_than_the_chunk(config, size):
    length = 3 * WINDOW + 4
    module, x = build(config), make_x(length)
    assert module.init_cache(1, length).popitem()[1].size < 300 * (WINDOW + 3)
    y = jax.jit(module)(x)
    assert_close("chunks", extend(module, x, length, cut(length, size)), y, "float32")
    assert_close("staggered rows", extend(module, x, length, stagger(length, size)), y, "float32")


@pytest.mark.parametrize("pattern", ["causal", "causal & window(200)", "causal & (window(130) | strided(64))"])
@pytest.mark.parametrize("size", [129, *(pytest.param(s, marks=pytest.mark.nightly) for s in (127, 128, 257, 600))])
def test_chunks_around_the_edges_of_tiles(pattern, size):
    module, x = build(attention(pattern)), make_x(600)
    assert_close("chunks", extend(module, x, 600, cut(600, size)), jax.jit(module)(x), "float32")


@pytest.mark.nightly
@settings(max_examples=100)
@given(st.data(), st.integers(1, 20), st.integers(0, 99))
def test_any_causal_pattern(data, size, seed):
    pattern = f"causal & ({data.draw(patterns(longest=30))})"
    module, x = build(attention(pattern)), make_x(30)
    y = jax.jit(module)(x)
    assert_close("staggered rows", extend(module, x, 30, stagger(30, size, seed)), y, "float32")


@pytest.mark.parametrize("kind", MIXED)
def test_the_tokens_after_those_of_a_row_may_be_anything(kind):
    module, x = build(next(iter(MIXED[kind].values()))), make_x(8)
    start, mask = module.init_cache(BATCH, 9), np.arange(8) < np.array([[5], [0]])
    context = Context(Tokens(mask=jnp.asarray(mask)))
    run = jax.jit(lambda x: module.extend(x, start, jnp.zeros(BATCH, jnp.int32), 9, context))
    (y, cache), (other, other_cache) = run(x), run(np.where(mask[..., None], x, np.float32(MISSING)))
    np.testing.assert_array_equal(y[0, :5], other[0, :5])
    jax.tree.map(np.testing.assert_array_equal, cache, other_cache)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), cache, start)


def test_a_copied_cache_is_a_fork():
    module, x = build(WRAPS["ring and pinned"]), make_x(60)
    run = jax.jit(lambda x, cache, at: module.extend(x, cache, jnp.full(len(x), at), 60))
    _, cache = run(x[:, :40], module.init_cache(BATCH, 60), 0)
    forks = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), cache)
    tails = np.repeat(x[:, 40:], 2, axis=0) * np.float32([1, -1, 1, -1])[:, None, None]
    y, _ = run(tails, forks, 40)
    whole = np.concatenate([np.repeat(x[:, :40], 2, axis=0), tails], axis=1)
    assert_close("forks", y, jax.jit(module)(whole)[:, 40:], "float32")


@pytest.mark.parametrize("kind", MIXED)
def test_bfloat16(kind):
    config = next(iter(MIXED[kind].values()))
    module = reference.fill(lambda: make_mixer(config, Stream(WIDTH, 1, jnp.bfloat16), nnx.Rngs(0)))
    x = jnp.asarray(make_x(12), jnp.bfloat16)
    run = jax.jit(lambda x, cache, at: module.extend(x, cache, jnp.full(BATCH, at), 12))
    first, cache = run(x[:, :7], module.init_cache(BATCH, 12), 0)
    last, _ = run(x[:, 7:], cache, 7)
    y = np.concatenate([first, last], axis=1).astype(np.float32)
    expected = np.asarray(jax.jit(module)(x), np.float32)
    np.testing.assert_allclose(y, expected, rtol=0, atol=0.03 * np.abs(expected).max())


class Sum(Mixer):
    """A mixer without a cache of its own: the sum of the inputs so far."""

    def __call__(self, x, context=None):
        return jnp.cumsum(x, axis=1)


def test_the_inputs_are_cached_by_default():
    module, x = Sum(MixerConfig(), Stream(WIDTH, 1, jnp.float32), nnx.Rngs(0)), make_x()
    for advances in (cut(LENGTH, 1), cut(LENGTH, 4), stagger(LENGTH, 5)):
        assert_close("chunks", extend(module, x, LENGTH, advances), np.cumsum(x, axis=1), "float32")


def test_lsh_gives_the_call_over_the_tokens_up_to_the_end_of_the_chunk():
    config = LshConfig(heads=2, head_width=3, chunk=4, buckets=(4,), hashes=2, causal=True, seed=0)
    module, x = build(config), make_x(20)
    run = jax.jit(lambda x, cache, at: module.extend(x, cache, jnp.full(BATCH, at), 20))
    first, cache = run(x[:, :11], module.init_cache(BATCH, 20), 0)
    second, cache = run(x[:, 11:19], cache, 11)
    last, _ = run(x[:, 19:], cache, 19)
    call = jax.jit(module)
    assert_close("first", first, call(x[:, :11]), "float32")
    assert_close("second", second, call(x[:, :19])[:, 11:], "float32")
    assert_close("last", last, call(x)[:, 19:], "float32")
