"""Choices: each query attends to the groups of keys with the highest scores.

A group is a key or a block of consecutive keys (`sparsejax.ops.blocks`). Scores are float32, and no gradient flows
through a choice. Of equal scores the lower index wins. A pattern and segments restrict every choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from sparsejax.errors import InputError
from sparsejax.ops.blocks import Blocks, document_starts, make_blocks, put, split_equally, take_from
from sparsejax.ops.chunks import pad_to_multiple, vary_alike
from sparsejax.ops.device import on_cpu
from sparsejax.ops.sequence import divides, map_device, map_queries
from sparsejax.patterns import Pattern

CHUNK = 64  # queries whose scores are in memory at a time
QUERIES, KEYS = 256, 512  # that are scored at a time on a CPU: the scores of 8 heads fill 4 MiB


@functools.partial(jax.tree_util.register_dataclass, data_fields=("groups", "blocks", "forced"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Selection:
    """The groups that each query attends to.

    Attributes:
      groups: Indices of blocks, ascending and without repeats; -1 for none, at the end. The axis `scopes` has 1 entry
        if all heads attend to the same groups, or one per key/value head or per query head.
      blocks: The blocks.
      forced: Whether each of `groups` is chosen whatever its score; None if none is.
    """

    groups: Int[Array, "b scopes t k"]
    blocks: Blocks
    forced: Bool[Array, "b scopes t k"] | None = None

    @property
    def keys(self) -> Int[Array, "b scopes t keys"]:
        """The keys of each query; -1 for none."""
        keys = self.blocks.keys(self.groups)
        return keys.reshape(*keys.shape[:-2], -1)

    @property
    def mask(self) -> Bool[Array, "b scopes t s"]:
        """Whether each query chose each key."""
        return self._mark_keys(self.groups)

    @property
    def forced_mask(self) -> Bool[Array, "b scopes t s"]:
        """Whether each key is in a group that is chosen whatever its score."""
        forced = False if self.forced is None else self.forced
        return self._mark_keys(jnp.where(forced, self.groups, -1))

    def _mark_keys(self, groups: Int[Array, "b scopes t k"]) -> Bool[Array, "b scopes t s"]:
        """Whether each key is in one of the groups of a query."""
        count = self.blocks.count
        at = jnp.where(groups < 0, count, groups)
        marked = put(jnp.ones((1, 1), bool), at.reshape(-1, at.shape[-1]), count, False).reshape(*at.shape[:-1], count)
        return jnp.take_along_axis(marked, self.blocks.of_key[:, None, None], axis=-1)


class Visible(NamedTuple):
    """What a chunk of queries may attend to.

    Attributes:
      positions: Positions of the queries.
      keys: Whether the pattern and the segments allow each key.
      aligned: The same for the keys of `blocks`, see `Blocks.align`.
      blocks: The blocks of the documents of the queries, and perhaps others.
      first: Index of the first of them among all blocks; None if they are all blocks.
    """

    positions: Int[Array, "#b c"]
    keys: Bool[Array, "#b c s"]
    aligned: Bool[Array, "#b c keys"]
    blocks: Blocks
    first: Int[Array, " b"] | None = None

    def count_keys(self) -> Int[Array, "#b c n"]:
        """Number of keys of each block that a query may attend to."""
        if self.blocks.size == 1:
            return self.keys.astype(jnp.int32)
        return split_equally(self.aligned, self.blocks.size, False).sum(axis=-1)

    def query_blocks(self) -> Int[Array, "#b c"]:
        """The block of each query, which is at the position of its key."""
        of_key, at = self.blocks.of_key, self.positions
        shape = max(len(of_key), len(at)), at.shape[1]
        at = jnp.broadcast_to(jnp.minimum(at, of_key.shape[1] - 1), shape)
        return jnp.take_along_axis(jnp.broadcast_to(of_key, (shape[0], of_key.shape[1])), at, axis=1)

    def force(self, initial: int, local: int) -> Bool[Array, "#b 1 c n"]:
        """Whether each block is among the first of its document, or among the last up to that of the query."""
        current, indices = self.query_blocks()[..., None], jnp.arange(self.blocks.count)
        forced = (self.blocks.numbers[:, None] < initial) | ((indices > current - local) & (indices <= current))
        return forced[:, None]

    def take(self, x: Shaped[Array, "b all ..."]) -> Shaped[Array, "b n ..."]:
        """What belongs to these blocks, of arrays with an entry for every block."""
        return x if self.first is None else take_from(x, self.first, self.blocks.count)

    def number(self, groups: Int[Array, "b scopes c k"]) -> Int[Array, "b scopes c k"]:
        """The indices among all blocks of groups of these blocks."""
        return groups if self.first is None else jnp.where(groups < 0, -1, groups + self.first[:, None, None, None])


# From all keys and a chunk of queries: scores [b, scopes, c, n] of the blocks, and which are chosen whenever visible.
Score = Callable[[PyTree, PyTree, Visible], tuple[Float[Array, "b scopes c n"], Bool[Array, "#b #scopes c n"] | None]]


def choose(
    scores: Float[Array, "*batch n"],
    visible: Bool[Array, "*#batch n"],
    count: int,
    forced: Bool[Array, "*#batch n"] | None = None,
) -> Int[Array, "*batch k"]:
    """The min(count, n) best groups, ascending, with -1 at the end where fewer are visible.

    Args:
      scores: Score of each group.
      visible: Groups that may be chosen.
      count: Number of groups.
      forced: Groups that come before all others; they count among `count`.
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 would sort after 0.0
    if forced is not None:
        scores = jnp.where(forced, jnp.inf, scores)
    n = scores.shape[-1]
    best, groups = find_largest(jnp.where(visible, scores, -jnp.inf), min(count, n))
    return sort_groups(jnp.where(best > -jnp.inf, groups, -1), n)


