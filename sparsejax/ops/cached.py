"""Attention of a few queries per sequence to the slots of a KV cache, for decoding and chunked prefill."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.ops import softmax
from sparsejax.ops.call import require_softcap
from sparsejax.ops.chunks import pad_to_multiple
from sparsejax.ops.selection import Selection
from sparsejax.ops.softmax import MASKED
from sparsejax.patterns import Pattern

State = tuple[Array, Array, Array]
QUERIES, KEYS = 128, 256  # queries and keys whose scores are in memory at a time
SELECTING = 16  # queries whose chosen keys are in memory at a time
GROUP = 16  # query heads per key head up to which a CPU multiplies each by the keys


def attend_cached(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s value"],
    pattern: Pattern,
    q_positions: Int[Array, "b t"],
    k_positions: Int[Array, "b s"],
    length: int,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    return_lse: bool = False,
) -> Float[Array, "b t h value"] | tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Softmax attention of queries to keys in any order, whose positions may differ between sequences.

    Blocks of keys to which no query of a block attends are skipped, so that time is proportional to the blocks with an
    allowed pair, and memory to one block. Heads precede slots in keys and values, because a product with a cache of
    another order would copy it in every step. A query that is not finite, or that attends to a key of NaN, gives NaN.

    Args:
      q: Queries.
      k: Keys; a key that is not finite is NaN, as `softmax.confine_nan` returns it.
      v: Values, which are finite.
      pattern: The allowed keys per query.
      q_positions: Position of each query.
      k_positions: Position of each key; -1 in an empty slot.
      length: Length of the sequence that the pattern describes.
      scale: Factor on q·k.
      softcap: Bounds the scaled scores; see `attend`.
      sink_logits: Logit per query head in the softmax's denominator.
      alibi_slopes: Slope per query head; see `attend`.
      return_lse: Whether to return the log-sum-exp too; see `attend`.

    Returns:
      The output in the dtype of `v`, zeros in a row without an allowed key, and with `return_lse` the log-sum-exp.
    """
    require_softcap(softcap)
    (b, t, h, d), (_, g, s, _), value = q.shape, k.shape, v.shape[-1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = jnp.moveaxis(q.reshape(b, t, g, h // g, d), 1, 3).astype(k.dtype)
    rows = b, g, h // g
    sink, slopes = (None if x is None else x.astype(dtype).reshape(g, -1, 1) for x in (sink_logits, alibi_slopes))

    def start(t: int) -> State:
        """Maximum and sum of the scores, and the weighted sum of values, of a sink and no keys."""
        m = jnp.full((*rows, t), MASKED, dtype) if sink is None else jnp.broadcast_to(sink, (*rows, t))
        return m, jnp.full(m.shape, 0.0 if sink is None else 1.0, dtype), jnp.zeros((*m.shape, value), dtype)

    def group(x: Shaped[Array, "*h b t s"]) -> Shaped[Array, "b _ _ t s"]:
        return x[:, None, None] if x.ndim == 3 else jnp.moveaxis(x.reshape(*rows[1:], *x.shape[1:]), 2, 0)

    def find_allowed(q_at: Int[Array, "b t"], k_at: Int[Array, "b s"]) -> Bool[Array, "b _ _ t s"]:
        queries, keys = q_at[..., None], k_at[:, None]
        return group(pattern.allows(queries, keys, length, length) & (keys >= 0))

    def add(state: State, q: Array, k: Array, v: Array, q_at: Array, k_at: Array, mask: Array) -> State:
        """Adds keys to the sums, as FlashAttention does."""
        m, l, acc = state
        by_head = _multiply_by_head if q.shape[3] == 1 and q.shape[2] <= GROUP else _multiply
        scores = scale * jax.lax.platform_dependent(q, k, cpu=by_head, default=_multiply).astype(dtype)
        scores, queries, keys = softmax.softcap(scores, softcap), q_at[..., None], k_at[:, None]
        if slopes is not None:
            scores = softmax.add_alibi(scores, slopes[..., None], (queries - keys)[:, None, None])
        if pattern.repeats:
            scores = scores + group(softmax.log_multiplicity(pattern, queries, keys, length, length))
        scores = jnp.where(mask, scores, MASKED)
        before, m = m, jnp.maximum(m, scores.max(axis=-1))
        p, alpha = jnp.where(mask, jnp.exp(scores - m[..., None]), 0.0), jnp.exp(before - m)
        added = jnp.einsum("bgrts,bgse->bgrte", p.astype(v.dtype), v, preferred_element_type=dtype)
        return m, alpha * l + p.sum(axis=-1), alpha[..., None] * acc + added

    def attend_block(block: tuple[Array, Array]) -> tuple[Array, Array]:
        q, q_at = block

        def visit(i: Array, state: State) -> State:
            def take(x: Array, axis: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, i * KEYS, KEYS, axis)

            k_at = take(k_positions, 1)
            mask = find_allowed(q_at, k_at)
            return jax.lax.cond(
                mask.any(), lambda: add(state, q, take(k, 2), take(v, 2), q_at, k_at, mask), lambda: state
            )

        return finish(jax.lax.fori_loop(0, k.shape[2] // KEYS, visit, start(QUERIES)))

    def finish(state: State) -> tuple[Float[Array, "b g r t value"], Float[Array, "b g r t"]]:
        m, l, acc = state
        return acc / jnp.where(l == 0, 1.0, l)[..., None], softmax.log_sum(m, l)

    if t == 1 or t * s <= QUERIES * KEYS:
        k, v = jax.lax.platform_dependent(k, v, cpu=_fix_layouts, default=lambda k, v: (k, v))
        mask = find_allowed(q_positions, k_positions)
        out, lse = finish(add(start(t), q, k, v, q_positions, k_positions, mask))
    else:
        k, v = (pad_to_multiple(x, KEYS, 2) for x in (k, v))
        k_positions = pad_to_multiple(k_positions + 1, KEYS, 1) - 1
        blocks = _split(q, 3), _split(q_positions, 1)
        parts = (jnp.moveaxis(x, 0, 3) for x in jax.lax.map(attend_block, blocks))
        out, lse = (x.reshape(*rows, -1, *x.shape[5:])[:, :, :, :t] for x in parts)
    out, lse = (jnp.moveaxis(x, 3, 1).reshape(b, t, h, *x.shape[4:]) for x in (out, lse))
    return (out.astype(v.dtype), lse) if return_lse else out.astype(v.dtype)


def attend_cached_selection(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g value"],
    selection: Selection,
    pattern: Pattern,
    q_positions: Int[Array, "b t"],
    k_positions: Int[Array, "b s"],
    length: int,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    return_lse: bool = False,
) -> Float[Array, "b t h value"] | tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """As `attend_cached`, to the keys that each query chose; gathers those of `SELECTING` queries at a time.

    Keys and values have slots before heads, because a query gathers whole slots.
    """
    require_softcap(softcap)
    (b, _, h, d), (_, s, g, _), scopes = q.shape, k.shape, selection.groups.shape[1]
    dtype, heads = jnp.promote_types(q.dtype, jnp.float32), max(1, g // scopes)
    k, v = (
        jnp.moveaxis(jnp.repeat(x, max(1, scopes // g), axis=2).reshape(b, s, scopes, heads, -1), 2, 1) for x in (k, v)
    )
    sink, slopes = (
        None if x is None else x.astype(dtype).reshape(scopes, heads, -1)[None, :, None, :, :, None]
        for x in (sink_logits, alibi_slopes)
    )
    take = jax.vmap(jax.vmap(lambda x, keys: x[jnp.maximum(keys, 0)]))

    def attend(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, groups, at = chunk
        keys = Selection(jnp.moveaxis(groups, 1, 2), selection.blocks).keys
        keys_at = jnp.take_along_axis(k_positions, jnp.maximum(keys, 0).reshape(b, -1), axis=1).reshape(keys.shape)
        queries = at[:, None, :, None]
        mask = (keys >= 0) & (keys_at >= 0) & pattern.allows(queries, keys_at, length, length)
        scores = jnp.einsum("bcxgrd,bxcngd->bxcgrn", q.astype(k.dtype), take(k, keys), preferred_element_type=dtype)
        distance = (queries - keys_at)[:, :, :, None, None]
        scores = softmax.add_alibi(softmax.softcap(scores * scale, softcap), slopes, distance)
        p, lse = softmax.masked_softmax(scores, mask[:, :, :, None, None], sink)
        y = jnp.einsum("bxcgrn,bxcnge->bcxgre", p.astype(v.dtype), take(v, keys), preferred_element_type=dtype)
        return y, jnp.moveaxis(lse, 2, 1)

    size = min(q.shape[1], SELECTING)
    arrays = q.reshape(*q.shape[:2], scopes, heads, -1, d), jnp.moveaxis(selection.groups, 2, 1), q_positions
    chunks = tuple(_split(x, 1, size) for x in arrays)
    parts = (jnp.moveaxis(x, 0, 1) for x in jax.lax.map(attend, chunks))
    out, lse = (x.reshape(b, -1, h, *x.shape[6:])[:, : q.shape[1]] for x in parts)
    return (out.astype(v.dtype), lse) if return_lse else out.astype(v.dtype)


def _multiply(q: Float[Array, "b g r t d"], k: Float[Array, "b g s d"]) -> Float[Array, "b g r t s"]:
    return jnp.einsum("bgrtd,bgsd->bgrts", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))


def _multiply_by_head(q: Float[Array, "b g r 1 d"], k: Float[Array, "b g s d"]) -> Float[Array, "b g r 1 s"]:
    """Multiplies matrices by vectors, for which XLA's CPU compiler does not transpose the keys."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    heads = [
        jnp.einsum("bgsd,bgd->bgs", k, q[:, :, head, 0], preferred_element_type=dtype) for head in range(q.shape[2])
    ]
    return jnp.stack(heads, axis=2)[..., None, :]


def _fix_layouts(*arrays: Shaped[Array, ...]) -> tuple[Shaped[Array, ...], ...]:
    """Keeps arrays row-major. Otherwise XLA's CPU compiler transposes the cache of a single row in every step."""
    return tuple(with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in arrays)


def _split(x: Shaped[Array, ...], axis: int, size: int = QUERIES) -> Shaped[Array, "blocks ..."]:
    """Cuts an axis into blocks of queries, padded with zeros."""
    x = pad_to_multiple(x, size, axis)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)
