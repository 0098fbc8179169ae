"""Tile gather: each query tile gathers its live key tiles and attends to those alone.

A `lax.map` over query tiles with rematerialisation keeps one tile's scores alive at a time, forward and
backward, so that memory grows with the length and time with the live tiles. Query tiles are grouped by how
many key tiles they see, so that a few global rows do not widen all the others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.ops.request import Request, cap, masked_softmax
from sparsejax.patterns import Pattern, TileLayout

TILE = 128
MOST_GROUPS = 4  # each group of rows compiles a loop of its own


def refuse(request: Request) -> str | None:
    """Why this implementation cannot serve the request, or None."""
    return "interpret=True is for Pallas kernels" if request.interpret else None


def run(request: Request) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32."""
    (_, _, h, _), g = request.q.shape, request.k.shape[2]
    parts, order = [], []
    for pattern, heads in request.head_groups().items():
        order += heads
        if len(heads) == h:
            k, v = request.k, request.v
        else:  # a part of the heads: give each query head its own key/value head
            k, v = (x[:, :, np.array(heads) // (h // g)] for x in (request.k, request.v))
        sink = None if request.sink_logits is None else request.sink_logits[np.array(heads)]
        parts.append(_attend_one_pattern(request, pattern, request.q[:, :, np.array(heads)], k, v, sink))
    out, lse = (jnp.concatenate(arrays, axis=2)[:, :, np.argsort(order)] for arrays in zip(*parts, strict=True))
    return out, lse


def _attend_one_pattern(request: Request, pattern: Pattern, q, k, v, sink):
    (b, t, h, d), (_, s, g, _) = q.shape, k.shape
    tile = min(TILE, -(-max(t, s, 1) // 8) * 8)
    layout = pattern.layout(t, s, (tile, tile))
    queries = _split_tiles(q.reshape(b, t, g, h // g, d), tile)  # [rows, b, tile, g, r, d]
    queries = queries.transpose(0, 1, 3, 4, 2, 5)  # [rows, b, g, r, tile, d]
    keys, values = (_split_tiles(x, tile).transpose(1, 3, 0, 2, 4) for x in (k, v))  # [b, g, columns, tile, d]
    q_segments, k_segments = (None, None) if request.segments is None else request.segments
    q_segments = None if q_segments is None else _split_tiles(q_segments, tile)
    k_segments = None if k_segments is None else _split_tiles(k_segments, tile).transpose(1, 0, 2)
    sink = None if sink is None else sink.astype(request.dtype).reshape(g, h // g)[None, :, :, None, None]

    @jax.checkpoint
    def attend_row(row):
        index, query, segment, columns = row
        live = columns >= 0
        q_at = index * tile + jnp.arange(tile)
        k_at = (columns[:, None] * tile + jnp.arange(tile)).ravel()
        mask = pattern.allows(q_at[:, None], k_at[None, :], t, s) & (k_at < s) & jnp.repeat(live, tile)
        key, value = (x[:, :, columns].reshape(b, g, -1, d) for x in (keys, values))
        if segment is not None:
            same = segment[:, :, None] == k_segments[:, columns].reshape(b, 1, -1)
            mask = (mask & same)[:, None, None]
        scores = jnp.einsum("bgrqd,bgkd->bgrqk", query, key, preferred_element_type=request.dtype)
        weights, lse = masked_softmax(cap(scores * request.scale, request.softcap), mask, sink)
        out = jnp.einsum("bgrqk,bgkd->bgrqd", weights.astype(v.dtype), value, preferred_element_type=request.dtype)
        return out.astype(q.dtype), lse

    outs, lses, order = [], [], []
    for rows, columns in group_rows(layout):
        segment = None if q_segments is None else q_segments[rows]
        out, lse = jax.lax.map(attend_row, (jnp.asarray(rows), queries[rows], segment, jnp.asarray(columns)))
        outs.append(out)
        lses.append(lse)
        order.append(rows)
    back = np.argsort(np.concatenate(order))
    out = jnp.concatenate(outs)[back].transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, h, d)[:, :t]
    lse = jnp.concatenate(lses)[back].transpose(1, 0, 4, 2, 3).reshape(b, -1, h)[:, :t]
    return out, lse


def _split_tiles(x: Array, tile: int) -> Array:
    """Cuts axis 1 into tiles, padded with zeros: [b, t, ...] -> [tiles, b, tile, ...]."""
    b, t = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -t % tile)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, -1, tile, *x.shape[2:]), 1, 0)


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
