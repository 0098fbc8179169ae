"""Keys selected by the data: each query attends to those with the highest scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.ops.chunks import pad_to_multiple
from sparsejax.ops.segment import attend_edges
from sparsejax.patterns import Pattern

CHUNK = 64  # queries whose scores over all keys are in memory at a time


def index_scores(
    q: Float[Array, "b t h d"], weights: Float[Array, "b t h"], k: Float[Array, "b s d"]
) -> Float[Array, "b t s"]:
    """Sum over heads of weight * relu(q·k / √d), in float32: the lightning indexer of DeepSeek-V3.2-Exp."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    products = jnp.einsum("bthd,bsd->bths", q.astype(dtype), k.astype(dtype)) * q.shape[-1] ** -0.5
    return jnp.einsum("bths,bth->bts", jax.nn.relu(products), weights.astype(dtype))


def top_keys(scores: Float[Array, "*batch s"], allowed: Bool[Array, "*#batch s"], top_k: int) -> Int[Array, "*batch k"]:
    """Positions of the min(top_k, s) highest scores, in descending order; ties go to the lower position.

    Positions are -1 where fewer keys are allowed.
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 would sort after 0.0
    top, keys = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), min(top_k, scores.shape[-1]))
    return jnp.where(top > -jnp.inf, keys, -1)


def select_keys(
    q: Float[Array, "b t h d"],
    weights: Float[Array, "b t h"],
    k: Float[Array, "b s d"],
    top_k: int,
    pattern: Pattern,
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    positions: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    length: int | None = None,
) -> Int[Array, "b t k"]:
    """The `top_keys` of each query by `index_scores`, among those that the pattern allows.

    Time grows with t · s, memory with t + s. No gradient flows through the selection.

    Args:
      q: Index queries.
      weights: Weight per query and head.
      k: Index keys.
      top_k: Keys per query.
      pattern: The allowed keys; a pattern without heads.
      segments: Segment ids of queries and of keys; a query selects keys of its segment.
      positions: Positions of queries and of keys, -1 for a key that does not exist. Defaults to 0, 1, ... for both.
      length: Length of the sequence that the pattern describes; defaults to t.
    """
    q, weights, k = jax.lax.stop_gradient((q, weights, k))
    (b, t), s = q.shape[:2], k.shape[1]
    length, chunk = t if length is None else length, min(t, CHUNK)
    q_at, k_at = (jnp.arange(t)[None], jnp.arange(s)[None]) if positions is None else positions
    q_ids, k_ids = (jnp.zeros((1, n), jnp.int32) for n in (t, s)) if segments is None else segments

    def select(chunk: tuple[Array, ...]) -> Int[Array, "b c k"]:
        q_at, q, weights, q_ids = chunk
        allowed = pattern.allows(q_at[..., None], k_at[:, None], length, length) & (k_at >= 0)[:, None]
        return top_keys(index_scores(q, weights, k), allowed & (q_ids[..., None] == k_ids[:, None]), top_k)

    def split(x: Shaped[Array, "b t ..."]) -> Shaped[Array, "chunks b c ..."]:
        x = pad_to_multiple(x, chunk, 1)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    chunks = split(q_at), split(q), split(weights), split(q_ids)
    keys = jnp.moveaxis(jax.lax.map(select, chunks), 0, 1)
    return keys.reshape(b, -1, keys.shape[-1])[:, :t]


def attend_selected(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g value"],
    keys: Int[Array, "b t k"],
    scale: float | None = None,
) -> Float[Array, "b t h value"]:
    """Softmax attention of each query over the keys at these positions, -1 for none; see `attend_edges`."""
    queries = jnp.repeat(jnp.arange(q.shape[1]), keys.shape[-1])

    def attend_sequence(q: Array, k: Array, v: Array, keys: Array) -> Array:
        return attend_edges(q[None], k[None], v[None], queries, keys.reshape(-1), scale=scale)[0]

    return jax.vmap(attend_sequence)(q, k, v, keys)
