"""The blocks that queries choose, as bits that kernels test within a tile.

The keys of a tile are divided into chunks. A query has one bit per block of a chunk, in one word or in several, and a
key has the number of its block within the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsejax.ops.blocks import Blocks
from sparsejax.ops.kernels.lists import CHOSEN, EMPTY, FULL, PARTIAL
from sparsejax.ops.selection import Selection

WORD = 32  # bits


class Choice(NamedTuple):
    """A choice as arrays of a kernel, padded to whole tiles.

    Attributes:
      words: Bits of each query and key tile: the words of the first chunk, those of the second, ...
      numbers: Number of the block of each key within its chunk; the leading axis is 1 if all sequences have the same.
    """

    words: Int[Array, "b scopes tiles n t"]
    numbers: Int[Array, "#b s"]


def choose_chunk(blocks: Blocks, sizes: Sequence[int], side: int) -> int:
    """Keys per chunk of tiles with `side` keys: the most, of descending `sizes`, whose blocks fit into one word."""
    fits = (size for size in sizes if side % size == 0 and blocks.is_regular and _max_blocks(blocks, size) <= WORD)
    return next(fits, sizes[-1])


def _max_blocks(blocks: Blocks, chunk: int) -> int:
    """Largest number of blocks in a chunk."""
    size = blocks.size
    if not blocks.is_regular:
        return chunk
    if chunk % size == 0 or size % chunk == 0:
        return max(chunk // size, 1)
    return min((chunk - 2) // size + 2, chunk)


def pack_choice(
    selection: Selection, tile: tuple[int, int], chunk: int
) -> tuple[Choice, Int[Array, "b scopes rows columns"]]:
    """Packs a choice, and returns the kind of each tile under the choice alone.

    A tile is FULL if all queries chose all blocks, EMPTY if none chose any, and else CHOSEN, or PARTIAL if a chunk has
    blocks beyond its first word.
    """
    blocks, groups = selection.blocks, selection.groups.astype(jnp.int32)
    t, s = groups.shape[2], blocks.of_key.shape[1]
    groups = jnp.pad(groups, ((0, 0), (0, 0), (0, -t % tile[0]), (0, 0)), constant_values=-1)[:, :, None]
    of_key = jnp.pad(blocks.of_key, ((0, 0), (0, -s % tile[1])), mode="edge").astype(jnp.int32)
    chunks = of_key.reshape(len(of_key), -1, chunk)
    first, last = chunks[..., 0], chunks[..., -1]
    number = groups - first[:, None, :, None, None]  # [b, scopes, chunks, t, k]
    inside = (number >= 0) & (groups <= last[:, None, :, None, None])
    bit = jnp.int32(1) << (number & (WORD - 1))
    parts = -(-_max_blocks(blocks, chunk) // WORD)
    words = [
        jnp.where(inside & (number // WORD == part), bit, 0).sum(axis=-1, dtype=jnp.int32) for part in range(parts)
    ]
    count = (last - first + 1)[:, None]
    every = [_lowest_bits(jnp.clip(count - WORD * part, 0, WORD))[..., None] for part in range(parts)]

    def by_tile(x: Array) -> Array:  # [b, scopes, chunks, parts, t] -> [b, scopes, tiles, n, t]
        return x.reshape(*x.shape[:2], -1, tile[1] // chunk * parts, x.shape[-1])

    packed, every = by_tile(jnp.stack(words, axis=3)), by_tile(jnp.stack(every, axis=3))
    rows = (*packed.shape[:-1], -1, tile[0])
    chosen = (packed != 0).reshape(rows).any(axis=(3, 5))
    filled = (packed == every).reshape(rows).all(axis=(3, 5))
    single = (count <= WORD).reshape(len(of_key), 1, -1, tile[1] // chunk).all(axis=3)[..., None]
    kinds = jnp.where(chosen, jnp.where(filled, FULL, jnp.where(single, CHOSEN, PARTIAL)), EMPTY)
    return Choice(packed, (chunks - first[..., None]).reshape(of_key.shape)), kinds.swapaxes(2, 3)


def _lowest_bits(count: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Words whose `count` lowest bits are set."""
    return jnp.where(count < WORD, (jnp.int32(1) << jnp.minimum(count, WORD - 1)) - 1, -1)
