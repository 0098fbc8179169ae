"""Attention to keys that the data choose, by the lists of a `Selection`.

Blocks are the outer loop: the (query, block) pairs are sorted by block, and a chunk of queries that chose the same
block attends to it in two matrix products. Each pair keeps its part of the output and its log-sum-exp, and a query
merges its parts. The backward pass recomputes the scores from the merged log-sum-exp (FlashAttention-2,
arXiv:2307.08691). Time grows with the number of chosen keys, memory with the number of pairs. This serves blocks of
several keys; for single keys see `sparsejax.ops.masked` and `sparsejax.ops.segment`.

Names are those of `sparsejax.ops.softmax`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.chunks import vary_alike
from sparsejax.ops.derivatives import with_derivatives
from sparsejax.ops.selection import Selection
from sparsejax.ops.softmax import MASKED, log_multiplicity, log_sum, softcap, zero_nan
from sparsejax.patterns import Pattern

CHUNK = 128  # queries that attend to a block at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call: all but the arrays."""

    pattern: Pattern
    t: int  # queries that the pattern counts
    s: int
    size: int
    scale: float
    softcap: float | None
    dtype: jnp.dtype
    q_offset: int


class Lists(NamedTuple):
    """The pairs of a query and a block, sorted by block.

    Attributes:
      queries: Query of each pair, in the order of blocks.
      order: Index of each pair of `groups` in this order.
      blocks: Block of each chunk: a block with n pairs has ceil(n / CHUNK) chunks.
      firsts: First pair of each chunk.
      ends: One past the last pair of the block of each chunk.
      chunks: Number of chunks; the arrays are as long as there can be.
    """

    queries: Int[Array, " pairs"]
    order: Int[Array, "t k"]
    blocks: Int[Array, " most"]
    firsts: Int[Array, " most"]
    ends: Int[Array, " most"]
    chunks: Int[Array, ""]


