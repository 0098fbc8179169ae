"""Edge list: each allowed (query, key) pair is scored alone, and the softmax sums over the edges of a query.

As in a graph network (graph attention, arXiv:1710.10903): gather both ends of each edge, score it, and normalise by
segment maxima and sums over the edges of a query. Time grows with the number of pairs, wherever they lie. This serves
patterns that leave most of each live tile empty, and lists that are computed from the data.

Edges are processed in chunks, so that only the gathered rows of one chunk are in memory, and both passes recompute the
scores. The segment maxima and sums are scattered into arrays that all chunks share. Names are those of
`sparsejax.ops.softmax`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.errors import InputError
from sparsejax.ops.call import AttentionCall, by_pattern
from sparsejax.ops.chunks import vary_alike
from sparsejax.ops.derivatives import with_derivatives
from sparsejax.ops.selection import Selection
from sparsejax.ops.softmax import MASKED, add_alibi, confine_nan, log_sum, softcap, zero_nan
from sparsejax.patterns import Full

MAX_EDGES = 2**24  # per head: 128 MiB of positions in the compiled program
CHUNK = 2**18  # numbers in the gathered query rows of a chunk of edges, over batch and heads

Segments = tuple[Int[Array, "t b"], Int[Array, "s b"]]
Alibi = tuple[Float[Array, "g r"], Int[Array, ""]]  # slopes, and the position of the first query


class Edges(NamedTuple):
    """Positions of the queries and keys of edges, in chunks; padding is at (t, s), which scatters drop."""

    queries: Int[Array, "*chunks c"]
    keys: Int[Array, "*chunks c"]


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot compute the call, or None."""
    if call.interpret:
        return "interpret=True is for Pallas kernels"
    if call.selection is not None:
        return "the pattern counts keys several times" if call.pattern.repeats else None
    t, s = call.q.shape[1], call.k.shape[1]
    edges = max(pattern.pairs(t, s) for pattern in call.head_groups())
    if edges > MAX_EDGES:
        return f"{edges} edges per head are more than the {MAX_EDGES} whose positions it keeps in memory"
    return None


def run(call: AttentionCall) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in `call.dtype`."""
    return by_pattern(call, _run_pattern) if call.selection is None else _run_selection(call, call.selection)


def _run_selection(
    call: AttentionCall, selection: Selection
) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Attends to each chosen key alone, with one list of edges per sequence and scope."""
    (b, t, h, _), s = call.q.shape, call.k.shape[1]
    keys, queries = selection.keys, call.first_query + jnp.arange(t)[:, None]
    allowed = call.pattern.allows(queries, keys, call.query_count, s)
    if call.segments is not None:
        q_ids, k_ids = call.segments
        k_ids = jnp.take_along_axis(k_ids, jnp.maximum(keys, 0).reshape(b, -1), axis=1).reshape(keys.shape)
        allowed &= q_ids[:, None, :, None] == k_ids
    keys = jnp.where((keys >= 0) & allowed, keys, -1)
    scopes, per_head = keys.shape[1], (call.sink_logits, call.alibi_slopes)
    rows = jnp.repeat(jnp.arange(t), keys.shape[-1])

    def attend(q: Array, k: Array, v: Array, sink: Array | None, slopes: Array | None, keys: Array) -> Any:
        offset = call.q_offset + call.first_query
        options = {"scale": call.scale, "softcap": call.softcap, "q_offset": offset, "return_lse": True}
        arrays = (x[None] for x in (q, k, v))
        out, lse = attend_edges(*arrays, rows, keys.ravel(), sink_logits=sink, alibi_slopes=slopes, **options)
        return out[0], lse[0]

    def split(x: Array) -> Array:  # [b, n, heads, d] -> [b, scopes, n, heads per scope, d]
        x = x if x.shape[2] >= scopes else jnp.repeat(x, scopes // x.shape[2], axis=2)
        return jnp.moveaxis(x.reshape(*x.shape[:2], scopes, -1, x.shape[-1]), 2, 1)

    per_scope = jax.vmap(attend, in_axes=(0, 0, 0, *(None if x is None else 0 for x in per_head), 0))
    every = jax.vmap(per_scope, in_axes=(0, 0, 0, None, None, 0))
    split_heads = (None if x is None else x.reshape(scopes, -1) for x in per_head)
    out, lse = every(*map(split, (call.q, call.k, call.v)), *split_heads, keys)
    return tuple(jnp.moveaxis(x, 1, 2).reshape(b, t, h, *x.shape[4:]) for x in (out, lse))  # type: ignore[return-value]


def _run_pattern(call: AttentionCall) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
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
        q_offset=call.q_offset,
    )


