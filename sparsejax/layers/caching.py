"""Chunks of sequences whose past is in a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sparsejax.layers.context import Tokens
from sparsejax.patterns import CachePlan

Arrays = dict[str, Array]


def chunk_positions(positions: Int[Array, " b"], size: int) -> Int[Array, "b c"]:
    """Position of each token of a chunk, given those of the first tokens."""
    return positions[:, None] + jnp.arange(size)


def write_slots(
    cache: Shaped[Array, "b ..."],
    values: Shaped[Array, "b ..."],
    slots: Int[Array, "b c"],
    tokens: Tokens,
    axis: int = 1,
) -> Shaped[Array, "b ..."]:
    """Writes a value per token of a chunk to its slot, except at padding and where the slot is out of range.

    Args:
      cache: The slots, on `axis`.
      values: The tokens, on `axis`; the other axes are those of `cache`.
      slots: Slot of each token. Tokens that are written to a row have different ones.
      tokens: Facts about the chunk.
      axis: An axis after the first.
    """
    slots = slots if tokens.mask is None else jnp.where(tokens.mask, slots, cache.shape[axis])
    index = (slice(None),) * (axis - 1)
    write = jax.vmap(lambda cache, values, slots: cache.at[(*index, slots)].set(values, mode="drop"))
    values = values.astype(cache.dtype)
    if cache.dtype == jnp.bfloat16:  # XLA's CPU compiler converts the whole cache to float32 to write to it
        return write(cache.view(jnp.uint16), values.view(jnp.uint16), slots).view(cache.dtype)
    return write(cache, values, slots)


def add_to_blocks(
    sums: Float[Array, "b n ..."], values: Float[Array, "b c ..."], at: Int[Array, "b c"], size: int, tokens: Tokens
) -> Float[Array, "b n ..."]:
    """Adds the values of a chunk to the sums of the blocks of `size` tokens that they are in, except at padding.

    Args:
      sums: A sum per block.
      values: A value per token.
      at: Positions of the tokens.
      size: Tokens per block.
      tokens: Facts about the chunk.
    """
    values = tokens.zero_padding(values).astype(sums.dtype)
    return sums.at[jnp.arange(len(sums))[:, None], at // size].add(values, mode="drop")


def extend_keys(
    plan: CachePlan, cache: Arrays, entries: Arrays, positions: Int[Array, " b"], tokens: Tokens, axis: int
) -> tuple[Arrays, Arrays, Int[Array, "b s"]]:
    """Writes the keys of a chunk to the cache.

    Args:
      plan: The slots of keys.
      cache: The cache before the chunk: arrays by name, with slots on `axis`.
      entries: What the cache keeps of the chunk, with tokens on `axis`.
      positions: Position of the first token of each row.
      tokens: Facts about the chunk.
      axis: An axis after the first.

    Returns:
      The cache after the chunk; the arrays to which the queries of the chunk attend; and the positions of their keys,
      -1 in an empty slot.
    """
    size = next(iter(entries.values())).shape[axis]
    at = chunk_positions(positions, size)
    end = positions + tokens.count(at.shape)
    # A ring may be shorter than the chunk, whose last tokens it keeps.
    slots = jnp.where(jnp.asarray(plan.overwritten)[at] < end[:, None], plan.count, jnp.asarray(plan.slots)[at])
    after = {name: write_slots(cache[name], entry, slots, tokens, axis) for name, entry in entries.items()}
    if size == 1 or plan.pinned == plan.count:  # no key that a query attends to is overwritten
        return after, after, plan.held(end)
    both = {
        name: jnp.concatenate([cache[name], entry.astype(cache[name].dtype)], axis) for name, entry in entries.items()
    }
    return after, both, jnp.concatenate([plan.held(positions), at], axis=1)
