"""Keys that are selected by the data: each query looks at those that score best."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.chunks import fill_chunks
from sparsejax.ops.segment import attend_edges
from sparsejax.patterns import Pattern

CHUNK = 64  # queries whose scores over all keys are in memory at a time


def index_scores(
    q: Float[Array, "b t h d"], weights: Float[Array, "b t h"], k: Float[Array, "b s d"]
) -> Float[Array, "b t s"]:
    """How much queries want keys: sum over heads of weight · relu(q · k / √d) (DeepSeek-V3.2-Exp), in float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    products = jnp.einsum("bthd,bsd->bths", q.astype(wide), k.astype(wide)) * q.shape[-1] ** -0.5
    return jnp.einsum("bths,bth->bts", jax.nn.relu(products), weights.astype(wide))


def top_keys(scores: Float[Array, "*b s"], allowed: Bool[Array, "*#b s"], top_k: int) -> Int[Array, "*b k"]:
    """The positions of the greatest scores, greatest first; of equal scores the lower position wins.

    There are min(top_k, s) of them; -1 stands for a key where fewer are allowed.
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 would sort behind 0.0
    best, keys = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), min(top_k, scores.shape[-1]))
    return jnp.where(best > -jnp.inf, keys, -1)


def select_keys(
    q: Float[Array, "b t h d"],
    weights: Float[Array, "b t h"],
    k: Float[Array, "b t d"],
    top_k: int,
    pattern: Pattern,
    segments: tuple[Int[Array, "b t"], Int[Array, "b t"]] | None = None,
) -> Int[Array, "b t k"]:
    """For each query the `top_keys` by `index_scores`, of those that a pattern without heads allows.

    Time grows with t², memory with t. No gradient flows through a choice.

    Args:
      q: index queries.
      weights: of each head, for each query.
      k: index keys.
      top_k: keys for each query.
      pattern: which keys a query may look at.
      segments: ids of queries and of keys; a query looks only at keys with its id.
    """
    q, weights, k = jax.lax.stop_gradient((q, weights, k))
    (b, t), places = q.shape[:2], jnp.arange(q.shape[1])
    own, others = jnp.zeros((2, b, t), jnp.int32) if segments is None else segments

    def select(chunk: tuple[Array, ...]) -> Array:
        at, q, weights, own = chunk
        allowed = pattern.allows(at[:, None], places, t, t) & (own[:, :, None] == others[:, None])
        return top_keys(index_scores(q, weights, k), allowed, top_k)

    def split(x: Array, axis: int) -> Array:
        x = fill_chunks(x, CHUNK, axis)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, CHUNK, *x.shape[axis + 1 :]), axis, 0)

    chunks = split(places, 0), split(q, 1), split(weights, 1), split(own, 1)
    keys = jnp.moveaxis(jax.lax.map(select, chunks), 0, 1)
    return keys.reshape(b, -1, keys.shape[-1])[:, :t]


def attend_selected(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    keys: Int[Array, "b t k"],
    scale: float | None = None,
) -> Float[Array, "b t h e"]:
    """Softmax attention of each query over the keys at these positions; -1 stands for none. See `attend_edges`."""
    queries = jnp.repeat(jnp.arange(q.shape[1]), keys.shape[-1])

    def attend_row(q: Array, k: Array, v: Array, keys: Array) -> Array:
        return attend_edges(q[None], k[None], v[None], queries, keys.reshape(-1), scale=scale)[0]

    return jax.vmap(attend_row)(q, k, v, keys)
