"""Mechanisms that choose keys by content, each as a score of blocks for `sparsejax.ops.selection.select`.

Every function returns a `Selection` of a whole sequence. Query head h reads key/value head `h // (h / g)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.errors import InputError
from sparsejax.ops.blocks import Blocks, document_starts, make_blocks
from sparsejax.ops.selection import Selection, Visible, block_of_query, over_queries, select
from sparsejax.ops.softmax import masked_softmax
from sparsejax.patterns import Pattern

Segments = tuple[Int[Array, "b t"], Int[Array, "b s"]] | None
Positions = tuple[Int[Array, "b t"], Int[Array, "b s"]] | None
POOLINGS: dict[str, Callable[..., Array]] = {
    "max": jnp.max,
    "mean": jnp.mean,
    "logsumexp": jax.nn.logsumexp,
}


def top_tokens(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    top_k: int,
    pattern: Pattern,
    *,
    scope: str = "query_head",
    pooling: str = "logits",
    scale: float | None = None,
    segments: Segments = None,
    positions: Positions = None,
    length: int | None = None,
) -> Selection:
    """Exact top-k: the keys with the largest logits, the oracle of every mechanism.

    Args:
      q: Queries.
      k: Keys.
      top_k: Keys per query.
      pattern: The allowed keys.
      scope: "query_head": one choice per query head; "kv_head": one per key/value head.
      pooling: How "kv_head" combines its query heads: sums of "logits", or of "probabilities" over all allowed keys.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`; key i is at position i.
      length: Length of the sequence that the pattern describes.

    Raises:
      InputError: An argument is invalid.
    """
    _require_choice(scope=(scope, ("query_head", "kv_head")), pooling=(pooling, ("logits", "probabilities")))
    _require_positive(top_k=top_k)
    groups, keys = k.shape[2], jax.lax.stop_gradient(k)

    def score(q: Array, visible: Visible) -> tuple[Array, None]:
        logits = _logits(q, keys, scale)
        if scope == "query_head":
            return logits, None
        if pooling == "probabilities":
            logits, _ = masked_softmax(logits, visible.keys[:, None], None)
        return logits.reshape(logits.shape[0], groups, -1, *logits.shape[2:]).sum(axis=2), None

    return select(score, q, make_blocks(k.shape[1], 1), top_k, pattern, **_options(segments, positions, length))


def top_tiles(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    tile: int,
    top_k: int,
    pattern: Pattern,
    *,
    query_tile: int = 1,
    pooling: str = "max",
    scale: float | None = None,
    segments: Segments = None,
    positions: Positions = None,
    length: int | None = None,
) -> Selection:
    """Tile top-k: per query head, the blocks whose pooled logits over the allowed keys are largest.

    With `query_tile` above 1 the queries of a tile choose together, by the largest of their scores. In a causal model a
    later query then moves the choice of an earlier one: such a choice leaks the future.

    Args:
      q: Queries.
      k: Keys.
      tile: Keys per block.
      top_k: Blocks per query.
      pattern: The allowed keys.
      query_tile: Queries that choose together; divides the number of queries that are scored at a time.
      pooling: "max", "mean" or "logsumexp".
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`; key i is at position i.
      length: Length of the sequence that the pattern describes.

    Raises:
      InputError: An argument is invalid.
    """
    _require_choice(pooling=(pooling, POOLINGS))
    _require_positive(tile=tile, top_k=top_k, query_tile=query_tile)
    blocks, keys = _blocks(k, tile, segments), jax.lax.stop_gradient(k)

    def score(q: Array, visible: Visible) -> tuple[Array, None]:
        logits = blocks.split(jnp.where(visible.keys[:, None], _logits(q, keys, scale), -jnp.inf), -jnp.inf)
        mask = jnp.isfinite(logits)
        pooled = POOLINGS[pooling](logits, axis=-1, **({"where": mask} if pooling == "mean" else {}))
        pooled = jnp.where(mask.any(axis=-1), pooled, -jnp.inf)
        return _share(pooled, query_tile), None

    return select(score, q, blocks, top_k, pattern, **_options(segments, positions, length))


def _share(scores: Float[Array, "b h c n"], query_tile: int) -> Float[Array, "b h c n"]:
    """The largest score of the queries of each tile."""
    b, h, c, n = scores.shape
    tiles = jnp.pad(scores, ((0, 0), (0, 0), (0, -c % query_tile), (0, 0)), constant_values=-jnp.inf)
    shared = tiles.reshape(b, h, -1, query_tile, n).max(axis=3)
    return jnp.repeat(shared, query_tile, axis=2)[:, :, :c]


def moba(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    block: int,
    top_k: int,
    pattern: Pattern,
    *,
    segments: Segments = None,
    positions: Positions = None,
    length: int | None = None,
) -> Selection:
    """Mixture of block attention (MoBA, arXiv:2502.13189): the blocks whose mean key has the largest product.

    The products are not scaled. The block of the query is always chosen and counts among `top_k`; its mean, which later
    keys enter, is never read.

    Args:
      q: Queries, rotated.
      k: Keys, rotated.
      block: Keys per block.
      top_k: Blocks per query and query head.
      pattern: The allowed keys.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`; key i is at position i.
      length: Length of the sequence that the pattern describes.
    """
    _require_positive(block=block, top_k=top_k)
    blocks = _blocks(k, block, segments)
    means = jax.lax.stop_gradient(block_means(k, blocks))

    def score(q: Array, visible: Visible) -> tuple[Array, Array]:
        current = block_of_query(visible, blocks)[..., None]
        return _logits(q, means, 1.0), (current == jnp.arange(blocks.count))[:, None]

    return select(score, q, blocks, top_k, pattern, **_options(segments, positions, length))


def block_means(x: Float[Array, "b s g d"], blocks: Blocks) -> Float[Array, "b n g d"]:
    """The mean over the keys of each block, in float32; zeros for an index without a block."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    of_key = jnp.broadcast_to(blocks.of_key, x.shape[:2])

    def sum_blocks(x: Array, of_key: Array) -> Array:
        return jax.ops.segment_sum(x, of_key, blocks.count, indices_are_sorted=True)

    sums = jax.vmap(sum_blocks)(x.astype(dtype), of_key)
    counts = jax.vmap(sum_blocks)(jnp.ones(of_key.shape, dtype), of_key)
    return sums / jnp.maximum(counts, 1)[..., None, None]


def route(
    x: Float[Array, "b t g d"],
    centroids: Float[Array, "g c d"],
    members: int,
    *,
    segments: Int[Array, "b t"] | None = None,
) -> Selection:
    """Causal k-means routing: a query attends to the last `members` tokens of its cluster, itself included.

    The cluster of a token is that of its nearest centroid by angle, which the token alone determines. The Routing
    Transformer (arXiv:2003.05997) instead gives each cluster the tokens nearest to its centroid over the whole
    sequence, which is not causal.

    Args:
      x: Vectors to route, of queries and keys alike.
      centroids: Vectors of unit length per key/value head.
      members: Tokens per query.
      segments: Segment ids.

    Raises:
      InputError: `members` is below 1.
    """
    _require_positive(members=members)
    b, t = x.shape[:2]
    clusters = nearest_centroid(x, centroids)
    starts = jnp.zeros((b, t), jnp.int32) if segments is None else document_starts(segments)
    labels = starts[:, None] * centroids.shape[1] + clusters
    order = jnp.argsort(labels, axis=-1, stable=True)  # by document and cluster, then by position
    ranks = jnp.argsort(order, axis=-1)
    back = jnp.arange(min(members, t))[::-1]
    at = ranks[..., None] - back
    members_at = jnp.take_along_axis(order, jnp.maximum(at, 0).reshape(*at.shape[:2], -1), axis=-1)
    member_labels = jnp.take_along_axis(labels, members_at, axis=-1).reshape(at.shape)
    kept = (at >= 0) & (member_labels == labels[..., None])
    keys = jnp.sort(jnp.where(kept, members_at.reshape(at.shape), t), axis=-1)
    return Selection(jnp.where(keys < t, keys, -1), make_blocks(t, 1))


def nearest_centroid(x: Float[Array, "b t g d"], centroids: Float[Array, "g c d"]) -> Int[Array, "b g t"]:
    """Index of the centroid with the largest product."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    products = jnp.einsum("btgd,gcd->bgtc", x.astype(dtype), centroids.astype(dtype))
    return jax.lax.stop_gradient(products).argmax(axis=-1)


def compress(x: Float[Array, "b s g d"], length: int, units: Blocks) -> Float[Array, "b n g d"]:
    """Means over overlapping windows of `length` tokens, one per block of `units` (NSA, arXiv:2502.11089, eq. 7).

    A window that its document ends has no meaning, see `find_windows`.

    Args:
      x: Keys or values.
      length: Tokens per window, a multiple of the stride.
      units: Blocks of the stride.

    Raises:
      InputError: The stride does not divide the length.
    """
    if length % units.size:
        raise InputError("length", f"{length} is not a multiple of the stride {units.size}")
    parts = length // units.size
    means = jnp.pad(block_means(x, units), ((0, 0), (0, parts - 1), (0, 0), (0, 0)))
    return jnp.stack([means[:, part : part + units.count] for part in range(parts)]).mean(axis=0)


def find_windows(visible: Visible, length: int, units: Blocks) -> Bool[Array, "b c n"]:
    """Whether a query may attend to all `length` tokens of each window, which begins at a block of `units`."""
    s = visible.keys.shape[-1]
    before = jnp.pad(jnp.cumsum(visible.keys, axis=-1), ((0, 0), (0, 0), (1, 0)))
    starts = units.starts[:, None]
    shape = jnp.broadcast_shapes(before.shape[:2], starts.shape[:2])
    before = jnp.broadcast_to(before, (*shape, s + 1))

    def count(at: Array) -> Array:
        return jnp.take_along_axis(before, jnp.broadcast_to(jnp.minimum(at, s), (*shape, units.count)), axis=-1)

    return count(starts + length) - count(starts) == length


def attend_windows(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g value"],
    length: int,
    stride: int,
    pattern: Pattern,
    *,
    scale: float | None = None,
    segments: Segments = None,
) -> Float[Array, "b t h value"]:
    """Softmax attention to the means of overlapping windows of keys and values: the compression branch of NSA.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      length: Tokens per window.
      stride: Tokens from one window to the next.
      pattern: The allowed keys; a query attends to a window all of whose tokens it may attend to.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.

    Returns:
      The output, zeros for a query without a window.
    """
    units = _blocks(k, stride, segments)
    keys, values = compress(k, length, units), compress(v, length, units)

    def attend(q: Array, visible: Visible) -> Array:
        p, _ = masked_softmax(_logits(q, keys, scale), find_windows(visible, length, units)[:, None], None)
        p = p.reshape(p.shape[0], values.shape[2], -1, *p.shape[2:])
        out = jnp.einsum("bgrcn,bnge->bgrce", p, values, precision=jax.lax.Precision.HIGHEST)
        return out.reshape(out.shape[0], -1, *out.shape[3:])

    return over_queries(attend, q, pattern, k.shape[1], segments=segments).astype(q.dtype)


def nsa(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    length: int,
    stride: int,
    block: int,
    count: int,
    pattern: Pattern,
    *,
    initial: int = 1,
    local: int = 2,
    scale: float | None = None,
    segments: Segments = None,
) -> Selection:
    """The selection branch of native sparse attention (NSA, arXiv:2502.11089, eq. 8 to 12), per key/value head.

    The score of a block is the probability that the compression branch gives to the windows that overlap it, each
    times the number of strides that they share, summed over the query heads of a key/value head. Equation 9 of the
    paper prints the offsets with the opposite sign, which would count windows before the block.

    Args:
      q: Queries.
      k: Keys of the compression branch.
      length: Tokens per window; a multiple of the stride.
      stride: Tokens from one window to the next.
      block: Tokens per block; a multiple of the stride.
      count: Blocks per query.
      pattern: The allowed keys.
      initial: First blocks of the document that are always chosen.
      local: Last blocks, with that of the query, that are always chosen.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.

    Raises:
      InputError: The stride divides `length` or `block` with a remainder.
    """
    _require_positive(length=length, stride=stride, block=block, count=count)
    if block % stride:
        raise InputError("block", f"{block} is not a multiple of the stride {stride}")
    units, blocks, groups = _blocks(k, stride, segments), _blocks(k, block, segments), k.shape[2]
    keys = jax.lax.stop_gradient(compress(k, length, units))
    firsts = jnp.take_along_axis(units.of_key, jnp.minimum(blocks.starts, k.shape[1] - 1), axis=1)  # unit of a block
    offsets = np.subtract.outer(np.arange(block // stride), np.arange(length // stride)).ravel()

    def score(q: Array, visible: Visible) -> tuple[Array, Array]:
        p, _ = masked_softmax(_logits(q, keys, scale), find_windows(visible, length, units)[:, None], None)
        p = p.reshape(p.shape[0], groups, -1, *p.shape[2:]).sum(axis=2)
        scores = jnp.zeros((*p.shape[:-1], blocks.count), p.dtype)
        for offset, shared in zip(*np.unique(offsets, return_counts=True), strict=True):
            at = firsts + int(offset)
            inside = ((at >= 0) & (at < units.count))[:, None, None]
            index = jnp.broadcast_to(jnp.clip(at, 0, units.count - 1)[:, None, None], scores.shape)
            scores += int(shared) * jnp.where(inside, jnp.take_along_axis(p, index, axis=-1), 0.0)
        current, indices = block_of_query(visible, blocks)[..., None], jnp.arange(blocks.count)
        forced = (blocks.numbers[:, None] < initial) | ((indices > current - local) & (indices <= current))
        return scores, forced[:, None]

    return select(score, q, blocks, count, pattern, segments=segments)


def _blocks(k: Array, size: int, segments: Segments) -> Blocks:
    return make_blocks(k.shape[1], size, None if segments is None else segments[1])


def _logits(q: Float[Array, "b c h d"], k: Float[Array, "b n g d"], scale: float | None) -> Float[Array, "b h c n"]:
    (b, c, h, d), g = q.shape, k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(b, c, g, h // g, d).astype(dtype)
    logits = jnp.einsum("bcgrd,bngd->bgrcn", q, k.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return logits.reshape(b, h, c, -1) * (d**-0.5 if scale is None else scale)


def _options(segments: Segments, positions: Positions, length: int | None) -> dict[str, Any]:
    return {"segments": segments, "positions": positions, "length": length}


def _require_choice(**choices: tuple[str, Iterable[str]]) -> None:
    for name, (value, options) in choices.items():
        if value not in options:
            raise InputError(name, f"{value!r} is not one of {', '.join(options)}")


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(name, f"{size} is below 1")
