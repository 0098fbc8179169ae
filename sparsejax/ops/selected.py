"""Attention to keys that the data choose, by the lists of a `Selection`.

Blocks are the outer loop: the (query, block) pairs are sorted by block, and a chunk of queries that chose the same
block attends to it in two matrix products; a step of the loop visits several chunks. Each pair keeps its part of the
output and its log-sum-exp, and a query merges its parts. The backward pass recomputes the scores from the merged
log-sum-exp (FlashAttention-2, arXiv:2307.08691). Time grows with the number of chosen keys, memory with the number of
pairs. This serves blocks of several keys; for single keys see `sparsejax.ops.masked` and `sparsejax.ops.segment`.

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
BATCH, BATCH_KEYS = 8, 512  # most chunks of a step, and keys: XLA:CPU divides their products among its threads


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

    @property
    def batch(self) -> int:
        """Number of chunks per step."""
        return min(BATCH, max(1, BATCH_KEYS // self.size))


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
      lists: The pairs of queries and blocks.
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
    lists: Lists | None = None


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


class _Batch(NamedTuple):
    """Chunks of queries, each of which attends to one block.

    Attributes:
      firsts: First pair of each chunk; past the last pair if the chunk does not exist.
      rows: The queries; arbitrary where the mask is False.
      starts: First key of each block.
      mask: Allowed pairs.
      bias: Added to the scores: the logarithms of the pattern's multiplicities, and ALiBi.
    """

    firsts: Int[Array, " n"]
    rows: Int[Array, "n c"]
    starts: Int[Array, " n"]
    mask: Bool[Array, "n c 1 size"]
    bias: Float[Array, "#g #n #c #r #size"] | float


def _load(plan: Plan, x: Sequence, step: Int[Array, ""]) -> _Batch:
    lists = x.lists
    chunks = step * plan.batch + jnp.arange(plan.batch)
    blocks, firsts, ends = (y.at[chunks].get(mode="clip") for y in (lists.blocks, lists.firsts, lists.ends))
    firsts, starts = jnp.where(chunks < lists.chunks, firsts, len(lists.queries)), x.starts[blocks]
    pairs, keys = firsts[:, None] + jnp.arange(CHUNK), starts[:, None] + jnp.arange(plan.size)
    rows = lists.queries.at[pairs].get(mode="clip")
    mask = ((x.of_key.at[keys].get(mode="clip") == blocks[:, None]) & (keys < plan.s))[:, None]
    queries, keys = rows[..., None] + x.first, keys[:, None]
    mask &= (pairs < ends[:, None])[..., None] & plan.pattern.allows(queries, keys, plan.t, plan.s)
    if x.ids is not None:
        mask &= x.ids[0][rows][..., None] == x.ids[1].at[keys].get(mode="clip")
    bias = log_multiplicity(plan.pattern, queries, keys, plan.t, plan.s)
    bias = bias if isinstance(bias, float) else bias[:, :, None]
    if x.slopes is not None:
        distances = abs(queries + plan.q_offset - keys)
        bias = bias - x.slopes[:, None, None, :, None] * distances[:, :, None]
    return _Batch(firsts, rows, starts, mask[:, :, None], bias)


# Inside a batch: queries [g, n, c, r, d] and blocks of keys [g, n, size, d]. XLA:CPU copies a transposed operand of a
# product, so keys are transposed once before the loop (kt, vt), and their gradients after it (dkt, dvt).


def _product(plan: Plan, q: Float[Array, "g n c r d"], kt: Float[Array, "g n d size"]) -> Float[Array, "g n c r size"]:
    return jnp.einsum("gncrd,gndk->gncrk", q, kt) * plan.scale


def _take(x: Float[Array, "g _ _"], starts: Int[Array, " n"], size: int, axis: int = 1) -> Float[Array, "g n _ _"]:
    """Slices of a block each, along an axis of the keys."""
    return jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, x, slice_size=size, axis=axis), out_axes=1)(starts)


def _put(x: Float[Array, "g pairs *rest"], new: Float[Array, "g n c *rest"], starts: Int[Array, " n"]) -> Array:
    """Writes chunks in order: what is after the pairs of a block, the next chunk writes again."""
    for chunk in range(len(starts)):
        x = jax.lax.dynamic_update_slice_in_dim(x, new[:, chunk], starts[chunk], axis=1)
    return x


def _add(xt: Float[Array, "g d s"], tiles: Float[Array, "g n d size"], starts: Int[Array, " n"]) -> Array:
    """Adds tiles in order, since chunks may have the same block."""
    for chunk in range(len(starts)):
        tile = jax.lax.dynamic_slice_in_dim(xt, starts[chunk], tiles.shape[3], axis=2) + tiles[:, chunk]
        xt = jax.lax.dynamic_update_slice_in_dim(xt, tile, starts[chunk], axis=2)
    return xt


def _arrange(x: Float[Array, " n g *rest"], dtype: jnp.dtype, padding: int = 0) -> Float[Array, "g padded *rest"]:
    """Moves the heads to the front, and appends zeros, so that a slice of a short block stays inside."""
    return jnp.moveaxis(jnp.pad(x.astype(dtype), ((0, padding), *((0, 0),) * (x.ndim - 1))), 1, 0)


def _forward_sequence(loop: Callable[..., Any], plan: Plan, x: Sequence) -> tuple[Array, Array]:
    q = _arrange(x.q, plan.dtype)
    k, v = (_arrange(y, plan.dtype, plan.size) for y in (x.k, x.v))
    kt = k.mT

    def attend(step: Array, parts: tuple[Array, Array]) -> tuple[Array, Array]:
        at = _load(plan, x, step)
        scores = softcap(_product(plan, q[:, at.rows], _take(kt, at.starts, plan.size, axis=2)), plan.softcap)
        scores = jnp.where(at.mask, scores + at.bias, MASKED)
        m = scores.max(axis=-1)
        m = jnp.where(m > MASKED / 2, m, 0.0)
        p = jnp.exp(scores - m[..., None])
        l = p.sum(axis=-1)
        out = jnp.einsum("gncrk,gnke->gncre", p, _take(v, at.starts, plan.size))
        out = out / jnp.where(l == 0, 1.0, l)[..., None]
        return _put(parts[0], out, at.firsts), _put(parts[1], log_sum(m, l), at.firsts)

    g, _, r, _ = q.shape
    shape = g, x.groups.size + CHUNK, r
    empty = jnp.zeros((*shape, v.shape[-1]), plan.dtype), jnp.full(shape, -jnp.inf, plan.dtype)
    outs, lses = loop(plan.batch, x.lists, attend, empty)
    out, lse = _merge(x.lists.order, x.groups, outs, lses, x.sink)
    return jnp.moveaxis(out, 0, 1), jnp.moveaxis(lse, 0, 1)


def _merge(
    order: Int[Array, "t k"],
    groups: Int[Array, "t k"],
    outs: Float[Array, "g pairs r value"],
    lses: Float[Array, "g pairs r"],
    sink: Float[Array, "g r"] | None,
) -> tuple[Float[Array, "g t r value"], Float[Array, "g t r"]]:
    """The output and the log-sum-exp of each query from those of its pairs."""
    lse = jnp.where((groups >= 0)[..., None], lses[:, order], -jnp.inf)  # [g, t, k, r]
    m = lse.max(axis=2)
    m = m if sink is None else jnp.maximum(m, sink[:, None])
    m = jnp.where(m > -jnp.inf, m, 0.0)
    weights = jnp.exp(lse - m[:, :, None])
    l = weights.sum(axis=2)
    l = l if sink is None else l + jnp.exp(sink[:, None] - m)
    weights = weights / jnp.where(l == 0, 1.0, l)[:, :, None]

    def add(out: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        index, weight = part
        return out + weight[..., None] * jnp.where(weight[..., None] == 0, 0.0, outs[:, index]), None

    zeros = jnp.zeros((*m.shape, outs.shape[-1]), outs.dtype)
    out, _ = jax.lax.scan(add, zeros, (order.T, jnp.moveaxis(weights, 2, 0)))
    return out, log_sum(m, l)


def _backward_sequence(
    loop: Callable[..., Any], plan: Plan, x: Sequence, lse: Array, delta: Array, d_out: Array
) -> tuple[Array, ...]:
    """Gradients of q, k and v from delta = sum(out * d_out) - d_lse."""
    q, d_out, lse, delta = (_arrange(y, plan.dtype) for y in (zero_nan(x.q), d_out, lse, delta))
    k, v = (_arrange(y, plan.dtype, plan.size) for y in (zero_nan(x.k), x.v))
    kt, vt = k.mT, v.mT

    def differentiate(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dkt, dvt = carry
        at = _load(plan, x, step)
        kt_tiles, vt_tiles = (_take(y, at.starts, plan.size, axis=2) for y in (kt, vt))
        q_rows, do, row_lse, row_delta = q[:, at.rows], d_out[:, at.rows], lse[:, at.rows], delta[:, at.rows]
        scores, softcap_vjp = jax.vjp(functools.partial(softcap, limit=plan.softcap), _product(plan, q_rows, kt_tiles))
        p = jnp.where(at.mask, jnp.exp(scores + at.bias - row_lse[..., None]), 0.0)
        (ds,) = softcap_vjp(p * (jnp.einsum("gncre,gnek->gncrk", do, vt_tiles) - row_delta[..., None]))
        ds = ds * plan.scale
        dq_rows = jnp.einsum("gncrk,gnkd->gncrd", ds, _take(k, at.starts, plan.size))
        dkt_tiles = jnp.einsum("gncrd,gncrk->gndk", q_rows, ds)
        dvt_tiles = jnp.einsum("gncre,gncrk->gnek", do, p)
        return _put(dq, dq_rows, at.firsts), _add(dkt, dkt_tiles, at.starts), _add(dvt, dvt_tiles, at.starts)

    g, _, r, d = q.shape
    zeros = jnp.zeros((g, x.groups.size + CHUNK, r, d), plan.dtype), jnp.zeros_like(kt), jnp.zeros_like(vt)
    parts, dkt, dvt = loop(plan.batch, x.lists, differentiate, zeros)

    def add(dq: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        index, chosen = part
        return dq + jnp.where(chosen[:, None, None], parts[:, index], 0.0), None

    dq, _ = jax.lax.scan(add, jnp.zeros_like(q), (x.lists.order.T, (x.groups >= 0).T))
    return tuple(jnp.moveaxis(y, 0, 1) for y in (dq, dkt.mT[:, : plan.s], dvt.mT[:, : plan.s]))


def _loop_fast(batch: int, lists: Lists, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Visits the chunks that exist; JAX does not differentiate a loop of unknown length in reverse mode."""
    return jax.lax.fori_loop(0, -(-lists.chunks // batch), body, carry)


def _loop_differentiable(batch: int, lists: Lists, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Visits as many chunks as there can be, and skips those that do not exist."""

    def visit(carry: Any, step: Array) -> tuple[Any, None]:
        return jax.lax.cond(step * batch < lists.chunks, body, lambda _, carry: carry, step, carry), None

    return jax.lax.scan(visit, carry, jnp.arange(-(-len(lists.blocks) // batch)))[0]


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
        d_out = jnp.where(bad[..., None], 0, d_out)
        products = jax.lax.map(lambda x: (x[0] * x[1]).sum(axis=-1), (out, d_out))  # of one sequence at a time
        delta = jnp.where(bad, 0, products - d_lse)
        lse = jnp.where(bad, jnp.inf, jnp.where(lse > -jnp.inf, lse, 0.0))
        dq, dk, dv = backward(plan, x, lse, delta, d_out)
        d_sink = None if x.sink is None else -(jnp.exp(x.sink[:, None] - lse) * delta).sum(axis=1)
        grads = (y.astype(z.dtype) for y, z in zip((dq, dk, dv), (x.q, x.k, x.v), strict=True))
        return *grads, d_sink, *(None,) * 7

    return with_derivatives(attend_forward, attend_backward, lambda plan, *x: forward(plan, Sequence(*x)))


_attend_blocks = differentiable(_per_sequence(_forward_sequence), _per_sequence(_backward_sequence))


def attend_blocks(plan: Plan, *arrays: Any) -> tuple[Array, Array]:
    """Output and log-sum-exp of the arrays of sequences, by chunks of queries that chose the same block."""
    x = Sequence(*arrays)
    lists = jax.lax.map(lambda groups: list_pairs(groups, x.starts.shape[-1]), x.groups)
    return _attend_blocks(plan, *x._replace(lists=lists))