def list_pairs(groups: Int[Array, "t k"], count: int) -> Lists:
    """Sorts the pairs of a selection by block; those of the block -1 come last."""
    t, k = groups.shape
    blocks = jnp.where(groups < 0, count, groups).ravel()
    order = _sort_stably(blocks, count)
    index = jnp.zeros(t * k, jnp.int32).at[order].set(jnp.arange(t * k, dtype=jnp.int32))
    ends = jnp.searchsorted(blocks[order], jnp.arange(count), side="right").astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    chunks = -(-(ends - starts) // CHUNK)
    after, most = jnp.cumsum(chunks), t * k // CHUNK + count
    of_chunk = jnp.repeat(jnp.arange(count), chunks, total_repeat_length=most)
    firsts = starts[of_chunk] + (jnp.arange(most) - (after - chunks)[of_chunk]) * CHUNK
    queries = (order // k).astype(jnp.int32)
    return Lists(queries, index.reshape(t, k), of_chunk, firsts, ends[of_chunk], after[-1])


def _sort_stably(x: Int[Array, " n"], largest: int) -> Int[Array, " n"]:
    """`jnp.argsort` of integers from 0 to `largest`: as one sort of integers, which on a CPU is 5 times as fast."""
    n = len(x)
    if (largest + 1) * n > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(x, stable=True)
    return jax.lax.sort(x.astype(jnp.int32) * n + jnp.arange(n, dtype=jnp.int32)) % n


class Sequence(NamedTuple):
    """One sequence of queries that share their groups.

    Attributes:
      q: Queries of `g` key/value heads and `r` query heads per key/value head.
      k: Keys.
      v: Values.
      sink: Sink logits.
      slopes: Slopes of ALiBi.
      ids: Segment ids of queries and of keys.
      first: Index of the first query under the pattern.
      groups: Chosen blocks.
      of_key: Block of each key.
      starts: First key of each block.
    """

    q: Float[Array, "*p t g r d"]
    k: Float[Array, "*p s g d"]
    v: Float[Array, "*p s g value"]
    sink: Float[Array, "*p g r"] | None
    slopes: Float[Array, "*p g r"] | None
    ids: tuple[Int[Array, "*p t"], Int[Array, "*p s"]] | None
    first: Int[Array, "*p"]
    groups: Int[Array, "*p t k"]
    of_key: Int[Array, "*p s"]
    starts: Int[Array, "*p n"]


def run(
    call: AttentionCall, selection: Selection, attend: Callable[..., tuple[Array, Array]]
) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in `call.dtype`, by a function of a plan and the arrays of sequences."""
    (b, t, h, _), (_, s, g, _) = call.q.shape, call.k.shape
    sizes = call.query_count, s, selection.blocks.size
    plan = Plan(call.pattern, *sizes, call.scale, call.softcap, call.dtype, call.q_offset)
    scopes = selection.groups.shape[1]
    heads = max(1, g // scopes)  # key/value heads per scope

    def split_queries(x: Array) -> Array:  # [b, ..., h, d] -> [b * scopes, ..., heads, r, d]
        x = x.reshape(b, t, scopes, heads, -1, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(b * scopes, t, heads, *x.shape[4:])

    def split_keys(x: Array) -> Array:
        x = jnp.repeat(x, scopes // g, axis=2) if scopes > g else x
        return jnp.moveaxis(x.reshape(b, s, scopes, heads, -1), 2, 1).reshape(b * scopes, s, heads, -1)

    def per_scope(x: Array | None) -> Array | None:
        return None if x is None else jnp.tile(x.astype(plan.dtype).reshape(scopes, heads, -1), (b, 1, 1))

    def per_sequence(x: Array) -> Array:
        return jnp.repeat(jnp.broadcast_to(x, (b, *x.shape[1:])), scopes, axis=0)

    sequence = Sequence(
        split_queries(call.q),
        split_keys(call.k),
        split_keys(call.v),
        *map(per_scope, (call.sink_logits, call.alibi_slopes)),
        None if call.segments is None else tuple(map(per_sequence, call.segments)),
        jnp.full(b * scopes, call.first_query),
        selection.groups.reshape(b * scopes, t, -1),
        per_sequence(selection.blocks.of_key),
        per_sequence(selection.blocks.starts),
    )
    out, lse = attend(plan, *vary_alike(tuple(sequence)))

    def join(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, scopes, t, -1, *x.shape[4:]), 1, 2).reshape(b, t, h, *x.shape[4:])

    return join(out).astype(call.q.dtype), join(lse)


class _Chunk(NamedTuple):
    """Queries that attend to one block.

    Attributes:
      first: First of their pairs.
      rows: The queries; arbitrary where the mask is False.
      start: First key of the block.
      mask: Allowed pairs.
      bias: Added to the scores: the logarithms of the pattern's multiplicities, and ALiBi.
    """

    first: Int[Array, ""]
    rows: Int[Array, " c"]
    start: Int[Array, ""]
    mask: Bool[Array, "c size"]
    bias: Float[Array, "#g #r #c #size"] | float


def _load(plan: Plan, x: Sequence, lists: Lists, chunk: Int[Array, ""]) -> _Chunk:
    block, first = lists.blocks[chunk], lists.firsts[chunk]
    pairs = first + jnp.arange(CHUNK)
    rows = lists.queries.at[pairs].get(mode="clip")
    keys = x.starts[block] + jnp.arange(plan.size)
    mask = (pairs < lists.ends[chunk])[:, None] & (x.of_key.at[keys].get(mode="clip") == block) & (keys < plan.s)
    queries = rows[:, None] + x.first
    mask &= plan.pattern.allows(queries, keys, plan.t, plan.s)
    if x.ids is not None:
        mask &= x.ids[0][rows][:, None] == x.ids[1].at[keys].get(mode="clip")
    bias = log_multiplicity(plan.pattern, queries, keys, plan.t, plan.s)
    if x.slopes is not None:
        bias = bias - x.slopes[..., None, None] * abs(queries + plan.q_offset - keys)
    return _Chunk(first, rows, x.starts[block], mask, bias)


def _score(plan: Plan, q: Float[Array, "c g r d"], k: Float[Array, "size g d"]) -> Float[Array, "g r c size"]:
    return softcap(jnp.einsum("cgrd,kgd->grck", q, k) * plan.scale, plan.softcap)


def _slice(x: Float[Array, " s *rest"], start: Int[Array, ""], size: int) -> Float[Array, " size *rest"]:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _pad(x: Float[Array, " s *rest"], size: int, dtype: jnp.dtype) -> Float[Array, " padded *rest"]:
    """Appends zeros, so that a slice of a short block stays inside."""
    return jnp.pad(x.astype(dtype), ((0, size), *((0, 0),) * (x.ndim - 1)))


def _forward_sequence(loop: Callable[..., Any], plan: Plan, x: Sequence) -> tuple[Array, Array]:
    lists = list_pairs(x.groups, len(x.starts))
    q, k, v = x.q.astype(plan.dtype), _pad(x.k, plan.size, plan.dtype), _pad(x.v, plan.size, plan.dtype)
    pairs = x.groups.size + CHUNK

    def attend(chunk: Array, parts: tuple[Array, Array]) -> tuple[Array, Array]:
        at = _load(plan, x, lists, chunk)
        scores = _score(plan, q[at.rows], _slice(k, at.start, plan.size))
        scores = jnp.where(at.mask, scores + at.bias, MASKED)
        m = scores.max(axis=-1)
        m = jnp.where(m > MASKED / 2, m, 0.0)
        p = jnp.exp(scores - m[..., None])
        l = p.sum(axis=-1)
        out = jnp.einsum("grck,kge->cgre", p, _slice(v, at.start, plan.size))
        l, m = (jnp.moveaxis(y, -1, 0) for y in (l, m))
        out = out / jnp.where(l == 0, 1.0, l)[..., None]
        new = out, log_sum(m, l)
        return tuple(  # what is after the pairs of the block are written again by the next chunk
            jax.lax.dynamic_update_slice_in_dim(part, y, at.first, 0) for part, y in zip(parts, new, strict=True)
        )

    shape = (pairs, *x.q.shape[1:-1])
    empty = jnp.zeros((*shape, v.shape[-1]), plan.dtype), jnp.full(shape, -jnp.inf, plan.dtype)
    outs, lses = loop(lists, attend, empty)
    return _merge(lists.order, x.groups, outs, lses, x.sink)


def _merge(
    order: Int[Array, "t k"],
    groups: Int[Array, "t k"],
    outs: Float[Array, "pairs g r value"],
    lses: Float[Array, "pairs g r"],
    sink: Float[Array, "g r"] | None,
) -> tuple[Float[Array, "t g r value"], Float[Array, "t g r"]]:
    """The output and the log-sum-exp of each query from those of its pairs."""
    lse = jnp.where((groups >= 0)[..., None, None], lses[order], -jnp.inf)  # [t, k, g, r]
    m = lse.max(axis=1)
    m = m if sink is None else jnp.maximum(m, sink)
    m = jnp.where(m > -jnp.inf, m, 0.0)
    weights = jnp.exp(lse - m[:, None])
    l = weights.sum(axis=1)
    l = l if sink is None else l + jnp.exp(sink - m)
    weights = weights / jnp.where(l == 0, 1.0, l)[:, None]

    def add(out: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        index, weight = part
        return out + weight[..., None] * jnp.where(weight[..., None] == 0, 0.0, outs[index]), None

    zeros = jnp.zeros((*m.shape, outs.shape[-1]), outs.dtype)
    out, _ = jax.lax.scan(add, zeros, (order.T, jnp.moveaxis(weights, 1, 0)))
    return out, log_sum(m, l)


def _backward_sequence(
    loop: Callable[..., Any], plan: Plan, x: Sequence, lse: Array, delta: Array, d_out: Array
) -> tuple[Array, ...]:
    """Gradients of q, k and v from delta = sum(out * d_out) - d_lse."""
    lists = list_pairs(x.groups, len(x.starts))
    q, k = zero_nan(x.q).astype(plan.dtype), _pad(zero_nan(x.k), plan.size, plan.dtype)
    v = _pad(x.v, plan.size, plan.dtype)

    def differentiate(chunk: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = carry
        at = _load(plan, x, lists, chunk)
        q_rows, do = q[at.rows], d_out[at.rows]
        row_lse, row_delta = (jnp.moveaxis(y[at.rows], 0, -1)[..., None] for y in (lse, delta))
        k_tile, v_tile = (_slice(y, at.start, plan.size) for y in (k, v))
        scores, score_vjp = jax.vjp(lambda q, k: _score(plan, q, k), q_rows, k_tile)
        p = jnp.where(at.mask, jnp.exp(scores + at.bias - row_lse), 0.0)
        dq_rows, dk_tile = score_vjp(p * (jnp.einsum("cgre,kge->grck", do, v_tile) - row_delta))
        dv_tile = jnp.einsum("grck,cgre->kge", p, do)
        dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_rows, at.first, 0)

        def add(y: Array, tile: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(y, _slice(y, at.start, plan.size) + tile, at.start, 0)

        return dq, add(dk, dk_tile), add(dv, dv_tile)

    dq = jnp.zeros((x.groups.size + CHUNK, *q.shape[1:]), plan.dtype)
    zeros = dq, jnp.zeros_like(k), jnp.zeros_like(v)
    parts, dk, dv = loop(lists, differentiate, zeros)

    def add(dq: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        index, chosen = part
        return dq + jnp.where(chosen[:, None, None, None], parts[index], 0.0), None

    dq, _ = jax.lax.scan(add, jnp.zeros_like(q), (lists.order.T, (x.groups >= 0).T))
    return dq, dk[: plan.s], dv[: plan.s]


def _loop_fast(lists: Lists, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Visits the chunks that exist; JAX does not differentiate a loop of unknown length in reverse mode."""
    return jax.lax.fori_loop(0, lists.chunks, body, carry)


def _loop_differentiable(lists: Lists, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Visits as many chunks as there can be, and skips those that do not exist."""

    def visit(carry: Any, chunk: Array) -> tuple[Any, None]:
        return jax.lax.cond(chunk < lists.chunks, body, lambda _, carry: carry, chunk, carry), None

    return jax.lax.scan(visit, carry, jnp.arange(len(lists.blocks)))[0]


def _per_sequence(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """Maps a function over sequences; its derivatives are those of the loop that JAX can differentiate."""

    def run(loop: Callable[..., Any], plan: Plan, arrays: Any) -> tuple[Array, ...]:
        return jax.lax.map(lambda x: function(loop, plan, *x), arrays)

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def run_fast(plan: Plan, *arrays: Any) -> tuple[Array, ...]:
        return run(_loop_fast, plan, arrays)

    @run_fast.defjvp
    def differentiate(plan: Plan, arrays: Any, tangents: Any) -> Any:
        return jax.jvp(lambda *arrays: run(_loop_differentiable, plan, arrays), arrays, tangents)

    return run_fast


def differentiable(
    forward: Callable[..., tuple[Array, Array]], backward: Callable[..., tuple[Array, ...]]
) -> Callable[..., tuple[Array, Array]]:
    """Attention of a plan and the arrays of sequences, with derivatives of every mode and order.

    Args:
      forward: Maps a plan and a `Sequence` with a leading axis to the output and the log-sum-exp.
      backward: Maps these, the log-sum-exp, delta = sum(out * d_out) - d_lse and d_out to the gradients of q, k and v.
    """

    def attend_forward(plan, *arrays):
        out, lse = forward(plan, Sequence(*arrays))
        return (out, lse), (arrays, out, lse)

    def attend_backward(plan, residuals, cotangents):
        arrays, out, lse = residuals
        x, (d_out, d_lse) = Sequence(*arrays), cotangents
        bad = jnp.isnan(lse)  # rows of NaN, which have no gradient
        d_out, out = (jnp.where(bad[..., None], 0, y) for y in (d_out, out))
        delta = (out * d_out).sum(axis=-1) - jnp.where(bad, 0, d_lse)
        lse = jnp.where(bad, jnp.inf, jnp.where(lse > -jnp.inf, lse, 0.0))
        dq, dk, dv = backward(plan, x, lse, delta, d_out)
        d_sink = None if x.sink is None else -(jnp.exp(x.sink[:, None] - lse) * delta).sum(axis=1)
        grads = (y.astype(z.dtype) for y, z in zip((dq, dk, dv), (x.q, x.k, x.v), strict=True))
        return *grads, d_sink, *(None,) * 6

    return with_derivatives(attend_forward, attend_backward, lambda plan, *x: forward(plan, Sequence(*x)))


attend_blocks = differentiable(_per_sequence(_forward_sequence), _per_sequence(_backward_sequence))
