"""Tile gather: each query tile gathers its live key tiles and attends to those alone.

A loop over query tiles keeps the scores of one tile in memory. The backward pass recomputes them from the saved
log-sum-exp and adds each tile's share to dk and dv in place, so that memory grows with the length and time with the
number of live tiles. Query tiles are grouped by their number of key tiles, so that a few global rows do not widen the
others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from sparsejax.ops import selected
from sparsejax.ops.call import AttentionCall, by_pattern
from sparsejax.ops.chunks import pad_to_multiple, vary_alike
from sparsejax.ops.derivatives import with_derivatives
from sparsejax.ops.masked import attend_masked
from sparsejax.ops.softmax import MASKED, add_alibi, log_multiplicity, log_sum, merge_lse, softcap, zero_nan
from sparsejax.patterns import Pattern, TileLayout

# Measured on CPU by `python -m benchmarks cpu_attention`: the large tile takes a third less time per pair as long as
# the scores of one step, over all sequences and heads, stay in the cache.
SMALL, LARGE = 64, 128
LARGE_AREA = 1.3  # largest ratio of pairs in live large tiles to pairs in live small tiles
LARGE_HEADS = 8  # largest number of sequences times heads
MAX_GROUPS = 4  # each group of rows compiles a loop
BLOCK = 8  # keys per chosen block from which on blocks are multiplied; below, tiles are masked

Row = tuple[Int[Array, ""], Int[Array, " degree"]]  # a query tile and its key tiles, -1 where padded
Groups = tuple[tuple[Int[Array, " rows"], Int[Array, "rows degree"]], ...]  # rows of similar degree


class Lists(NamedTuple):
    """The key tiles of each query tile, in positions of the arrays, and what they are in the sequence.

    Attributes:
      groups: Query tiles and their key tiles, -1 where padded. Query tiles past the last are computed and dropped.
      queries: Number of each query tile in the sequence; None if it is its position.
      keys: Number of each key tile in the sequence, -1 for one that does not exist; None if it is its position.
    """

    groups: Groups
    queries: Int[Array, " rows"] | None = None
    keys: Int[Array, " columns"] | None = None


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot compute the call, or None."""
    return "interpret=True is for Pallas kernels" if call.interpret else None


