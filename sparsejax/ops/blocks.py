"""Consecutive keys in blocks of equal size, counted from the start of each document."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from sparsejax.errors import InputError


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("of_key", "starts", "numbers"), meta_fields=("size", "is_regular")
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a sequence, in order. Only the last block of a document may be short.

    Attributes:
      of_key: Index of the block of each key; the leading axis is 1 if all sequences have the same blocks.
      starts: First key of each block; s for an index without a block.
      numbers: Index of each block within its document.
      size: Keys per block.
      is_regular: Whether block i starts at key `i * size`, as without documents.
    """

    of_key: Int[Array, "#b s"]
    starts: Int[Array, "#b n"]
    numbers: Int[Array, "#b n"]
    size: int
    is_regular: bool

    @property
    def count(self) -> int:
        """Number of indices, an upper bound of the number of blocks."""
        return self.starts.shape[1]

    def keys(self, blocks: Int[Array, " b *shape"]) -> Int[Array, "b *shape size"]:
        """The keys of blocks; -1 for keys past the end and for the block -1."""
        shape = (blocks.shape[0], *self.starts.shape[1:])
        starts = jnp.take_along_axis(
            jnp.broadcast_to(self.starts, shape), jnp.maximum(blocks, 0).reshape(blocks.shape[0], -1), axis=1
        )
        keys = starts.reshape(*blocks.shape, 1) + jnp.arange(self.size)
        last = self.of_key.shape[1] - 1
        of_key = jnp.broadcast_to(self.of_key, (blocks.shape[0], last + 1))
        actual = jnp.take_along_axis(of_key, jnp.clip(keys, 0, last).reshape(blocks.shape[0], -1), axis=1)
        inside = (keys <= last) & (actual.reshape(keys.shape) == blocks[..., None])
        return jnp.where(inside, keys, -1)

    def split(self, x: Shaped[Array, "b *rest s"], fill: float | bool) -> Shaped[Array, "b *rest n size"]:
        """Splits the last axis into blocks, which are filled up with `fill`."""
        if self.is_regular:
            padding = self.count * self.size - x.shape[-1]
            padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)], constant_values=fill)
            return padded.reshape(*x.shape[:-1], self.count, self.size)
        b = x.shape[0]
        keys = self.keys(jnp.broadcast_to(jnp.arange(self.count), (b, self.count)))
        index = jnp.maximum(keys, 0).reshape(b, *(1,) * (x.ndim - 2), -1)
        taken = jnp.take_along_axis(x, index, axis=-1).reshape(*x.shape[:-1], self.count, self.size)
        return jnp.where((keys >= 0).reshape(b, *(1,) * (x.ndim - 2), *keys.shape[1:]), taken, fill)


def make_blocks(length: int, size: int, segments: Int[Array, "b s"] | None = None) -> Blocks:
    """Returns the blocks of a sequence.

    With segments, each run of equal ids is a document, and there are as many indices as keys.

    Args:
      length: Number of keys.
      size: Keys per block.
      segments: Segment ids of the keys.

    Raises:
      InputError: The size is below 1.
    """
    if size < 1:
        raise InputError("size", f"{size} is below 1")
    if segments is None or size == 1:
        starts = jnp.arange(0, length, size)[None]
        return Blocks(jnp.arange(length)[None] // size, starts, starts // size, size, True)
    offsets = jnp.arange(length) - document_starts(segments)
    of_key = jnp.cumsum(offsets % size == 0, axis=1) - 1
    rows = jnp.arange(segments.shape[0])[:, None]
    starts = jnp.full_like(of_key, length).at[rows, of_key].min(jnp.arange(length)[None])
    numbers = jnp.zeros_like(of_key).at[rows, of_key].set(offsets // size)
    return Blocks(of_key, starts, numbers, size, False)


def document_starts(segments: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """Position at which the run of equal segment ids around each token starts."""
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(changes, jnp.arange(segments.shape[1]), 0), axis=1)