def find_largest(
    x: Shaped[Array, "b *shape n"], count: int
) -> tuple[Shaped[Array, "b *shape k"], Int[Array, "b *shape k"]]:
    """`jax.lax.top_k`; each device sorts its rows, and of arrays [b, heads, ..., n] its heads."""
    heads = 1 if x.ndim > 2 else None
    return map_device(lambda x: tuple(jax.lax.top_k(x, count)), (x,), (heads,), (heads, heads))


def mark_forced(
    forced: Bool[Array, "#b #scopes c n"], groups: Int[Array, "b scopes c k"]
) -> Bool[Array, "b scopes c k"]:
    """Whether each of the chosen groups is among those that are forced."""
    forced = jnp.broadcast_to(forced, (*groups.shape[:-1], forced.shape[-1]))
    return (groups >= 0) & jnp.take_along_axis(forced, jnp.maximum(groups, 0), axis=-1)


def selection_of(chosen: Bool[Array, "b scopes t n"], blocks: Blocks | None = None) -> Selection:
    """The chosen blocks, by default single keys, as a selection that is as large as the mask."""
    count = chosen.shape[-1]
    groups = sort_groups(jnp.where(chosen, jnp.arange(count), -1), count)
    return Selection(groups, make_blocks(count, 1) if blocks is None else blocks)


def sort_groups(groups: Int[Array, "*batch k"], count: int) -> Int[Array, "*batch k"]:
    """Sorts indices below `count`, with -1 at the end."""
    groups = jnp.sort(jnp.where(groups < 0, count, groups), axis=-1)
    return jnp.where(groups < count, groups, -1)