def run(call: AttentionCall, tile: int | None = None) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in `call.dtype`; `tile` defaults to that of `choose_tile`."""
    if call.selection is not None:
        attend = selected.attend_blocks if call.selection.blocks.size >= BLOCK else attend_masked
        return selected.run(call, call.selection, attend)
    return by_pattern(call, functools.partial(_run_pattern, tile=tile))


def choose_tile(pattern: Pattern, b: int, t: int, s: int, h: int) -> int:
    """The fastest tile for `b` sequences of `t` queries and `s` keys, and `h` heads."""
    area = {tile: len(pattern.layout(t, s, (tile, tile)).columns) * tile**2 for tile in (SMALL, LARGE)}
    return LARGE if b * h <= LARGE_HEADS and area[LARGE] <= LARGE_AREA * area[SMALL] else SMALL


def _run_pattern(call: AttentionCall, tile: int | None) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    q, k, v = call.q, call.k, call.v
    (b, t, h, _), s = q.shape, k.shape[1]
    tile = min(tile or choose_tile(call.pattern, b, t, s, h), -(-max(t, s) // 8) * 8)
    layout = call.pattern.layout(t, s, (tile, tile))
    partial = np.unique(layout.rows[~layout.full])
    always = call.segments is not None or call.pattern.repeats or s % tile
    groups = group_rows(layout)
    masked = [bool(always or (columns < 0).any() or np.isin(rows, partial).any()) for rows, columns in groups]
    out, lse = attend_tiles(call, tile, Lists(tuple(groups)), tuple(masked), (t, s))
    return out.reshape(b, -1, h, v.shape[-1])[:, :t].astype(q.dtype), lse.reshape(b, -1, h)[:, :t]


def attend_tiles(
    call: AttentionCall, tile: int, lists: Lists, masked: tuple[bool, ...], lengths: tuple[int, int]
) -> tuple[Float[Array, "b rows tile h value"], Float[Array, "b rows tile h"]]:
    """Output and log-sum-exp by query tile, in `call.dtype`.

    Args:
      call: Arguments of attention, whose queries and keys may be a part of those of the sequence, in tiles.
      tile: Tokens per tile.
      lists: The key tiles of each query tile; may be traced.
      masked: Whether each group of the lists has pairs that are not allowed.
      lengths: Number of queries and of keys that the pattern counts.
    """
    plan = TilePlan.of_call(call, tile, masked, lengths)
    segments = None if call.segments is None else tuple(_split_tiles(x, tile) for x in call.segments)
    per_head = (None if x is None else x.astype(call.dtype) for x in (call.sink_logits, call.alibi_slopes))
    tiles = (_split_tiles(x, tile) for x in (call.q, call.k, call.v))
    return _attend_tiles(plan, *tiles, *per_head, segments, jax.tree.map(jnp.asarray, lists))


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """The static part of a call: all but the arrays."""

    pattern: Pattern
    t: int
    s: int
    h: int
    g: int
    tile: int
    scale: float
    softcap: float | None
    dtype: jnp.dtype
    q_offset: int
    masked: tuple[bool, ...]

    @classmethod
    def of_call(cls, call: AttentionCall, tile: int, masked: tuple[bool, ...], lengths: tuple[int, int]) -> TilePlan:
        """The plan of a call; the arguments are those of `attend_tiles`."""
        heads = call.q.shape[2], call.k.shape[2]
        return cls(call.pattern, *lengths, *heads, tile, call.scale, call.softcap, call.dtype, call.q_offset, masked)


def _attend_tiles_plain(
    plan: TilePlan,
    q_tiles: Float[Array, "b rows tile h d"],
    k_tiles: Float[Array, "b columns tile g d"],
    v_tiles: Float[Array, "b columns tile g value"],
    sink: Float[Array, " h"] | None,
    slopes: Float[Array, " h"] | None,
    segments: tuple[Int[Array, "b rows tile"], Int[Array, "b columns tile"]] | None,
    lists: Lists,
) -> tuple[Float[Array, "b rows tile h value"], Float[Array, "b rows tile h"]]:
    """Output and log-sum-exp."""
    rows = q_tiles.shape[:-1]
    zeros = jnp.zeros((*rows, v_tiles.shape[-1]), plan.dtype), jnp.zeros(rows, plan.dtype)
    results, _ = vary_alike((zeros, q_tiles))
    operands = Operands(q_tiles, k_tiles, v_tiles, slopes, segments, lists)
    return attend_rows(plan, results, operands, sink, merges=False)


class Operands(NamedTuple):
    """The arrays of queries and keys, and what is allowed.

    Attributes:
      q: Queries in tiles.
      k: Keys in tiles.
      v: Values in tiles.
      slopes: Slopes of ALiBi.
      segments: Segment ids of queries and keys, in tiles.
      lists: The key tiles of each query tile.
    """

    q: Float[Array, "b rows tile h d"]
    k: Float[Array, "b columns tile g d"]
    v: Float[Array, "b columns tile g value"]
    slopes: Float[Array, " h"] | None
    segments: tuple[Int[Array, "b rows tile"], Int[Array, "b columns tile"]] | None
    lists: Lists


def attend_rows(
    plan: TilePlan, results: tuple[Array, Array], operands: Operands, sink: Array | None, *, merges: bool
) -> tuple[Float[Array, "b rows tile h value"], Float[Array, "b rows tile h"]]:
    """Output and log-sum-exp of the query tiles of the lists, and `results` for the others.

    With `merges` the results are those of other keys, with which those of the lists are merged; a query tile may then
    be listed several times.
    """
    q_tiles, k_tiles, v_tiles, slopes, segments, lists = operands

    def attend_row(masked, carry, row):
        query, columns = row
        q, k, v = (_take(plan, x, tiles) for x, tiles in ((q_tiles, query), (k_tiles, columns), (v_tiles, columns)))
        scores = softcap(_score(plan, q, k), plan.softcap)
        part = _average(plan, _apply_positions(plan, row, lists, masked, slopes, segments, scores), v, sink)
        if merges:
            part = merge_lse([(_take(plan, carry[0], query), _take(plan, carry[1], query)), part])
        return (_put(carry[0], query, part[0]), _put(carry[1], query, part[1])), None

    for masked, group in zip(plan.masked, lists.groups, strict=True):
        results, _ = jax.lax.scan(functools.partial(attend_row, masked), results, group)
    return results


def _attend_tiles_forward(plan, *arrays):
    out, lse = _attend_tiles_plain(plan, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_tiles_backward(plan, residuals, cotangents):
    """FlashAttention-2 (arXiv:2307.08691), algorithm 2, with a gradient of the log-sum-exp.

    Rows of NaN have no gradient.
    """
    q_tiles, k_tiles, v_tiles, sink, slopes, segments, lists, out, lse = residuals
    sums = summarize(out, lse, cotangents)
    gradients = tuple(jnp.zeros(x.shape, plan.dtype) for x in (q_tiles, k_tiles, v_tiles))
    gradients, _ = vary_alike((gradients, q_tiles))
    operands = Operands(q_tiles, k_tiles, v_tiles, slopes, segments, lists)
    gradients = differentiate_rows(plan, gradients, operands, sums)
    d_sink = None if sink is None else differentiate_sink(sink, sums)
    return *(d.astype(x.dtype) for d, x in zip(gradients, residuals, strict=False)), d_sink, None, None, None


class Sums(NamedTuple):
    """What the gradients of a row need of it as a whole, without its keys.

    Attributes:
      d_out: Gradient of the output; zeros in a row of NaN.
      lse: Log-sum-exp; infinite in a row of NaN, so that its probabilities are 0.
      delta: The gradient of a score is p * (d_out @ v - delta).
    """

    d_out: Float[Array, "b rows tile h value"]
    lse: Float[Array, "b rows tile h"]
    delta: Float[Array, "b rows tile h"]


def summarize(out: Array, lse: Array, cotangents: tuple[Array, Array]) -> Sums:
    """The sums of the rows, from output and log-sum-exp and their cotangents."""
    bad, (d_out, d_lse) = jnp.isnan(lse), cotangents
    d_out, out = (jnp.where(bad[..., None], 0, x) for x in (d_out, out))
    delta = (d_out * out).sum(axis=-1) - jnp.where(bad, 0, d_lse)
    return Sums(d_out, jnp.where(bad, jnp.inf, lse), delta)


def differentiate_sink(sink: Float[Array, " h"], sums: Sums) -> Float[Array, " h"]:
    """The gradient of the sink logits."""
    return -(jnp.exp(sink - sums.lse) * sums.delta).sum(axis=(0, 1, 2))


def differentiate_rows(
    plan: TilePlan, gradients: tuple[Array, Array, Array], operands: Operands, sums: Sums
) -> tuple[Array, Array, Array]:
    """Adds those of the rows of the lists to the gradients of q, k and v, which have the dtype of the plan."""
    q_tiles, k_tiles, v_tiles, slopes, segments, lists = operands

    def differentiate_row(masked, carry, row):
        query, columns = row
        q, do, row_lse, row_delta = (_take(plan, x, query) for x in (q_tiles, *sums))
        k, v = _take(plan, k_tiles, columns), _take(plan, v_tiles, columns)
        q, k = zero_nan(q), zero_nan(k)
        scores, softcap_vjp = jax.vjp(functools.partial(softcap, limit=plan.softcap), _score(plan, q, k))
        scores = _apply_positions(plan, row, lists, masked, slopes, segments, scores)
        p = jnp.exp(scores - jnp.where(row_lse > MASKED, row_lse, 0.0)[..., None])
        (ds,) = softcap_vjp(p * (jnp.einsum("bgqd,bgkd->bgqk", do, v) - row_delta[..., None]))
        ds = ds * plan.scale
        dq = _add(carry[0], query[None], jnp.einsum("bgqk,bgkd->bgqd", ds, k))
        dk = _add(carry[1], columns, jnp.einsum("bgqk,bgqd->bgkd", ds, q))
        dv = _add(carry[2], columns, jnp.einsum("bgqk,bgqd->bgkd", p, do))
        return (dq, dk, dv), None

    for masked, group in zip(plan.masked, lists.groups, strict=True):
        gradients, _ = jax.lax.scan(functools.partial(differentiate_row, masked), gradients, group)
    return gradients


_attend_tiles = with_derivatives(_attend_tiles_forward, _attend_tiles_backward, _attend_tiles_plain)


# Inside a row: queries [b, g, q, d], where q runs over the tokens of the tile and, per token, the heads that share a
# key/value head; keys and values [b, g, k, d], where k runs over the tokens of all key tiles. The products need no
# transposition.


def _score(plan: TilePlan, q: Float[Array, "b g q d"], k: Float[Array, "b g k d"]) -> Float[Array, "b g q k"]:
    return jnp.einsum("bgqd,bgkd->bgqk", q, k, preferred_element_type=plan.dtype) * plan.scale


def _apply_positions(
    plan: TilePlan,
    row: Row,
    lists: Lists,
    masked: bool,
    slopes: Float[Array, " h"] | None,
    segments: tuple[Int[Array, "b rows tile"], Int[Array, "b columns tile"]] | None,
    scores: Float[Array, "b g q k"],
) -> Float[Array, "b g q k"]:
    """Adds ALiBi, and masks the scores if `masked`."""
    if slopes is None and not masked:
        return scores
    query, columns = row
    share = plan.h // plan.g
    token = jnp.arange(plan.tile * share) // share
    in_sequence = query if lists.queries is None else lists.queries.at[query].get(mode="clip")
    q_positions = in_sequence * plan.tile + token[:, None]
    in_sequence = columns if lists.keys is None else jnp.where(columns < 0, -1, lists.keys[columns])
    k_positions = (in_sequence[:, None] * plan.tile + jnp.arange(plan.tile)).reshape(1, -1)
    if slopes is not None:
        slopes = jnp.tile(slopes.reshape(plan.g, share), plan.tile)[..., None]
        scores = add_alibi(scores, slopes, q_positions + plan.q_offset - k_positions)
    if not masked:
        return scores
    mask = (k_positions >= 0) & (k_positions < plan.s) & plan.pattern.allows(q_positions, k_positions, plan.t, plan.s)
    if segments is not None:
        q_ids, k_ids = segments[0][:, query][:, token], segments[1][:, columns].reshape(-1, 1, k_positions.size)
        mask = (mask & (q_ids[:, :, None] == k_ids))[:, None]
    mask = jax.lax.optimization_barrier(mask)  # otherwise it is fused into its consumers and recomputed per head
    bias = log_multiplicity(plan.pattern, q_positions, k_positions, plan.t, plan.s)
    return jnp.where(mask, scores + bias, MASKED)


def _average(
    plan: TilePlan, scores: Float[Array, "b g q k"], v: Float[Array, "b g k value"], sink: Float[Array, " h"] | None
) -> tuple[Float[Array, "b g q value"], Float[Array, "b g q"]]:
    """The values averaged by the softmax of masked scores, and the log-sum-exp; see `masked_softmax`."""
    m = scores.max(axis=-1)
    if sink is not None:
        sink = jnp.tile(sink.reshape(plan.g, -1), plan.tile)
        m = jnp.maximum(m, sink)
    m = jax.lax.stop_gradient(jnp.where(m > MASKED / 2, m, 0.0))  # in a row without keys p is 0 and not 1
    p = jnp.exp(scores - m[..., None])
    l = p.sum(axis=-1)
    l = l if sink is None else l + jnp.exp(sink - m)
    out = jnp.einsum("bgqk,bgkd->bgqd", p.astype(v.dtype), v, preferred_element_type=plan.dtype)
    return out / jnp.where(l == 0, 1.0, l)[..., None], log_sum(m, l)


def _take(
    plan: TilePlan, x: Float[Array, "b tiles tile heads *width"], tiles: Int[Array, "*tiles"]
) -> Float[Array, "b g tokens *width"]:
    """One tile or several; their tokens, and the heads per key/value head, on one axis."""
    b, _, _, heads, *width = x.shape
    x = x[:, tiles].reshape(b, -1, plan.g, heads // plan.g, *width)
    return jnp.moveaxis(x, 2, 1).reshape(b, plan.g, -1, *width)


def _untake(taken: Float[Array, "b g tokens *width"], x: Float[Array, "b tiles tile heads *width"]) -> Array:
    """The inverse of `_take` from `x`: [b, k, tile, heads, ...]."""
    (b, g), (_, _, tile, heads, *width) = taken.shape[:2], x.shape
    taken = taken.reshape(b, g, -1, heads // g, *width)
    return jnp.moveaxis(taken, 1, 2).reshape(b, -1, tile, heads, *width)


def _put(x: Array, tile: Int[Array, ""], taken: Array) -> Array:
    return x.at[:, tile].set(_untake(taken, x)[:, 0])


def _add(x: Array, tiles: Int[Array, " degree"], taken: Array) -> Array:
    return x.at[:, tiles].add(_untake(taken, x))


def _split_tiles(x: Shaped[Array, "b n *rest"], tile: int) -> Shaped[Array, "b tiles tile *rest"]:
    """Cuts axis 1 into tiles, padded with zeros."""
    return pad_to_multiple(x, tile, 1).reshape(x.shape[0], -1, tile, *x.shape[2:])


def group_rows(layout: TileLayout) -> list[tuple[np.ndarray, np.ndarray]]:
    """Query tiles in at most `MAX_GROUPS` groups of similar degree, with the least padding.

    Returns:
      Per group the query tiles, int32 [rows], and their key tiles, int32 [rows, degree], -1 where padded.
    """
    degrees = layout.degrees
    live = np.append(layout.columns, 0)  # one entry more, so that empty rows at the end can be indexed
    groups, low = [], -1
    for high in split_degrees(degrees):
        rows = np.flatnonzero((degrees > low) & (degrees <= high)).astype(np.int32)
        slots = np.arange(max(high, 1))
        index = np.minimum(layout.starts[rows][:, None] + slots, len(live) - 1)
        groups.append((rows, np.where(slots < degrees[rows][:, None], live[index], -1).astype(np.int32)))
        low = high
    return groups


def split_degrees(degrees: np.ndarray) -> list[int]:
    """Ascending upper ends of the degree intervals with the least padding: dynamic programming over the degrees."""
    values, counts = np.unique(degrees, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    cost, cuts = before[1:] * values, []  # of the first j + 1 values in one group; start of the last group
    for _ in range(min(MAX_GROUPS, len(values)) - 1):
        options = np.concatenate([[0], cost[:-1]])[None, :] + (before[1:, None] - before[None, :-1]) * values[:, None]
        options = np.where(np.tri(len(values), dtype=bool), options, np.iinfo(np.int64).max)
        cuts.append(options.argmin(axis=1))
        cost = options.min(axis=1)
    ends, last = [], len(values)
    for cut in [*reversed(cuts), np.zeros(len(values), int)]:
        if last > 0:
            ends.append(int(values[last - 1]))
            last = cut[last - 1]
    return ends[::-1]
