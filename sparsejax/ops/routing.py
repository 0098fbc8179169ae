"""Routing attention: tokens attend within clusters of k-means (Routing Transformer, arXiv:2003.05997)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.blocks import put
from sparsejax.ops.selection import find_largest
from sparsejax.ops.selectors import nearest_centroid
from sparsejax.ops.softmax import masked_softmax


def normalize_vectors(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Divides vectors by their length, in float32; a zero vector stays."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = (x * x).sum(axis=-1, keepdims=True)
    return x * jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def sum_clusters(
    x: Float[Array, "b t g d"], centroids: Float[Array, "g c d"], mask: Bool[Array, "b t"] | None = None
) -> Float[Array, "g c d"]:
    """Sums of the normalized vectors of each cluster, which `update_centroids` reads.

    Args:
      x: Vectors.
      centroids: Vectors of unit length per key/value head.
      mask: False for tokens that are not counted.
    """
    members = jax.nn.one_hot(nearest_centroid(x, centroids), centroids.shape[1], dtype=jnp.float32)
    members = members if mask is None else members * mask[:, None, :, None]
    return jnp.einsum("bgtc,btgd->gcd", members, normalize_vectors(x), precision=jax.lax.Precision.HIGHEST)


def update_centroids(
    centroids: Float[Array, "*r g c d"], sums: Float[Array, "*r g c d"], rate: float
) -> Float[Array, "*r g c d"]:
    """Moves centroids toward the mean direction of their members (arXiv:2003.05997, section 4.1); unit length stays.

    A cluster without members keeps its centroid.

    Args:
      centroids: The centroids.
      sums: Sums of the members, see `sum_clusters`.
      rate: Share of the mean of the step; 1 minus the decay of the paper.
    """
    moved = normalize_vectors((1 - rate) * centroids + rate * normalize_vectors(sums))
    return jnp.where((sums != 0).any(axis=-1, keepdims=True), moved, centroids).astype(centroids.dtype)


def commitment(x: Float[Array, "b t g d"], centroids: Float[Array, "g c d"]) -> Float[Array, "b t"]:
    """Squared distance of each normalized vector from its centroid, a constant: the mean over heads and features."""
    clusters = nearest_centroid(x, centroids)
    nearest = jax.vmap(lambda centroids, clusters: centroids[clusters], (0, 1), 2)(centroids, clusters)
    return ((normalize_vectors(x) - jax.lax.stop_gradient(nearest)) ** 2).mean(axis=(2, 3))


def attend_balanced(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t g d"],
    v: Float[Array, "b t g value"],
    x: Float[Array, "b t g d"],
    centroids: Float[Array, "g c d"],
    members: int,
    *,
    causal: bool,
    scale: float,
    includes_self: bool = True,
    segments: tuple[Int[Array, "b t"], Int[Array, "b t"]] | None = None,
) -> Float[Array, "b t h value"]:
    """Attention within balanced clusters: each has the `members` tokens nearest to its centroid in the row.

    A token may be in several clusters, whose outputs are averaged, or in none, where the output is 0. Which tokens a
    cluster has depends on the whole row: the form of the paper is not causal, whatever is masked.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      x: Vectors to route.
      centroids: Vectors of unit length per key/value head.
      members: Tokens per cluster.
      causal: Whether a query attends to no later member of its cluster.
      scale: Factor on q·k.
      includes_self: Whether a query attends to itself; else only in a cluster in which it attends to no other token.
      segments: Segment ids of queries and of keys; tokens whose ids differ are padding, and in no cluster.
    """
    (b, t, h, _), g = q.shape, k.shape[2]
    q_ids, k_ids = (jnp.zeros((b, t), jnp.int32),) * 2 if segments is None else segments
    positions, in_cluster = _fill_clusters(x, centroids, members, q_ids == k_ids)

    def take(x: Array, positions: Array) -> Array:  # [t, ...] by [c, w]
        return x[positions]

    by_head = jax.vmap(jax.vmap(take), in_axes=(0, 0))
    queries = by_head(jnp.moveaxis(q.reshape(b, t, g, h // g, -1), 2, 1), positions)
    keys, values = (by_head(jnp.moveaxis(array, 2, 1), positions) for array in (k, v))
    ids = jnp.take_along_axis(q_ids[:, None, None], positions, axis=-1)
    allowed = in_cluster[..., None, :] & (ids[..., :, None] == ids[..., None, :])
    allowed &= (positions[..., :, None] >= positions[..., None, :]) if causal else True
    allowed = allowed if includes_self else prefer_others(allowed, positions[..., :, None] == positions[..., None, :])
    logits = scale * jnp.einsum("bgcwrd,bgcsd->bgcrws", queries, keys).astype(jnp.float32)
    p, _ = masked_softmax(logits, allowed[:, :, :, None], None)
    out = jnp.einsum("bgcrws,bgcse->bgcwre", p.astype(v.dtype), values)
    out = jnp.where(in_cluster[..., None, None], out, 0)

    def spread(out: Array, positions: Array, inside: Array) -> Array:  # [c, w, r, e] to [t, r, e]
        total = jnp.zeros((t, *out.shape[2:]), out.dtype).at[positions.ravel()].add(out.reshape(-1, *out.shape[2:]))
        count = jnp.zeros(t).at[positions.ravel()].add(inside.ravel())
        return total / jnp.maximum(count, 1)[:, None, None].astype(out.dtype)

    spread_heads = jax.vmap(jax.vmap(spread))(out, positions, in_cluster)  # [b, g, t, r, e]
    return jnp.moveaxis(spread_heads, 1, 2).reshape(b, t, h, -1).astype(v.dtype)


def balanced_members(
    x: Float[Array, "b t g d"],
    centroids: Float[Array, "g c d"],
    members: int,
    *,
    causal: bool,
    includes_self: bool = True,
    segments: tuple[Int[Array, "b t"], Int[Array, "b t"]] | None = None,
) -> Bool[Array, "b g t t"]:
    """Whether each query of `attend_balanced`, which describes the arguments, attends to each key in some cluster."""
    b, t = x.shape[:2]
    q_ids, k_ids = (jnp.zeros((b, t), jnp.int32),) * 2 if segments is None else segments
    positions, in_cluster = _fill_clusters(x, centroids, members, q_ids == k_ids)
    at = jnp.where(in_cluster, positions, t)
    inside = put(jnp.ones((1, 1)), at.reshape(-1, at.shape[-1]), t, 0).reshape(*at.shape[:-1], t)
    allowed = (q_ids[:, :, None] == k_ids[:, None])[:, None] & (jnp.tri(t, dtype=bool) if causal else True)

    def meet(inside: Float[Array, "b g t"]) -> Bool[Array, "b g t t"]:
        attends = allowed & (inside[..., :, None] > 0) & (inside[..., None, :] > 0)
        return attends if includes_self else prefer_others(attends, jnp.eye(t, dtype=bool))

    return jax.lax.map(meet, jnp.moveaxis(inside, 2, 0)).any(axis=0)


def prefer_others(allowed: Bool[Array, "*batch w s"], is_self: Bool[Array, "*#batch w s"]) -> Bool[Array, "*batch w s"]:
    """The allowed keys without the query itself, unless there is no other."""
    others = allowed & ~is_self
    return jnp.where(others.any(axis=-1, keepdims=True), others, allowed)


def _fill_clusters(
    x: Float[Array, "b t g d"], centroids: Float[Array, "g c d"], members: int, exists: Bool[Array, "b t"]
) -> tuple[Int[Array, "b g c w"], Bool[Array, "b g c w"]]:
    """Positions of the `members` tokens nearest to each centroid, and whether there are as many."""
    similarity = jnp.einsum("btgd,gcd->bgct", normalize_vectors(x), centroids, precision=jax.lax.Precision.HIGHEST)
    similarity = jnp.where(exists[:, None, None], jax.lax.stop_gradient(similarity), -jnp.inf)
    chosen, positions = find_largest(similarity, min(members, x.shape[1]))
    return positions, chosen > -jnp.inf
