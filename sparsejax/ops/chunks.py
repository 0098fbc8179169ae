"""Walks over a sequence in chunks, for recurrences that keep one state for each chunk and compute the rest again."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped


def scan_chunks(
    run: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    state: PyTree,
    inputs: PyTree[Shaped[Array, "b t ..."]],
    length: int,
) -> tuple[PyTree, PyTree[Shaped[Array, "b t ..."]]]:
    """`jax.lax.scan` over the chunks of a sequence.

    Args:
      run: takes the state before a chunk and the chunk's inputs [b, c, ...]; returns the state after it and its
        outputs [b, c, ...]. A position whose inputs are all zeros (or False) must leave the state as it is: the last
        chunk is filled up with such.
      state: the state before the first position.
      inputs: arrays [b, t, ...], at least one.
      length: positions of a chunk; a shorter sequence is one chunk.

    Returns:
      The state after the last position, and the outputs of all positions. The backward pass is given the state before
      each chunk and the inputs, and computes a chunk's other values again.
    """
    t = jax.tree.leaves(inputs)[0].shape[1]
    length = min(length, t)

    def split(x: Array) -> Array:
        x = fill_chunks(x, length, 1)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]

    # Inside of a loop nothing merges the second computation with the first, so XLA need not be hindered from it.
    again = jax.checkpoint(run, prevent_cse=False)
    state, outputs = jax.lax.scan(again, state, jax.tree.map(split, inputs))
    return state, jax.tree.map(join, outputs)


def spread(x: Array, size: int, axis: int = -1) -> Array:
    """`x` repeated `size` times along a new axis.

    As a product with ones, so that its transpose is one too. The transpose of a broadcast is a sum, which XLA fuses
    with the multiplication before it into a loop that on CPU takes several times as long as a matrix product.
    """
    ones = jnp.ones(size, x.dtype)
    return jnp.moveaxis(jnp.einsum("...,n->...n", x, ones, precision=jax.lax.Precision.HIGHEST), -1, axis)


def fill_chunks(x: Shaped[Array, "*shape"], length: int, axis: int) -> Shaped[Array, "*longer"]:
    """Zeros appended to an axis, so that it divides into chunks of this length."""
    return jnp.pad(x, [(0, -x.shape[i] % length if i == axis else 0) for i in range(x.ndim)])
