"""Edge list: each (query, key) pair that may meet is computed alone, and sums run over the pairs of a query.

What a graph network does: gather the two ends of each edge, score it, and normalise over the edges of each query
by segment maxima and sums (graph attention, arXiv:1710.10903). Time follows the pairs, wherever they lie: for
patterns that leave the tiles they touch nearly empty, and for lists that are computed from the data.

Edges are taken in chunks, so that the gathered rows of one chunk alone are in memory at a time, and both passes
score them again rather than keep what they scored (as arXiv:2205.14135 does by tiles). The segment maxima and sums
are scattered into the arrays that the chunks have in common.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.ops.call import AttentionCall, by_pattern
from sparsejax.ops.softmax import MASKED, add_alibi, softcap
from sparsejax.patterns import Full

MOST_EDGES = 2**24  # of one head: 128 MiB of positions, which the compiled program holds
CHUNK = 2**18  # numbers in the gathered query rows of a chunk of edges, over batch and heads


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot serve the call, or None."""
    if call.interpret:
        return "interpret=True is for Pallas kernels"
    t, s = call.q.shape[1], call.k.shape[1]
    edges = max(pattern.pairs(t, s) for pattern in call.head_groups())
    if edges > MOST_EDGES:
        return f"{edges} edges in one head; their positions are held in memory, which stops at {MOST_EDGES}"
    return None