def select(
    score: Score,
    arrays: PyTree[Shaped[Array, "b t ..."]],
    keys: PyTree[Shaped[Array, "b _ ..."]],
    blocks: Blocks,
    count: int,
    pattern: Pattern,
    *,
    complete: bool = False,
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    positions: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    length: int | None = None,
    chunk: int = CHUNK,
    prepare: Callable[[PyTree], PyTree] = lambda keys: keys,
) -> Selection:
    """Chooses `count` groups per query. Memory grows with the number of queries plus that of keys.

    Args:
      score: Scores of the blocks.
      arrays: What `score` reads of each query.
      keys: What it reads of all keys or blocks.
      blocks: The groups.
      count: Groups per query, including those that are forced.
      pattern: The allowed keys; a pattern without heads.
      complete: Whether only blocks all of whose keys a query may attend to compete. The block of the query is chosen
        besides `count` others unless it is complete.
      segments: Segment ids of queries and of keys; a query attends to keys of its segment.
      positions: Positions of queries and of keys, -1 for a key that does not exist. Defaults to 0, 1, ... for both.
      length: Length of the sequence that the pattern describes; defaults to the number of queries.
      chunk: Number of queries whose scores are in memory at a time.
      prepare: See `over_queries`.

    Raises:
      InputError: The count is below 1, or the pattern differs between heads.
    """
    if count < 1:
        raise InputError("count", f"{count} is below 1")

    def choose_chunk(
        keys: PyTree, chunk: PyTree, visible: Visible
    ) -> tuple[Int[Array, "b scopes c k"], Bool[Array, "b scopes c k"]]:
        (scores, forced), counts = score(keys, chunk, visible), visible.count_keys()[:, None]
        may_compete = counts == blocks.size if complete else counts > 0
        groups = choose(scores, may_compete, count, forced)
        if complete:
            current = visible.query_blocks()[:, None, :, None]
            is_open = jnp.take_along_axis(counts, current, axis=-1) < blocks.size
            last = jnp.broadcast_to(jnp.where(is_open, current, -1), (*groups.shape[:-1], 1))
            groups = sort_groups(jnp.concatenate([groups, last], axis=-1), visible.blocks.count)
            return visible.number(groups), (groups >= 0) & (groups == last)
        forced = mark_forced(jnp.zeros_like(may_compete) if forced is None else forced, groups)
        return visible.number(groups), forced

    arrays, keys = jax.lax.stop_gradient((arrays, keys))
    options = {"segments": segments, "positions": positions, "length": length, "chunk": chunk, "prepare": prepare}
    groups, forced = over_queries(choose_chunk, arrays, keys, pattern, blocks, **options)
    return Selection(jnp.moveaxis(groups, 1, 2), blocks, jnp.moveaxis(forced, 1, 2))


def tiled_chunk(blocks: Blocks) -> int:
    """Number of queries of a chunk whose keys are scored by `score_tiles`."""
    return QUERIES if on_cpu() and blocks.is_regular else CHUNK  # aligned blocks grow with the chunk


def score_tiles(
    score: Callable[[Array, Array], Float[Array, "b scopes c m"]],
    keys: Float[Array, "b *heads s d"],
    visible: Visible,
) -> Float[Array, "b scopes c n"]:
    """Scores of blocks from scores of their keys; minus infinity for a block without a visible key.

    On a CPU the keys are scored in tiles of whole blocks, so that the scores of a tile stay in the cache, and tiles
    without a visible key are skipped.

    Args:
      score: Maps the keys of consecutive blocks, [b, *heads, k, d], and whether each is visible, [#b, c, k], to the
        scores of these blocks. Blocks but the last have `blocks.size` keys, see `Blocks.align`.
      keys: The keys.
      visible: What a chunk of queries may attend to.
    """
    blocks = visible.blocks
    keys, mask = blocks.align(keys, -2, 0.0), visible.aligned
    size = blocks.size * max(1, KEYS // blocks.size)
    if mask.shape[-1] <= size or not on_cpu():
        return score(keys, mask)

    def split(x: Shaped[Array, "b ..."], axis: int) -> Shaped[Array, "tiles b ..."]:
        x = pad_to_multiple(x, size, axis)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)

    tiles = split(keys, keys.ndim - 2), split(mask, 2)
    shape = jax.eval_shape(score, *(x[0] for x in tiles))
    hidden = vary_alike((jnp.full(shape.shape, -jnp.inf, shape.dtype), tiles))[0]

    def visit(tile: tuple[Array, Array]) -> Float[Array, "b scopes c m"]:
        return jax.lax.cond(tile[1].any(), score, lambda *_: hidden, *tile)

    scores = jnp.moveaxis(jax.lax.map(visit, tiles), 0, 3)
    return scores.reshape(*scores.shape[:3], -1)[..., : blocks.count]


