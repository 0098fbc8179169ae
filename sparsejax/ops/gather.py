"""Tile gather: each query tile gathers its live key tiles and attends to those alone.

A loop over query tiles keeps one tile's scores alive at a time; the backward pass computes them again and
adds each tile's share to dk and dv in place, so that memory grows with the length and time with the live
tiles. Query tiles are grouped by how many key tiles they see, so that a few global rows do not widen the rest.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.ops.request import MASKED, Request, by_pattern, cap
from sparsejax.patterns import Pattern, TileLayout

TILE = 64  # the fastest of 32, 64 and 128 on CPU, and the smallest in memory
MOST_GROUPS = 4  # each group of rows compiles a loop of its own


def refuse(request: Request) -> str | None:
    """Why this implementation cannot serve the request, or None."""
    return "interpret=True is for Pallas kernels" if request.interpret else None


def run(request: Request) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32."""
    return by_pattern(request, _run_one_pattern)


def _run_one_pattern(request: Request) -> tuple[Array, Array]:
    q, k, v, sink = request.q, request.k, request.v, request.sink_logits
    (b, t, h, d), (_, s, g, _) = q.shape, k.shape
    tile = min(TILE, -(-max(t, s) // 8) * 8)
    plan = _Plan(request.pattern, t, s, tile, request.scale, request.softcap, request.dtype)
    queries = _split_tiles(q, tile).reshape(-1, b, tile, g, h // g, d).transpose(0, 1, 3, 4, 2, 5)
    keys, values = (_split_tiles(x, tile).transpose(0, 1, 3, 2, 4) for x in (k, v))
    if sink is not None:
        sink = sink.astype(request.dtype).reshape(g, h // g, 1)
    segments = None if request.segments is None else tuple(_split_tiles(x, tile) for x in request.segments)
    out, lse = _attend_tiles(plan, queries, keys, values, sink, segments)
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, h, d)[:, :t]
    return out.astype(q.dtype), lse.transpose(1, 0, 4, 2, 3).reshape(b, -1, h)[:, :t]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static of one call: everything but the arrays."""

    pattern: Pattern
    t: int
    s: int
    tile: int
    scale: float
    softcap: float | None
    dtype: jnp.dtype

    def groups(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return group_rows(self.pattern.layout(self.t, self.s, (self.tile, self.tile)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_tiles(plan, queries, keys, values, sink, segments):
    """Queries [rows,b,g,r,tile,d]; keys, values [columns,b,g,tile,d] -> out like queries, lse [rows,b,g,r,tile]."""

    def attend_row(carry, row):
        index, columns = row
        scores = cap(_score(plan, queries[index], keys[columns]), plan.softcap)
        out, lse = _average(plan, jnp.where(_mask(plan, row, segments), scores, MASKED), values[columns], sink)
        return (carry[0].at[index].set(out), carry[1].at[index].set(lse)), None

    carry = jnp.zeros(queries.shape, plan.dtype), jnp.zeros(queries.shape[:-1], plan.dtype)
    for group in plan.groups():
        carry, _ = jax.lax.scan(attend_row, carry, group)
    return carry


def _attend_tiles_forward(plan, *arrays):
    out, lse = _attend_tiles(plan, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_tiles_backward(plan, saved, cotangents):
    """As in FlashAttention (arXiv:2205.14135): weights from the scores and their log-sum-exp, no softmax again."""
    queries, keys, values, sink, segments, out, lse = saved
    d_out, d_lse = cotangents
    slope = d_lse - (d_out * out).sum(axis=-1)  # the gradient of a score is weight * (d_weight + slope)

    def differentiate_row(carry, row):
        index, columns = row
        query, key, value, d_row = queries[index], keys[columns], values[columns], d_out[index]
        scores, uncap = jax.vjp(functools.partial(cap, softcap=plan.softcap), _score(plan, query, key))
        scores = jnp.where(_mask(plan, row, segments), scores, MASKED)
        weights = jnp.exp(scores - jnp.where(lse[index] > MASKED, lse[index], 0.0)[..., None, None])
        d_weights = jnp.einsum("bgrqd,nbgkd->bgrqnk", d_row, value)
        (d_scores,) = uncap(weights * (d_weights + slope[index][..., None, None]))
        d_scores = d_scores * plan.scale
        d_queries = carry[0].at[index].set(jnp.einsum("bgrqnk,nbgkd->bgrqd", d_scores, key))
        d_keys = carry[1].at[columns].add(jnp.einsum("bgrqnk,bgrqd->nbgkd", d_scores, query))
        d_values = carry[2].at[columns].add(jnp.einsum("bgrqnk,bgrqd->nbgkd", weights, d_row))
        return (d_queries, d_keys, d_values), None

    carry = tuple(jnp.zeros(x.shape, plan.dtype) for x in (queries, keys, values))
    for group in plan.groups():
        carry, _ = jax.lax.scan(differentiate_row, carry, group)
    d_sink = None if sink is None else (jnp.exp(sink - lse) * slope).sum(axis=(0, 1, 4))[..., None]
    return *(d.astype(x.dtype) for d, x in zip(carry, saved, strict=False)), d_sink, None


_attend_tiles.defvjp(_attend_tiles_forward, _attend_tiles_backward)


def _score(plan, query, key):
    """Scaled products of a query tile [b,g,r,tile,d] with key tiles [degree,b,g,tile,d]: [b,g,r,tile,degree,tile]."""
    return jnp.einsum("bgrqd,nbgkd->bgrqnk", query, key, preferred_element_type=plan.dtype) * plan.scale


def _mask(plan, row, segments):
    """Which of those scores count, broadcastable with them."""
    index, columns = row
    q_at = index * plan.tile + jnp.arange(plan.tile)[:, None, None]
    k_at = columns[:, None] * plan.tile + jnp.arange(plan.tile)
    mask = plan.pattern.allows(q_at, k_at, plan.t, plan.s) & (k_at >= 0) & (k_at < plan.s)
    if segments is None:
        return mask
    own, others = segments[0][index], segments[1][columns].swapaxes(0, 1)
    return (mask & (own[:, :, None, None] == others[:, None]))[:, None, None]


def _average(plan, scores, value, sink):
    """Values averaged by the softmax of masked scores: out [b,g,r,tile,d] and log-sum-exp; see `masked_softmax`."""
    top = scores.max(axis=(-2, -1))
    top = top if sink is None else jnp.maximum(top, sink)
    top = jnp.where(top > MASKED / 2, top, 0.0)  # a row without any key: its terms become 0 and not 1
    terms = jnp.exp(scores - top[..., None, None])
    total = terms.sum(axis=(-2, -1))
    total = total if sink is None else total + jnp.exp(sink - top)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bgrqnk,nbgkd->bgrqd", terms.astype(value.dtype), value, preferred_element_type=plan.dtype)
    return out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)


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
