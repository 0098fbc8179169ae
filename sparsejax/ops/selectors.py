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
from sparsejax.ops.blocks import Blocks, Windows, document_starts, make_blocks, make_windows, split_equally
from sparsejax.ops.selection import (
    Selection,
    Visible,
    choose,
    find_largest,
    mark_forced,
    over_queries,
    score_tiles,
    select,
    tiled_chunk,
)
from sparsejax.ops.softmax import confine_nan, masked_softmax
from sparsejax.patterns import Pattern

Segments = tuple[Int[Array, "b t"], Int[Array, "b s"]] | None
Positions = tuple[Int[Array, "b t"], Int[Array, "b s"]] | None


def _mean(x: Float[Array, "*blocks size"], axis: int) -> Float[Array, "*blocks"]:
    """The mean of the visible scores of each block; minus infinity without any."""
    visible = x > -jnp.inf
    count = visible.sum(axis=axis)
    return jnp.where(count > 0, jnp.where(visible, x, 0.0).sum(axis=axis) / jnp.maximum(count, 1), -jnp.inf)


POOLINGS: dict[str, Callable[..., Array]] = {"max": jnp.max, "mean": _mean, "logsumexp": jax.nn.logsumexp}


def top_tokens(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    top_k: int,
    pattern: Pattern,
    *,
    scope: str = "query_head",
    pooling: str = "logits",
    mass: float = 1.0,
    scale: float | None = None,
    segments: Segments = None,
    positions: Positions = None,
    length: int | None = None,
) -> Selection:
    """Exact top-k: the keys with the largest logits, the oracle of every mechanism; with `mass`, exact top-p.

    Args:
      q: Queries.
      k: Keys.
      top_k: Keys per query.
      pattern: The allowed keys.
      scope: "query_head": one choice per query head; "kv_head": one per key/value head.
      pooling: How "kv_head" combines its query heads: sums of "logits", or of "probabilities" over all allowed keys.
      mass: Probability that the keys hold: only the fewest that hold it are chosen, at most `top_k`; 1 for no bound.
        The probabilities of "kv_head" are means over its query heads.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`; key i is at position i.
      length: Length of the sequence that the pattern describes.

    Raises:
      InputError: An argument is invalid.
    """
    _require_choice(scope=(scope, ("query_head", "kv_head")), pooling=(pooling, ("logits", "probabilities")))
    _require_positive(top_k=top_k)
    if not 0 < mass <= 1:
        raise InputError("mass", f"{mass} is not in (0, 1]")
    groups = k.shape[2]

    def combine(x: Array) -> Array:  # [b, h, c, s]
        return x if scope == "query_head" else x.reshape(x.shape[0], groups, -1, *x.shape[2:]).sum(axis=2)

    def score(keys: Array, q: Array, visible: Visible) -> tuple[Array, None]:
        logits = _logits(q, keys, scale)
        p, _ = masked_softmax(logits, visible.keys[:, None], None)
        scores = combine(p if scope == "kv_head" and pooling == "probabilities" else logits)
        if mass == 1:
            return scores, None
        p = combine(p) / (1 if scope == "query_head" else q.shape[2] // groups)
        return jnp.where(_holds(p, mass), scores, -jnp.inf), None

    blocks, options = make_blocks(k.shape[1], 1), _options(segments, positions, length)
    return select(score, q, k, blocks, top_k, pattern, prepare=_heads_first, **options)


def _holds(p: Float[Array, "*b s"], mass: float) -> Bool[Array, "*b s"]:
    """Whether a key is among the fewest that hold `mass`, the largest first; of equal ones the lower index."""
    largest, order = find_largest(p, p.shape[-1])
    before = jnp.cumsum(largest, axis=-1) - largest
    return jnp.take_along_axis(before < mass, jnp.argsort(order, axis=-1), axis=-1)


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
    blocks = _blocks(k, tile, segments)

    def score(keys: Array, q: Array, visible: Visible) -> tuple[Array, None]:
        def pool(keys: Array, mask: Array) -> Array:
            logits = jnp.where(mask[:, None], _logits(q, keys, scale), -jnp.inf)
            return POOLINGS[pooling](split_equally(logits, tile, -jnp.inf), axis=-1)

        return _share(score_tiles(pool, keys, visible), query_tile), None

    options = _options(segments, positions, length) | {"chunk": tiled_chunk(blocks)}
    return select(score, q, k, blocks, top_k, pattern, prepare=_heads_first, **options)


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
    means: Float[Array, "b n g d"] | None = None,
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
      means: Mean key of each block before that of a query; defaults to those of `k`.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`; key i is at position i.
      length: Length of the sequence that the pattern describes.
    """
    _require_positive(block=block, top_k=top_k)
    blocks = _blocks(k, block, segments)
    means = block_means(k, blocks) if means is None else means

    def score(means: Array, q: Array, visible: Visible) -> tuple[Array, Array]:
        return _logits(q, jnp.swapaxes(visible.take(means), 1, 2), 1.0), visible.force(0, 1)

    return select(score, q, means, blocks, top_k, pattern, **_options(segments, positions, length))


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
    includes_self: bool = True,
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
      includes_self: Whether a query attends to itself; else only if no other of its tokens is among them.
      segments: Segment ids.

    Raises:
      InputError: `members` is below 1.
    """
    _require_positive(members=members)
    b, t = x.shape[:2]
    clusters = nearest_centroid(x, centroids)
    starts = jnp.zeros((b, t), jnp.int32) if segments is None else document_starts(segments)
    keys = last_members(starts[:, None] * centroids.shape[1] + clusters, members)
    if not includes_self:  # a query is the last of its tokens
        keys = jnp.where((keys == jnp.arange(t)[:, None]) & (keys[..., :1] != keys), -1, keys)
    return Selection(keys, make_blocks(t, 1))


def last_members(labels: Int[Array, "b g t"], members: int) -> Int[Array, "b g t w"]:
    """The last `members` tokens with the label of each token, itself included, ascending, with -1 at the end."""
    t = labels.shape[-1]
    order = jnp.argsort(labels, axis=-1, stable=True)  # by label, then by position
    ranks = jnp.argsort(order, axis=-1)
    at = ranks[..., None] - jnp.arange(min(members, t))[::-1]
    members_at = jnp.take_along_axis(order, jnp.maximum(at, 0).reshape(*at.shape[:2], -1), axis=-1)
    member_labels = jnp.take_along_axis(labels, members_at, axis=-1).reshape(at.shape)
    kept = (at >= 0) & (member_labels == labels[..., None])
    keys = jnp.sort(jnp.where(kept, members_at.reshape(at.shape), t), axis=-1)
    return jnp.where(keys < t, keys, -1)


def nearest_centroid(x: Float[Array, "b t g d"], centroids: Float[Array, "g c d"]) -> Int[Array, "b g t"]:
    """Index of the centroid with the largest product."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    products = jnp.einsum("btgd,gcd->bgtc", x.astype(dtype), centroids.astype(dtype))
    return jax.lax.stop_gradient(products).argmax(axis=-1)


def nsa(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b n g d"],
    v: Float[Array, "b n g value"],
    windows: Windows,
    blocks: Blocks,
    count: int,
    pattern: Pattern,
    *,
    initial: int = 1,
    local: int = 2,
    scale: float | None = None,
    segments: Segments = None,
    positions: Positions = None,
    length: int | None = None,
) -> tuple[Float[Array, "b t h value"], Selection]:
    """Two branches of native sparse attention (NSA, arXiv:2502.11089): attention to windows, and the choice of blocks.

    A query attends to a key and a value per window, all of whose keys it may attend to (eq. 7). The score of a block is
    the probability of the windows that overlap it, each times the number of strides that they share (eq. 8 and 9),
    summed over the query heads of a key/value head (eq. 10). Equation 9 of the paper prints the offsets with the
    opposite sign, which would count windows before the block.

    Args:
      q: Queries.
      k: A key per window, such as `windows.split(keys).mean(axis=2)`.
      v: A value per window.
      windows: The windows of the sequence.
      blocks: The blocks, of a multiple of the stride of the windows.
      count: Blocks per query and key/value head.
      pattern: The allowed keys; a pattern without heads.
      initial: First blocks of the document that are always chosen.
      local: Last blocks, with that of the query, that are always chosen.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`; key i is at position i.
      length: Length of the sequence that the pattern describes.

    Returns:
      The output of attention to windows, in float32, zeros for a query without a window; and the chosen blocks.

    Raises:
      InputError: The count is below 1, or the stride of the windows does not divide the size of a block.
    """
    _require_positive(count=count)
    offsets, shared = _list_overlaps(windows, blocks)
    _, k, v = confine_nan(q, k, v)

    def attend(keys: tuple[Array, Array], q: Array, visible: Visible) -> tuple[Array, Array, Array]:
        k, v = keys
        p = _window_probabilities(q, jnp.swapaxes(k, 1, 2), windows, visible, scale)
        out = jnp.einsum("bgrcn,bnge->bgrce", p, v, precision=jax.lax.Precision.HIGHEST)
        overlapping = _overlapping(jax.lax.stop_gradient(p).sum(axis=2), windows, visible.blocks, offsets)
        scores = (overlapping * jnp.asarray(shared, p.dtype)).sum(axis=-1)
        allowed, forced = (visible.count_keys() > 0)[:, None], visible.force(initial, local)
        groups = choose(scores, allowed, count, forced)
        out = out.reshape(out.shape[0], -1, *out.shape[3:])
        return out, visible.number(groups), mark_forced(forced, groups)

    options = _options(segments, positions, length)
    out, groups, forced = over_queries(attend, q, (k, v), pattern, blocks, **options)
    return out, Selection(jnp.moveaxis(groups, 1, 2), blocks, jnp.moveaxis(forced, 1, 2))


def nsa_pairs(tokens: int, length: int, stride: int, block: int, count: int, window: int) -> int:
    """Number of pairs that a query head of NSA scores over `tokens` tokens, in all branches."""
    t = np.arange(tokens)
    windows = np.maximum((t + 1 - length) // stride + 1, 0)
    selected = np.minimum(t // block, count - 1) * block + t % block + 1
    return int((windows + selected + np.minimum(t + 1, window)).sum())


def infllm(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    block: int,
    count: int,
    pattern: Pattern,
    *,
    window: int = 32,
    stride: int = 16,
    initial: int = 1,
    local: int = 1,
    dense_below: int = 0,
    scale: float | None = None,
    segments: Segments = None,
    positions: Positions = None,
    length: int | None = None,
) -> Selection:
    """InfLLM-V2 (arXiv:2509.24663): the blocks that overlap the windows to which a query would attend most.

    A window has the mean of its keys. Its score is its softmax probability, summed over the query heads of a key/value
    head, and the score of a block is the largest of the windows that overlap it. The softmax is exact; the published
    kernel approximates its normalizer by longer windows.

    The published model is dense in sequences below a length, which a decoder does not know in advance. Here a query
    with fewer than `dense_below` keys before it in its document attends to all of them. In longer sequences this
    differs from the published model in the queries from `count * block` to `dense_below`.

    Args:
      q: Queries, rotated.
      k: Keys, rotated.
      block: Keys per block; a multiple of the stride.
      count: Blocks per query and key/value head.
      pattern: The allowed keys.
      window: Keys per window; a multiple of the stride.
      stride: Keys from one window to the next.
      initial: First blocks of the document that are always chosen.
      local: Last blocks, with that of the query, that are always chosen.
      dense_below: Number of keys before a query in its document, below which it chooses all blocks.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`; key i is at position i.
      length: Length of the sequence that the pattern describes.

    Raises:
      InputError: A size is below 1, or the stride divides `window` or `block` with a remainder.
    """
    _require_positive(block=block, count=count, window=window, stride=stride)
    if window % stride:
        raise InputError("window", f"{window} is not a multiple of the stride {stride}")
    ids = None if segments is None else segments[1]
    windows, blocks = make_windows(k.shape[1], window, stride, ids), _blocks(k, block, segments)
    offsets, _ = _list_overlaps(windows, blocks)
    means = windows.split(k).mean(axis=2, dtype=jnp.promote_types(k.dtype, jnp.float32))

    def choose_chunk(means: Array, q: Array, visible: Visible) -> tuple[Array, Array]:
        p = _window_probabilities(q, means, windows, visible, scale).sum(axis=2)
        scores = _overlapping(p, windows, visible.blocks, offsets).max(axis=-1)
        allowed, forced = (visible.count_keys() > 0)[:, None], visible.force(initial, local)
        groups, most = choose(scores, allowed, count, forced), min(-(-dense_below // block), visible.blocks.count)
        if groups.shape[-1] < most:
            groups = jnp.pad(groups, ((0, 0),) * 3 + ((0, most - groups.shape[-1]),), constant_values=-1)
            is_dense = (_position_in_document(visible) < dense_below)[:, None, :, None]
            groups, forced = jnp.where(is_dense, choose(scores, allowed, most), groups), forced | is_dense
        return visible.number(groups), mark_forced(forced, groups)

    q, options = jax.lax.stop_gradient(q), _options(segments, positions, length)
    groups, forced = over_queries(choose_chunk, q, means, pattern, blocks, prepare=_heads_first, **options)
    return Selection(jnp.moveaxis(groups, 1, 2), blocks, jnp.moveaxis(forced, 1, 2))


def _window_probabilities(
    q: Float[Array, "b c h d"], k: Float[Array, "b g n d"], windows: Windows, visible: Visible, scale: float | None
) -> Float[Array, "b g r c n"]:
    """Softmax over the windows that a query may attend to."""
    p, _ = masked_softmax(_logits(q, k, scale), windows.all(visible.keys)[:, None], None)
    return p.reshape(p.shape[0], k.shape[1], -1, *p.shape[2:])


def _list_overlaps(windows: Windows, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """The windows that overlap a block, in strides from its start, and the number of strides that they share."""
    if blocks.size % windows.stride:
        raise InputError("block", f"{blocks.size} is not a multiple of the stride {windows.stride}")
    parts = (np.arange(size // windows.stride) for size in (blocks.size, windows.length))
    return np.unique(np.subtract.outer(*parts), return_counts=True)


def _overlapping(
    p: Float[Array, "b g c n"], windows: Windows, blocks: Blocks, offsets: np.ndarray
) -> Float[Array, "b g c blocks overlaps"]:
    """The probabilities of the windows that overlap each block; zeros where there is no window of its document."""
    starts = jnp.minimum(blocks.starts, blocks.of_key.shape[1] - 1)
    numbers = (blocks.numbers * (blocks.size // windows.stride))[..., None] + offsets  # within the document
    at = jnp.take_along_axis(windows.firsts, starts, axis=1)[..., None] + numbers
    inside = (numbers >= 0) & (at < windows.count)
    index = jnp.clip(at, 0, windows.count - 1).reshape(len(at), 1, 1, -1)
    taken = jnp.take_along_axis(p, index, axis=-1).reshape(*p.shape[:3], *at.shape[1:])
    return jnp.where(inside[:, None, None], taken, 0.0)


def _blocks(k: Array, size: int, segments: Segments) -> Blocks:
    return make_blocks(k.shape[1], size, None if segments is None else segments[1])


def _position_in_document(visible: Visible) -> Int[Array, "#b c"]:
    """The number of keys before each query in its document."""
    current, blocks = visible.query_blocks(), visible.blocks
    starts, numbers = (jnp.take_along_axis(x, current, axis=1) for x in (blocks.starts, blocks.numbers))
    return visible.positions - starts + numbers * blocks.size


def _heads_first(k: Float[Array, "b n g d"]) -> Float[Array, "b g n d"]:
    """The keys, without a gradient, in the order of products."""
    return jnp.swapaxes(jax.lax.stop_gradient(k), 1, 2)


def _logits(q: Float[Array, "b c h d"], k: Float[Array, "b g n d"], scale: float | None) -> Float[Array, "b h c n"]:
    (b, c, h, d), g = q.shape, k.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = jnp.moveaxis(q.astype(dtype), 1, 2).reshape(b, g, h // g, c, d)
    logits = jnp.einsum("bgrcd,bgnd->bgrcn", q, k.astype(dtype), precision=jax.lax.Precision.HIGHEST)
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