def over_queries(
    function: Callable[[PyTree, PyTree, Visible], PyTree],
    arrays: PyTree[Shaped[Array, "b t ..."]],
    keys: PyTree[Shaped[Array, "b _ ..."]],
    pattern: Pattern,
    blocks: Blocks,
    *,
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    positions: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    length: int | None = None,
    chunk: int = CHUNK,
    prepare: Callable[[PyTree], PyTree] = lambda keys: keys,
) -> PyTree[Shaped[Array, "b t ..."]]:
    """Applies a function to chunks of queries, and recomputes it in the backward pass.

    If the sequence is sharded, a shard visits its own queries, and `keys` are gathered.

    Args:
      function: Maps all keys, the arrays of a chunk [b, c, ...] and which keys it may attend to to arrays
        [b, heads, c, ...].
      arrays: Arrays of the queries.
      keys: Arrays of all keys, or of what stands for them.
      pattern: The allowed keys.
      blocks: The blocks of the keys. If they are of documents, a query attends to keys of its document.
      segments: See `select`.
      positions: See `select`.
      length: See `select`.
      chunk: Number of queries per chunk.
      prepare: Applied to all keys once, before the first chunk.

    Returns:
      The results with the axis of the queries in front: [b, t, heads, ...].

    Raises:
      InputError: The pattern differs between heads.
    """
    if pattern.heads is not None:
        raise InputError("pattern", f"{pattern} differs between heads")
    t, count = jax.tree.leaves(arrays)[0].shape[1], blocks.of_key.shape[1]
    length = t if length is None else length
    is_near = not blocks.is_regular and segments is not None and positions is None
    if is_near:
        documents = document_starts(segments[1])
        segments = jnp.where(segments[0] == segments[1], documents, -1), documents
    q_at, k_at = (jnp.arange(t)[None], None) if positions is None else positions
    q_ids, k_ids = (jnp.zeros((1, t), jnp.int32), None) if segments is None else segments

    def run(queries: tuple[PyTree, Array, Array], keys: tuple[PyTree, Array | None, Array | None], _: Any) -> PyTree:
        keys, k_at, k_ids = keys
        keys, k_at = prepare(keys), jnp.arange(count)[None] if k_at is None else k_at
        k_ids = jnp.zeros((1, count), jnp.int32) if k_ids is None else k_ids

        def run_chunk(chunk: tuple[PyTree, Array, Array]) -> PyTree:
            chunk_arrays, at, ids = chunk
            near, first = _near(blocks, ids) if is_near else (blocks, None)

            def allow(k_at: Array, k_ids: Array) -> Bool[Array, "#b c keys"]:
                allowed = pattern.allows(at[..., None], k_at[:, None], length, length) & (k_at >= 0)[:, None]
                return allowed & (ids[..., None] == k_ids[:, None])

            aligned = allow(near.align(k_at, -1, -1), near.align(k_ids, -1, -1))
            return function(keys, chunk_arrays, Visible(at, allow(k_at, k_ids), aligned, near, first))

        return _map_chunks(jax.checkpoint(run_chunk, prevent_cse=False), queries, chunk)

    queries, keys = (arrays, q_at, q_ids), (keys, k_at, k_ids)
    return map_queries(run, queries, keys) if divides(t) else run(queries, keys, ())


def _map_chunks(
    function: Callable[[PyTree], PyTree], queries: PyTree[Shaped[Array, "#b t ..."]], chunk: int
) -> PyTree[Shaped[Array, "b t ..."]]:
    """Maps chunks of queries to arrays [b, heads, c, ...] one after another, and joins these as [b, t, heads, ...]."""
    t = jax.tree.leaves(queries)[0].shape[1]
    size = min(t, chunk)

    def split(x: Shaped[Array, "b t ..."]) -> Shaped[Array, "chunks b c ..."]:
        x = pad_to_multiple(x, size, 1)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def join(x: Shaped[Array, "chunks b heads c ..."]) -> Shaped[Array, "b t heads ..."]:
        x = jnp.moveaxis(x, (0, 3), (1, 2))
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, queries)))


def _near(blocks: Blocks, documents: Int[Array, "b c"]) -> tuple[Blocks, Int[Array, " b"]]:
    """The blocks of the documents of consecutive queries, and the index of the first of them.

    Args:
      blocks: All blocks.
      documents: Start of the document of each query, or -1 for a query that attends to nothing.
    """
    first = jnp.take_along_axis(documents, (documents >= 0).argmax(axis=1)[:, None], axis=1)
    first = jnp.take_along_axis(blocks.of_key, jnp.maximum(first, 0), axis=1)[:, 0]
    # Each of d documents has at most one short block, and consecutive queries are in at most as many documents.
    count = min(blocks.count, blocks.of_key.shape[1] // blocks.size + documents.shape[1])
    first = jnp.minimum(first, blocks.count - count)
    return blocks.part(first, count), first
