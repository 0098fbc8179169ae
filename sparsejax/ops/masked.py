"""Attention to single keys that the data choose, as masked products of tiles.

The chosen keys of a tile of queries become a mask, and the tile attends to every tile of keys that holds one of them,
with an online softmax (FlashAttention-2, arXiv:2307.08691). A tile fits the cache, and the heads share the mask. Time
grows with the number of allowed pairs, but per pair it is a small fraction of that of a gathered key; memory grows with
the length. The arrays and the names are those of `sparsejax.ops.selected`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.ops.chunks import pad_to_multiple, vary_alike
from sparsejax.ops.selected import Plan, Sequence, differentiable
from sparsejax.ops.softmax import MASKED, log_multiplicity, log_sum, softcap, zero_nan

QUERIES, KEYS = 128, 256  # of a tile: the scores of 8 heads fill 1 MiB


class _Row(NamedTuple):
    """A tile of queries with the tiles of keys.

    Attributes:
      q: Queries.
      mask: Whether each query attends to each key.
      positions: Indices of the queries under the pattern.
    """

    q: Float[Array, "g r c d"]
    mask: Bool[Array, "tiles c size"]
    positions: Int[Array, " c"]


def _split(x: Shaped[Array, " n *rest"], size: int) -> Shaped[Array, "tiles size *rest"]:
    x = pad_to_multiple(x, size, 0)
    return x.reshape(-1, size, *x.shape[1:])


def _split_keys(plan: Plan, x: Float[Array, "s g d"]) -> Float[Array, "tiles size g d"]:
    """Tiles without a copy: a tile is transposed where it is multiplied."""
    return _split(x.astype(plan.dtype), KEYS)


def _tiles(x: Sequence) -> Int[Array, " rows"]:
    """The tiles of queries."""
    return jnp.arange(-(-len(x.q) // QUERIES))


def _rows(count: int, tile: Int[Array, ""]) -> Int[Array, " c"]:
    """The queries of a tile, from `count` on past the end."""
    return tile * QUERIES + jnp.arange(min(QUERIES, count))


def _take_queries(plan: Plan, tile: Int[Array, ""], x: Float[Array, "t g r *d"]) -> Float[Array, "g r c *d"]:
    """A tile of queries, arbitrary past the end."""
    return jnp.moveaxis(x.at[_rows(len(x), tile)].get(mode="clip").astype(plan.dtype), 0, 2)


def _join_queries(x: Float[Array, "rows c g r *d"], count: int) -> Float[Array, "count g r *d"]:
    return x.reshape(-1, *x.shape[2:])[:count]


def _make_row(plan: Plan, x: Sequence, tile: Int[Array, ""]) -> _Row:
    """A tile of queries with its mask."""
    t, n, keys = len(x.q), len(x.starts), jnp.arange(plan.s)
    rows = jnp.minimum(_rows(t, tile), t - 1)
    queries = rows + x.first
    groups = jnp.where(x.groups[rows] < 0, n, x.groups[rows])
    chosen = jnp.zeros((len(rows), n), bool).at[jnp.arange(len(rows))[:, None], groups].set(True, mode="drop")
    mask = chosen if plan.size == 1 else chosen[:, x.of_key]
    mask = mask & (_rows(t, tile) < t)[:, None] & plan.pattern.allows(queries[:, None], keys, plan.t, plan.s)
    if x.ids is not None:
        mask &= x.ids[0][rows][:, None] == x.ids[1]
    mask = pad_to_multiple(mask, KEYS, 1).reshape(len(rows), -1, KEYS)
    return _Row(_take_queries(plan, tile, x.q), jnp.swapaxes(mask, 0, 1), queries)


def _multiply(plan: Plan, row: _Row, k: Float[Array, "g size d"]) -> Float[Array, "g r c size"]:
    return jnp.einsum("grcd,gkd->grck", row.q, k) * plan.scale


def _add_biases(
    plan: Plan, x: Sequence, row: _Row, tile: Int[Array, ""], products: Float[Array, "g r c size"]
) -> Float[Array, "g r c size"]:
    """Adds the biases to products of queries and keys."""
    queries, keys = row.positions[:, None], tile * KEYS + jnp.arange(KEYS)
    if x.slopes is not None:
        products = products - x.slopes[..., None, None] * abs(queries + plan.q_offset - keys)
    return products + log_multiplicity(plan.pattern, queries, keys, plan.t, plan.s)


def _forward(plan: Plan, x: Sequence) -> tuple[Float[Array, "t g r value"], Float[Array, "t g r"]]:
    k, v = _split_keys(plan, x.k), _split_keys(plan, x.v)

    def attend_row(tile: Array) -> tuple[Array, Array]:
        row = _make_row(plan, x, tile)

        def attend(carry: tuple[Array, ...], inputs: tuple[Array, ...]) -> tuple[Array, ...]:
            (m, l, out), (tile, k, v, mask) = carry, inputs
            k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)
            products = softcap(_multiply(plan, row, k), plan.softcap)
            scores = jnp.where(mask, _add_biases(plan, x, row, tile, products), MASKED)
            new_m = jax.lax.stop_gradient(jnp.maximum(m, scores.max(axis=-1)))
            p = jnp.where(mask, jnp.exp(scores - new_m[..., None]), 0.0)
            kept = jnp.exp(m - new_m)
            out = out * kept[..., None] + jnp.einsum("grck,gke->grce", p, v)
            return new_m, l * kept + p.sum(axis=-1), out

        def visit(carry: tuple[Array, ...], inputs: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
            return jax.lax.cond(inputs[-1].any(), attend, lambda carry, _: carry, carry, inputs), None

        shape = row.q.shape[:-1]
        sink = jnp.full(shape, MASKED) if x.sink is None else jnp.broadcast_to(x.sink[..., None], shape)
        m = jax.lax.stop_gradient(sink).astype(plan.dtype)
        l = jnp.zeros_like(m) if x.sink is None else jnp.exp(sink - m)
        empty = m, l, jnp.zeros((*shape, v.shape[-1]), plan.dtype)
        (m, l, out), _ = jax.lax.scan(visit, vary_alike((empty, x))[0], (jnp.arange(len(k)), k, v, row.mask))
        out, lse = out / jnp.where(l == 0, 1.0, l)[..., None], log_sum(m, l)
        return jnp.moveaxis(out, 2, 0), jnp.moveaxis(lse, 2, 0)

    outs = jax.lax.map(attend_row, _tiles(x))
    return tuple(_join_queries(y, len(x.q)) for y in outs)  # type: ignore[return-value]


def _backward(plan: Plan, x: Sequence, lse: Array, delta: Array, d_out: Array) -> tuple[Array, Array, Array]:
    k, v = _split_keys(plan, x.k), _split_keys(plan, x.v)

    # XLA:CPU computes a transposed operand of a product anew. Queries are smaller than scores, so gradients of keys are
    # summed transposed.
    empty = tuple(jnp.zeros_like(jnp.moveaxis(y, 1, 3)) for y in (k, v))

    def differentiate_row(carry: tuple[Array, Array], tile: Array) -> tuple[tuple[Array, Array], Array]:
        row = _make_row(plan, x, tile)
        row = row._replace(q=zero_nan(row.q))
        row_lse, row_delta, do = (_take_queries(plan, tile, y) for y in (lse, delta, d_out))
        qt, dot = (jnp.moveaxis(y, 3, 1) for y in (row.q, do))

        def differentiate(tile: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array, Array]:
            k, v = zero_nan(jnp.swapaxes(k, 0, 1)), jnp.swapaxes(v, 0, 1)
            products, pull = jax.vjp(functools.partial(softcap, limit=plan.softcap), _multiply(plan, row, k))
            p = jnp.where(mask, jnp.exp(_add_biases(plan, x, row, tile, products) - row_lse[..., None]), 0.0)
            (ds,) = pull(p * (jnp.einsum("grce,gke->grck", do, v) - row_delta[..., None]))
            ds = ds * plan.scale
            dq = jnp.einsum("grck,gkd->grcd", ds, k)
            return dq, jnp.einsum("gdrc,grck->gdk", qt, ds), jnp.einsum("gerc,grck->gek", dot, p)

        def visit(grads: tuple[Array, ...], inputs: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
            (dq, dkt, dvt), tile, zeros = grads, inputs[0], (jnp.zeros_like(row.q), *(y[0] for y in empty))
            new = jax.lax.cond(inputs[-1].any(), differentiate, lambda *_: vary_alike((zeros, x))[0], *inputs)
            return (dq + new[0], dkt.at[tile].add(new[1]), dvt.at[tile].add(new[2])), None

        grads = vary_alike((jnp.zeros_like(row.q), x))[0], *carry
        (dq, *carry), _ = jax.lax.scan(visit, grads, (jnp.arange(len(k)), k, v, row.mask))
        return tuple(carry), jnp.moveaxis(dq, 2, 0)

    (dkt, dvt), dq = jax.lax.scan(differentiate_row, vary_alike((empty, x))[0], _tiles(x))
    return _join_queries(dq, len(x.q)), *(_join_queries(jnp.moveaxis(y, 3, 1), plan.s) for y in (dkt, dvt))


attend_masked = differentiable(
    lambda plan, x: jax.lax.map(lambda x: _forward(plan, x), x),
    lambda plan, *x: jax.lax.map(lambda x: _backward(plan, *x), x),
)
