"""Consecutive keys in blocks of equal size, or in overlapping windows, counted from the start of each document."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

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

    def part(self, first: Int[Array, " b"], count: int) -> Blocks:
        """`count` consecutive blocks from the block `first` of each sequence, as blocks 0, 1, ..."""
        starts, numbers = (take_from(x, first, count) for x in (self.starts, self.numbers))
        return Blocks(self.of_key - first[:, None], starts, numbers, self.size, False)

    def split(self, x: Shaped[Array, "b *rest s"], fill: float | bool) -> Shaped[Array, "b *rest n size"]:
        """Splits the last axis into blocks, which are filled up with `fill`."""
        return split_equally(self.align(x, -1, fill), self.size, fill)

    def align(self, x: Shaped[Array, "#b ..."], axis: int, fill: float | int) -> Shaped[Array, "#b ..."]:
        """Pads blocks with `fill`, so that block i starts at entry `i * size` of the axis; the last may stay short."""
        if self.is_regular:
            return x
        b, axis = max(len(x), len(self.starts)), axis % x.ndim
        x = jnp.broadcast_to(x, (b, *x.shape[1:]))
        keys = self.keys(jnp.broadcast_to(jnp.arange(self.count), (b, self.count))).reshape(b, -1)
        taken = jax.vmap(lambda x, keys: jnp.take(x, jnp.maximum(keys, 0), axis=axis - 1))(x, keys)
        exists = (keys >= 0).reshape(b, *(1,) * (axis - 1), -1, *(1,) * (x.ndim - 1 - axis))
        return jnp.where(exists, taken, fill)


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
        numbers = starts // size if segments is None else starts - document_starts(segments)
        return Blocks(jnp.arange(length)[None] // size, starts, numbers, size, True)
    offsets = jnp.arange(length) - document_starts(segments)
    is_start = offsets % size == 0
    of_key = jnp.cumsum(is_start, axis=1) - 1
    at = jnp.where(is_start, of_key, length)
    starts, numbers = put(jnp.arange(length)[None], at, length, length), put(offsets // size, at, length, 0)
    return Blocks(of_key, starts, numbers, size, False)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("starts", "firsts"), meta_fields=("length", "stride", "is_regular")
)
@dataclasses.dataclass(frozen=True)
class Windows:
    """Overlapping windows of a sequence, in order. A window that does not end within its document does not exist.

    Attributes:
      starts: First key of each window; s for an index without a window.
      firsts: Index that the first window of the document of each key has, or would have.
      length: Keys per window.
      stride: Keys from one window to the next.
      is_regular: Whether window i starts at key `i * stride`, as without documents.
    """

    starts: Int[Array, "#b n"]
    firsts: Int[Array, "#b s"]
    length: int
    stride: int
    is_regular: bool

    @property
    def count(self) -> int:
        """Number of indices, an upper bound of the number of windows."""
        return self.starts.shape[1]

    def split(self, x: Shaped[Array, "b s *rest"]) -> Shaped[Array, "b n length *rest"]:
        """The keys of each window; any keys for an index without a window."""
        keys = jnp.minimum(self.starts[..., None] + jnp.arange(self.length), x.shape[1] - 1)
        return jax.vmap(lambda x, keys: x[keys])(x, jnp.broadcast_to(keys, (len(x), *keys.shape[1:])))

    def all(self, mask: Bool[Array, "#b c s"]) -> Bool[Array, "#b c n"]:
        """Whether all keys of each window are marked; False for an index without a window."""
        s, parts = mask.shape[-1], self.length // self.stride
        if self.is_regular:
            keys = (self.count + parts - 1) * self.stride
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, max(keys - s, 0))))[..., :keys]
            strides = mask.reshape(*mask.shape[:2], -1, self.stride).all(axis=-1)
            return jnp.stack([strides[..., part : part + self.count] for part in range(parts)]).all(axis=0)
        before = jnp.pad(jnp.cumsum(mask, axis=-1), ((0, 0), (0, 0), (1, 0)))
        first, last = (jnp.minimum(at, s)[:, None] for at in (self.starts, self.starts + self.length))
        counts = jnp.take_along_axis(before, last, axis=-1) - jnp.take_along_axis(before, first, axis=-1)
        return counts == self.length


def make_windows(keys: int, length: int, stride: int, segments: Int[Array, "b s"] | None = None) -> Windows:
    """Returns the windows of a sequence.

    Args:
      keys: Number of keys.
      length: Keys per window.
      stride: Keys from one window to the next, which divides the length.
      segments: Segment ids of the keys; each run of equal ids is a document.

    Raises:
      InputError: A size is below 1, or the stride does not divide the length.
    """
    if stride < 1:
        raise InputError("stride", f"{stride} is below 1")
    if length < 1 or length % stride:
        raise InputError("length", f"{length} is not a positive multiple of the stride {stride}")
    if segments is None:
        starts = jnp.arange(0, max(keys - length, 0) + 1, stride)[None]
        starts = starts if length <= keys else starts + keys
        return Windows(starts, jnp.zeros((1, keys), jnp.int32), length, stride, True)
    documents, positions = document_starts(segments), jnp.arange(keys)
    last = jnp.minimum(positions + length - 1, keys - 1)
    is_start = ((positions - documents) % stride == 0) & (documents[:, last] == documents)
    is_start &= positions + length <= keys
    before = jnp.cumsum(is_start, axis=1) - is_start
    count = max(keys // stride, 1)  # as length >= stride
    starts = put(positions[None], jnp.where(is_start, before, count), count, keys)
    return Windows(starts, jnp.take_along_axis(before, documents, axis=1), length, stride, False)


def split_equally(x: Shaped[Array, "*rest s"], size: int, fill: float | bool) -> Shaped[Array, "*rest n size"]:
    """Splits the last axis into blocks of equal size, of which the last is filled up with `fill`."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)], constant_values=fill)
    return padded.reshape(*x.shape[:-1], -1, size)


def take_from(x: Shaped[Array, "b n ..."], first: Int[Array, " b"], count: int) -> Shaped[Array, "b count ..."]:
    """`count` consecutive entries of each sequence, from the entry `first`."""
    return jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, count))(x, first)


def put(x: Shaped[Array, "#b #s"], at: Int[Array, "b s"], count: int, fill: int) -> Shaped[Array, "b n"]:
    """Rows of `fill` with the values of `x` at the entries `at`; those from `count` on are dropped.

    XLA's partitioner splits the rows of a scatter that `jax.vmap` makes, and gathers those of any other.
    """

    def put_row(x: Shaped[Array, " s"], at: Int[Array, " s"]) -> Shaped[Array, " n"]:
        return jnp.full(count, fill, x.dtype).at[at].set(x, mode="drop")

    return jax.vmap(put_row)(jnp.broadcast_to(x, at.shape), at)


def document_starts(segments: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """Position at which the run of equal segment ids around each token starts."""
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(changes, jnp.arange(segments.shape[1]), 0), axis=1)