def run(call: AttentionCall) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32."""
    return by_pattern(call, _run_one_pattern)


def _run_one_pattern(call: AttentionCall) -> tuple[Array, Array]:
    return attend_edges(
        call.q,
        call.k,
        call.v,
        *call.pattern.edges(call.q.shape[1], call.k.shape[1]),
        scale=call.scale,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        alibi_slopes=call.alibi_slopes,
        segment_ids=call.segments,
        return_lse=True,
    )


def attend_edges(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    queries: Int[Array, " e"],
    keys: Int[Array, " e"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    segment_ids: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    return_lse: bool = False,
) -> Float[Array, "b t h e"] | tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Softmax attention in which query `queries[i]` looks at key `keys[i]`, and no others do; see `attend`.

    The list may be traced, so that it can come from the data. It serves all sequences and heads alike; `jax.vmap`
    over either gives each a list of its own.

    Args:
      q: queries.
      k: keys; `g` divides `h`.
      v: values; their width may differ from that of the keys.
      queries: positions, in any order, though memory is read in order if they ascend. An edge that occurs twice
        counts twice; one with a position outside of `[0, t)` or `[0, s)` is left out, as padding to a fixed number.
      keys: positions.
      scale: factor on q·k, `d ** -0.5` if not given.
      softcap: bounds the scaled scores to `softcap * tanh(score / softcap)`.
      sink_logits: one logit for each query head that joins the softmax's denominator but has no value.
      alibi_slopes: by these scores fall with the distance of query and key; constants, without a gradient.
      segment_ids: of queries and of keys; an edge between two segments is left out.
      return_lse: also return the log-sum-exp of the scores, sink included: float32, minus infinity where a query
        has neither edge nor sink.

    Returns:
      The output in the dtype of `q`, zeros where a query has no edge, and with `return_lse` the log-sum-exp.

    Raises:
      ValueError: shapes that do not fit together.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = AttentionCall(q, k, v, Full(), scale, softcap, sink_logits, segment_ids, False, alibi_slopes)
    if queries.ndim != 1 or queries.shape != keys.shape:
        raise ValueError(f"attend_edges: queries and keys must be [e]; got {list(queries.shape)}, {list(keys.shape)}")
    (b, t, h, d), (_, s, g, _) = q.shape, k.shape
    rows = jnp.moveaxis(q, 1, 0).reshape(t, b, g, h // g, d)
    heads = (None if x is None else x.astype(call.dtype).reshape(g, h // g) for x in (sink_logits, alibi_slopes))
    segments = None if segment_ids is None else tuple(jnp.asarray(x).T for x in segment_ids)
    edges = _split_edges(queries, keys, t, s, chunk=max(1, CHUNK // (b * h * max(d, v.shape[-1]))))
    plan = _Plan(scale, softcap, call.dtype)
    out, lse = _attend_rows(plan, rows, jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0), *heads, segments, edges)
    out, lse = (jnp.moveaxis(x.reshape(t, b, h, *x.shape[4:]), 0, 1) for x in (out, lse))
    return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)


def _split_edges(queries: Array, keys: Array, t: int, s: int, chunk: int) -> tuple[Array, Array]:
    """The list in chunks, int32 [chunks, chunk] each; padding and edges outside are at (t, s): scatters drop them."""
    count = len(queries)
    chunk = min(chunk, max(1, count))
    inside = (queries >= 0) & (queries < t) & (keys >= 0) & (keys < s)
    ends = (jnp.where(inside, position, end).astype(jnp.int32) for position, end in ((queries, t), (keys, s)))
    return tuple(
        jnp.pad(position, (0, -count % chunk), constant_values=end).reshape(-(-count // chunk), chunk)
        for position, end in zip(ends, (t, s), strict=True)
    )


class _Plan(NamedTuple):
    """What is static of one call."""

    scale: float
    softcap: float | None
    dtype: jnp.dtype

    def score(self, q: Array, k: Array) -> Array:
        """Scores [c,b,g,r] of rows q [c,b,g,r,d] and k [c,b,g,d]."""
        return softcap(_dot(q, k) * self.scale, self.softcap)

    def rows(self, x: Array, positions: Array) -> Array:
        """The rows of x [n,...] at positions [c], any row for a position that is not in it, in the dtype of sums."""
        return x.at[positions].get(mode="clip").astype(self.dtype)

    def weigh(self, scores: Array, top: Array, segments, queries: Array, keys: Array) -> Array:
        """Weights [c,b,g,r] of scores beside the greatest score of their queries, `top` [t,b,g,r]."""
        return jnp.where(_meet(segments, queries, keys), jnp.exp(scores - self.rows(top, queries)), 0.0)


def _dot(q: Array, k: Array) -> Array:
    """Products along d of rows [c,b,g,r,d] and [c,b,g,d]. XLA:CPU computes a dot 5 times as fast as its sum."""
    return jnp.einsum("cbgrd,cbgd->cbgr", q, k, precision=jax.lax.Precision.HIGHEST)


def _lean(scores: Array, slopes: Array | None, queries: Array, keys: Array) -> Array:
    return add_alibi(scores, slopes, (queries - keys)[:, None, None, None])


def _meet(segments, queries: Array, keys: Array) -> Array | bool:
    """Whether the ends of each edge are in one segment, bool [c,b,1,1]; segments [t,b] and [s,b]."""
    if segments is None:
        return True
    own, others = (x.at[at].get(mode="clip") for x, at in zip(segments, (queries, keys), strict=True))
    return (own == others)[:, :, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_rows(plan, q, k, v, sink, slopes, segments, edges):
    """Rows q [t,b,g,r,d]; k [s,b,g,d], v [s,b,g,e]; sink, slopes [g,r]; edges int32 [chunks,c] twice.

    Returns out [t,b,g,r,e] and lse [t,b,g,r].
    """
    return _attend_rows_forward(plan, q, k, v, sink, slopes, segments, edges)[0]


def _attend_rows_forward(plan, q, k, v, sink, slopes, segments, edges):
    def raise_top(top, chunk):
        scores = _lean(plan.score(plan.rows(q, chunk[0]), plan.rows(k, chunk[1])), slopes, *chunk)
        scores = jnp.where(_meet(segments, *chunk), scores, MASKED)
        return top.at[chunk[0]].max(scores, mode="drop"), None

    def add_values(carry, chunk):
        queries, keys = chunk
        total, out = carry
        scores = _lean(plan.score(plan.rows(q, queries), plan.rows(k, keys)), slopes, queries, keys)
        weights = plan.weigh(scores, top, segments, queries, keys)
        values = weights[..., None] * plan.rows(v, keys)[:, :, :, None]
        return (total.at[queries].add(weights, mode="drop"), out.at[queries].add(values, mode="drop")), None

    least = jnp.full(q.shape[:-1], MASKED, plan.dtype)
    least = least if sink is None else jnp.maximum(least, sink)
    top, _ = jax.lax.scan(raise_top, least, edges)
    top = jnp.where(top > MASKED / 2, top, 0.0)
    total = jnp.zeros_like(top) if sink is None else jnp.exp(sink - top)
    zeros = jnp.zeros((*top.shape, v.shape[-1]), plan.dtype)
    (total, out), _ = jax.lax.scan(add_values, (total, zeros), edges)
    safe = jnp.where(total > 0, total, 1.0)
    out = out / safe[..., None]
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    return (out, lse), (q, k, v, sink, slopes, segments, edges, out, top, safe)


def _attend_rows_backward(plan, saved, cotangents):
    q, k, v, sink, slopes, segments, edges, out, top, total = saved
    d_out, d_lse = cotangents
    # The gradient of a score is weight / total * (d_out · value + slope): the division is done once for each query.
    slope = (d_lse - (out * d_out).sum(axis=-1)) / total
    d_out = d_out / total[..., None]

    def differentiate(carry, chunk):
        queries, keys = chunk
        d_q, d_k, d_v = carry
        d_row = plan.rows(d_out, queries)
        scores, pull = jax.vjp(plan.score, plan.rows(q, queries), plan.rows(k, keys))
        weights = plan.weigh(_lean(scores, slopes, queries, keys), top, segments, queries, keys)
        d_query, d_key = pull(weights * (_dot(d_row, plan.rows(v, keys)) + plan.rows(slope, queries)))
        d_value = jnp.einsum("cbgr,cbgrd->cbgd", weights, d_row, precision=jax.lax.Precision.HIGHEST)
        return (
            d_q.at[queries].add(d_query, mode="drop"),
            d_k.at[keys].add(d_key, mode="drop"),
            d_v.at[keys].add(d_value, mode="drop"),
        ), None

    zeros = tuple(jnp.zeros(x.shape, plan.dtype) for x in (q, k, v))
    grads, _ = jax.lax.scan(differentiate, zeros, edges)
    d_q, d_k, d_v = (grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))
    d_sink = None if sink is None else (jnp.exp(sink - top) * slope).sum(axis=(0, 1))
    return d_q, d_k, d_v, d_sink, None, None, None


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)
