"""Properties that every causal mixer has, as assertions."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.layers import Context, Mixer, Tokens
from tests.tolerances import assert_close


def assert_chunks_equal_whole(mixer: Mixer, x: np.ndarray, chunks: Iterable[tuple[int, tuple[int, int]]]) -> dict:
    """Extends two rows x [2, t, m] by chunks, each a size and the tokens of each row; returns the cache after them.

    The outputs are those of the whole sequence, and the cache keeps its shapes and dtypes.
    """
    x, length = jnp.asarray(x), x.shape[1]
    whole, cache, at = jax.jit(mixer.__call__)(x), mixer.init_cache(2, length), np.zeros(2, int)
    extend = jax.jit(mixer.extend, static_argnums=3)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache)
    for size, counts in chunks:
        rows = jnp.stack([jnp.pad(x[i], ((0, length), (0, 0)))[at[i] : at[i] + size] for i in range(2)])
        mask = jnp.arange(size) < jnp.asarray(counts)[:, None]
        y, cache = extend(rows, cache, jnp.asarray(at), length, Context(Tokens(mask=mask)))
        for i, count in enumerate(counts):
            assert_close(f"row {i} at {at[i]}", y[i, :count], whole[i, at[i] : at[i] + count], "float32")
        at += counts
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache) == before
    return cache


def assert_later_tokens_change_nothing(mixer: Mixer, x: np.ndarray, cuts: Iterable[int]) -> None:
    """Replaces everything from each cut on: the outputs before it stay bit for bit."""
    random, run = np.random.default_rng(1), jax.jit(mixer.__call__)
    before = run(x)
    for cut in cuts:
        edited = np.concatenate([x[:, :cut], random.normal(size=x[:, cut:].shape)], axis=1).astype(np.float32)
        np.testing.assert_array_equal(run(edited)[:, :cut], before[:, :cut])


def assert_only_the_indexer_learns(mixer: Mixer, x: np.ndarray) -> None:
    """The loss of an indexer reaches its parameters, all of them, and neither other parameters nor the stream."""
    graph, parameters = nnx.split(mixer)

    @jax.jit
    @jax.grad
    def differentiate(both: tuple) -> jax.Array:
        parameters, x = both
        return nnx.merge(graph, parameters).mix(x)[1].losses["indexer"]

    gradient, of_x = differentiate((parameters, jnp.asarray(x)))
    np.testing.assert_array_equal(of_x, 0)
    gradient = nnx.to_pure_dict(gradient)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient.pop("indexer")))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