def attend_edges(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g value"],
    queries: Int[Array | np.ndarray, " edges"],
    keys: Int[Array | np.ndarray, " edges"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    segment_ids: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    return_lse: bool = False,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "b t h value"] | tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Softmax attention in which query `queries[i]` attends to key `keys[i]`; see `attend`, also for NaN.

    The list may be traced, so that it can depend on the data. All sequences and heads share it; `jax.vmap` over either
    gives each its own list.

    Args:
      q: Queries.
      k: Keys; `g` divides `h`.
      v: Values; their width may differ from that of the keys.
      queries: Positions in any order; ascending ones read memory in order. An edge that occurs twice counts twice; one
        with a position outside `[0, t)` or `[0, s)` is dropped, so that lists can be padded.
      keys: Positions.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      softcap: Bounds the scaled scores to `softcap * tanh(score / softcap)`.
      sink_logits: Logit per query head that joins the softmax's denominator without a value.
      alibi_slopes: Slope per query head of `add_alibi`; constants, without a gradient.
      segment_ids: Segments of queries and of keys; an edge between two segments is dropped.
      return_lse: Whether to return the log-sum-exp too: minus infinity for a query with neither edge nor sink.
      q_offset: Position of the first query, for ALiBi; edges hold indices.

    Returns:
      The output in the dtype of `q`, zeros for a query without an edge, and with `return_lse` the log-sum-exp.

    Raises:
      InputError: Shapes do not agree.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = AttentionCall(q, k, v, Full(), scale, softcap, sink_logits, segment_ids, False, alibi_slopes)
    if queries.ndim != 1 or queries.shape != keys.shape:
        raise InputError("queries", f"shape {list(queries.shape)} is not [edges], as keys' {list(keys.shape)} must be")
    q, k, v = confine_nan(q, k, v)
    (b, t, h, d), (_, s, g, _) = q.shape, k.shape
    rows = jnp.moveaxis(q, 1, 0).reshape(t, b, g, h // g, d)
    per_head = (None if x is None else x.astype(call.dtype).reshape(g, h // g) for x in (sink_logits, alibi_slopes))
    segments = None if segment_ids is None else tuple(jnp.asarray(x).T for x in segment_ids)
    edges = _split_edges(queries, keys, t, s, chunk=max(1, CHUNK // (b * h * max(d, v.shape[-1]))))
    plan = _Plan(scale, softcap, call.dtype)
    sink, slopes = per_head
    alibi = None if slopes is None else (slopes, jnp.asarray(q_offset))
    k, v = jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)
    out, lse = _attend_rows(plan, *vary_alike((rows, k, v, sink, alibi, segments, edges)))
    out, lse = (jnp.moveaxis(x.reshape(t, b, h, *x.shape[4:]), 0, 1) for x in (out, lse))
    return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)


def _split_edges(
    queries: Int[Array | np.ndarray, " edges"], keys: Int[Array | np.ndarray, " edges"], t: int, s: int, chunk: int
) -> Edges:
    """The list in chunks, int32 [chunks, chunk]; edges outside the sequences become padding."""
    count = len(queries)
    chunk = min(chunk, max(1, count))
    inside = (queries >= 0) & (queries < t) & (keys >= 0) & (keys < s)

    def split(positions: Int[Array | np.ndarray, " edges"], padding: int) -> Int[Array, "chunks c"]:
        positions = jnp.where(inside, positions, padding).astype(jnp.int32)
        return jnp.pad(positions, (0, -count % chunk), constant_values=padding).reshape(-(-count // chunk), chunk)

    return Edges(split(queries, t), split(keys, s))


class _Plan(NamedTuple):
    """The static part of a call."""

    scale: float
    softcap: float | None
    dtype: jnp.dtype

    def score(self, q: Float[Array, "c b g r d"], k: Float[Array, "c b g d"]) -> Float[Array, "c b g r"]:
        """Scores of gathered rows, without ALiBi."""
        return softcap(_dot(q, k) * self.scale, self.softcap)

    def add_alibi(self, scores: Float[Array, "c b g r"], alibi: Alibi | None, edges: Edges) -> Float[Array, "c b g r"]:
        """Scores minus the slopes times the distances."""
        slopes, first = (None, 0) if alibi is None else alibi
        return add_alibi(scores, slopes, (edges.queries + first - edges.keys)[:, None, None, None])

    def rows(self, x: Float[Array, " n *rest"], positions: Int[Array, " c"]) -> Float[Array, " c *rest"]:
        """Rows of `x` in the dtype of sums; an arbitrary row for a position outside it."""
        return x.at[positions].get(mode="clip").astype(self.dtype)

    def weights(
        self, scores: Float[Array, "c b g r"], m: Float[Array, "t b g r"], segments: Segments | None, edges: Edges
    ) -> Float[Array, "c b g r"]:
        """exp(score - m) per edge, 0 between segments; `m` is the maximum per query."""
        p = jnp.exp(scores - self.rows(m, edges.queries))
        return p if segments is None else jnp.where(_same_segment(segments, edges), p, 0.0)


def _dot(q: Float[Array, "c b g r d"], k: Float[Array, "c b g d"]) -> Float[Array, "c b g r"]:
    """Products over d: XLA:CPU computes a dot product 5 times as fast as the sum that it equals."""
    return jnp.einsum("cbgrd,cbgd->cbgr", q, k, precision=jax.lax.Precision.HIGHEST)


def _same_segment(segments: Segments, edges: Edges) -> Bool[Array, "c b 1 1"]:
    q_ids, k_ids = (ids.at[positions].get(mode="clip") for ids, positions in zip(segments, edges, strict=True))
    return (q_ids == k_ids)[:, :, None, None]


def _attend_rows_plain(
    plan: _Plan,
    q: Float[Array, "t b g r d"],
    k: Float[Array, "s b g d"],
    v: Float[Array, "s b g value"],
    sink: Float[Array, "g r"] | None,
    alibi: Alibi | None,
    segments: Segments | None,
    edges: Edges,
) -> tuple[Float[Array, "t b g r value"], Float[Array, "t b g r"]]:
    """Output and log-sum-exp."""
    return _attend_rows_forward(plan, q, k, v, sink, jax.lax.stop_gradient(alibi), segments, edges)[0]


def _attend_rows_forward(plan, q, k, v, sink, alibi, segments, edges):
    def score(edges: Edges, q: Array = q, k: Array = k) -> Float[Array, "c b g r"]:
        return plan.add_alibi(plan.score(plan.rows(q, edges.queries), plan.rows(k, edges.keys)), alibi, edges)

    constants = jax.lax.stop_gradient((q, k))  # the maximum has no gradient

    def add_maximum(m, edges):
        scores = score(edges, *constants)
        scores = scores if segments is None else jnp.where(_same_segment(segments, edges), scores, MASKED)
        return m.at[edges.queries].max(scores, mode="drop"), None

    def add_values(carry, edges):
        l, out = carry
        p = plan.weights(score(edges), m, segments, edges)
        values = p[..., None] * plan.rows(v, edges.keys)[:, :, :, None]
        return (l.at[edges.queries].add(p, mode="drop"), out.at[edges.queries].add(values, mode="drop")), None

    m = jnp.full(q.shape[:-1], MASKED, plan.dtype)
    m = m if sink is None else jnp.maximum(m, jax.lax.stop_gradient(sink))
    m, _ = jax.lax.scan(add_maximum, vary_alike((m, q))[0], edges)
    m = jnp.where(m > MASKED / 2, m, 0.0)
    l = jnp.zeros_like(m) if sink is None else jnp.exp(sink - m)
    zeros = jnp.zeros((*m.shape, v.shape[-1]), plan.dtype)
    (l, out), _ = jax.lax.scan(add_values, vary_alike(((l, zeros), q))[0], edges)
    safe_l = jnp.where(l == 0, 1.0, l)
    out = out / safe_l[..., None]
    return (out, log_sum(m, l)), (q, k, v, sink, alibi, segments, edges, out, m, safe_l)


def _attend_rows_backward(plan, residuals, cotangents):
    q, k, v, sink, alibi, segments, edges, out, m, l = residuals
    bad, (d_out, d_lse) = jnp.isnan(l), cotangents  # rows of NaN, which have no gradient
    d_out, out = (jnp.where(bad[..., None], 0, x) for x in (d_out, out))
    d_lse, l, m = jnp.where(bad, 0, d_lse), jnp.where(bad, 1, l), jnp.where(bad, jnp.inf, m)
    q, k = zero_nan(q), zero_nan(k)
    # ds = exp(score - m) * (dp - delta) with dp and delta divided by l, once per query instead of once per edge.
    delta = ((out * d_out).sum(axis=-1) - d_lse) / l
    d_out = d_out / l[..., None]

    def differentiate(carry, edges):
        queries, keys = edges
        dq, dk, dv = carry
        do = plan.rows(d_out, queries)
        scores, score_vjp = jax.vjp(plan.score, plan.rows(q, queries), plan.rows(k, keys))
        p = plan.weights(plan.add_alibi(scores, alibi, edges), m, segments, edges)
        dq_rows, dk_rows = score_vjp(p * (_dot(do, plan.rows(v, keys)) - plan.rows(delta, queries)))
        dv_rows = jnp.einsum("cbgr,cbgrd->cbgd", p, do, precision=jax.lax.Precision.HIGHEST)
        return (
            dq.at[queries].add(dq_rows, mode="drop"),
            dk.at[keys].add(dk_rows, mode="drop"),
            dv.at[keys].add(dv_rows, mode="drop"),
        ), None

    zeros = tuple(jnp.zeros(x.shape, plan.dtype) for x in (q, k, v))
    grads, _ = jax.lax.scan(differentiate, vary_alike((zeros, q))[0], edges)
    dq, dk, dv = (grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))
    d_sink = None if sink is None else -(jnp.exp(sink - m) * delta).sum(axis=(0, 1))
    return dq, dk, dv, d_sink, None, None, None


_attend_rows = with_derivatives(_attend_rows_forward, _attend_rows_backward, _attend_rows_plain)
