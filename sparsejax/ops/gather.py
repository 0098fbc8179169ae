"""Tile gather: each query tile gathers its live key tiles and attends to those alone.

A loop over query tiles keeps one tile's scores alive at a time; the backward pass computes them again from the
saved log-sum-exp and adds each tile's share to dk and dv in place, so that memory grows with the length and time
with the live tiles. Query tiles are grouped by how many key tiles they see, so that a few global rows do not widen
the rest.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.ops.call import AttentionCall, by_pattern
from sparsejax.ops.chunks import fill_chunks
from sparsejax.ops.softmax import MASKED, add_alibi, log_multiplicity, softcap
from sparsejax.patterns import Pattern, TileLayout

# Measured on CPU by scripts/measure_cpu_attention.py: the large tile needs a third less time for as many pairs, while
# a step's scores, for all sequences and heads, stay in the cache.
SMALL, LARGE = 64, 128
LARGE_AREA = 1.3  # times the pairs in live tiles, that large tiles may have
LARGE_HEADS = 8  # sequences times heads
MOST_GROUPS = 4  # each group of rows compiles a loop of its own


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot serve the call, or None."""
    return "interpret=True is for Pallas kernels" if call.interpret else None


def run(call: AttentionCall, tile: int | None = None) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32; `tile` is the side of a tile in tokens, if not the best."""
    return by_pattern(call, functools.partial(_run_one_pattern, tile=tile))


def choose_tile(pattern: Pattern, b: int, t: int, s: int, h: int) -> int:
    """The tile that is the fastest for b sequences of t queries and s keys and h heads."""
    area = {tile: len(pattern.layout(t, s, (tile, tile)).columns) * tile**2 for tile in (SMALL, LARGE)}
    return LARGE if b * h <= LARGE_HEADS and area[LARGE] <= LARGE_AREA * area[SMALL] else SMALL


def _run_one_pattern(call: AttentionCall, tile: int | None) -> tuple[Array, Array]:
    q, k, v = call.q, call.k, call.v
    (b, t, h, _), (_, s, g, _) = q.shape, k.shape
    tile = min(tile or choose_tile(call.pattern, b, t, s, h), -(-max(t, s) // 8) * 8)
    plan = _Plan(call.pattern, t, s, h, g, tile, call.scale, call.softcap, call.dtype)
    segments = None if call.segments is None else tuple(_split_tiles(x, tile) for x in call.segments)
    heads = (None if x is None else x.astype(call.dtype) for x in (call.sink_logits, call.alibi_slopes))
    out, lse = _attend_tiles(plan, *(_split_tiles(x, tile) for x in (q, k, v)), *heads, segments)
    return out.reshape(b, -1, h, v.shape[-1])[:, :t].astype(q.dtype), lse.reshape(b, -1, h)[:, :t]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static of one call: everything but the arrays."""

    pattern: Pattern
    t: int
    s: int
    h: int
    g: int
    tile: int
    scale: float
    softcap: float | None
    dtype: jnp.dtype

    def groups(self, packed: bool) -> list[tuple[bool, tuple[np.ndarray, np.ndarray]]]:
        """The groups of `group_rows`, and of each whether it needs a mask; `packed`: there are segments."""
        layout = self.pattern.layout(self.t, self.s, (self.tile, self.tile))
        partial = np.unique(layout.rows[~layout.full])
        always = packed or self.pattern.repeats or self.s % self.tile
        return [
            (bool(always or (columns < 0).any() or np.isin(rows, partial).any()), (rows, columns))
            for rows, columns in group_rows(layout)
        ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_tiles(plan, queries, keys, values, sink, slopes, segments):
    """Queries [b,rows,tile,h,d]; keys [b,columns,tile,g,d], values [...,e] -> out [b,rows,tile,h,e], lse without e."""

    def attend_row(masked, carry, row):
        index, columns = row
        query, key, value = (_take(plan, x, i) for x, i in ((queries, index), (keys, columns), (values, columns)))
        scores = softcap(_score(plan, query, key), plan.softcap)
        out, lse = _average(plan, _place(plan, row, masked, slopes, segments, scores), value, sink)
        return (_put(carry[0], index, out), _put(carry[1], index, lse)), None

    rows = queries.shape[:-1]
    carry = jnp.zeros((*rows, values.shape[-1]), plan.dtype), jnp.zeros(rows, plan.dtype)
    for masked, group in plan.groups(segments is not None):
        carry, _ = jax.lax.scan(functools.partial(attend_row, masked), carry, group)
    return carry


def _attend_tiles_forward(plan, *arrays):
    out, lse = _attend_tiles(plan, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_tiles_backward(plan, saved, cotangents):
    """As in FlashAttention (arXiv:2205.14135): weights from the scores and their log-sum-exp, no softmax again."""
    queries, keys, values, sink, slopes, segments, out, lse = saved
    d_out, d_lse = cotangents
    slope = d_lse - (d_out * out).sum(axis=-1)  # the gradient of a score is weight * (d_weight + slope)

    def differentiate_row(masked, carry, row):
        index, columns = row
        query, d_row, bottom, tilt = (_take(plan, x, index) for x in (queries, d_out, lse, slope))
        key, value = _take(plan, keys, columns), _take(plan, values, columns)
        scores, uncap = jax.vjp(functools.partial(softcap, softcap=plan.softcap), _score(plan, query, key))
        scores = _place(plan, row, masked, slopes, segments, scores)
        weights = jnp.exp(scores - jnp.where(bottom > MASKED, bottom, 0.0)[..., None])
        (d_scores,) = uncap(weights * (jnp.einsum("bgqd,bgkd->bgqk", d_row, value) + tilt[..., None]))
        d_scores = d_scores * plan.scale
        d_queries = _put(carry[0], index, jnp.einsum("bgqk,bgkd->bgqd", d_scores, key))
        d_keys = _add(carry[1], columns, jnp.einsum("bgqk,bgqd->bgkd", d_scores, query))
        d_values = _add(carry[2], columns, jnp.einsum("bgqk,bgqd->bgkd", weights, d_row))
        return (d_queries, d_keys, d_values), None

    carry = tuple(jnp.zeros(x.shape, plan.dtype) for x in (queries, keys, values))
    for masked, group in plan.groups(segments is not None):
        carry, _ = jax.lax.scan(functools.partial(differentiate_row, masked), carry, group)
    d_sink = None if sink is None else (jnp.exp(sink - lse) * slope).sum(axis=(0, 1, 2))
    return *(d.astype(x.dtype) for d, x in zip(carry, saved, strict=False)), d_sink, None, None


_attend_tiles.defvjp(_attend_tiles_forward, _attend_tiles_backward)


# Inside a row: queries [b,g,q,d], q over the tokens of the tile and, for each, the heads that share a key/value
# head; keys and values [b,g,k,d], k over the tokens of all its key tiles. The products then need no transposing.


def _score(plan, query, key):
    return jnp.einsum("bgqd,bgkd->bgqk", query, key, preferred_element_type=plan.dtype) * plan.scale


def _place(plan, row, masked, slopes, segments, scores):
    """The scores of a row [b,g,q,k] with what positions do to them; nothing if they are all in sight."""
    if slopes is None and not masked:
        return scores
    index, columns = row
    share = plan.h // plan.g
    token = jnp.arange(plan.tile * share) // share
    q_at = index * plan.tile + token[:, None]
    k_at = (columns[:, None] * plan.tile + jnp.arange(plan.tile)).reshape(1, -1)
    if slopes is not None:
        scores = add_alibi(scores, jnp.tile(slopes.reshape(plan.g, share), plan.tile)[..., None], q_at - k_at)
    return _mask(plan, row, segments, scores, token, q_at, k_at) if masked else scores


def _mask(plan, row, segments, scores, token, q_at, k_at):
    """The scores of a row that count, raised where they count more than once; MASKED for the others."""
    index, columns = row
    mask = (k_at >= 0) & (k_at < plan.s) & plan.pattern.allows(q_at, k_at, plan.t, plan.s)
    if segments is not None:
        own, others = segments[0][:, index][:, token], segments[1][:, columns].reshape(-1, 1, k_at.size)
        mask = (mask & (own[:, :, None] == others))[:, None]
    mask = jax.lax.optimization_barrier(mask)  # or it is fused into what uses it, and computed again for each head
    return jnp.where(mask, scores + log_multiplicity(plan.pattern, q_at, k_at, plan.t, plan.s), MASKED)


def _average(plan, scores, value, sink):
    """Values averaged by the softmax of masked scores: out [b,g,q,d] and log-sum-exp [b,g,q]; see `masked_softmax`."""
    top = scores.max(axis=-1)
    if sink is not None:
        sink = jnp.tile(sink.reshape(plan.g, -1), plan.tile)
        top = jnp.maximum(top, sink)
    top = jnp.where(top > MASKED / 2, top, 0.0)  # a row without any key: its terms become 0 and not 1
    terms = jnp.exp(scores - top[..., None])
    total = terms.sum(axis=-1)
    total = total if sink is None else total + jnp.exp(sink - top)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bgqk,bgkd->bgqd", terms.astype(value.dtype), value, preferred_element_type=plan.dtype)
    return out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)


def _take(plan, x, tiles):
    """A tile, or an array of tiles, of [b,tiles,tile,heads,...] as [b,g,tokens * heads // g,...]."""
    b, _, _, heads, *rest = x.shape
    x = x[:, tiles].reshape(b, -1, plan.g, heads // plan.g, *rest)
    return jnp.moveaxis(x, 2, 1).reshape(b, plan.g, -1, *rest)


def _as_tiles(taken, x):
    """What `_take` took from `x`, or is like it, as tiles again: [b,number,tile,heads,...]."""
    (b, g), (_, _, tile, heads, *rest) = taken.shape[:2], x.shape
    taken = taken.reshape(b, g, -1, heads // g, *rest)
    return jnp.moveaxis(taken, 1, 2).reshape(b, -1, tile, heads, *rest)


def _put(x, tile, part):
    return x.at[:, tile].set(_as_tiles(part, x)[:, 0])


def _add(x, tiles, part):
    return x.at[:, tiles].add(_as_tiles(part, x))


def _split_tiles(x: Array, tile: int) -> Array:
    """Cuts axis 1 into tiles, padded with zeros: [b, t, ...] -> [b, tiles, tile, ...]."""
    return fill_chunks(x, tile, 1).reshape(x.shape[0], -1, tile, *x.shape[2:])


def group_rows(layout: TileLayout) -> list[tuple[np.ndarray, np.ndarray]]:
    """Query tiles in at most `MOST_GROUPS` groups of similar degree, so that padding costs least.

    Returns:
      For each group the query tiles, int32 [rows], and their key tiles, int32 [rows, degree], -1 where padded.
    """
    degrees = layout.degrees
    live = np.append(layout.columns, 0)  # one entry more, so that empty rows at the end can be indexed
    groups, low = [], -1
    for high in _split_degrees(degrees):
        rows = np.flatnonzero((degrees > low) & (degrees <= high)).astype(np.int32)
        slots = np.arange(max(high, 1))
        index = np.minimum(layout.starts[rows][:, None] + slots, len(live) - 1)
        groups.append((rows, np.where(slots < degrees[rows][:, None], live[index], -1).astype(np.int32)))
        low = high
    return groups


def _split_degrees(degrees: np.ndarray) -> list[int]:
    """Upper ends, ascending, of the degree intervals whose padding to the upper end is smallest in sum."""
    values, counts = np.unique(degrees, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    cost, cuts = before[1:] * values, []  # of the first j + 1 values in one group; where the last group starts
    for _ in range(min(MOST_GROUPS, len(values)) - 1):
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
