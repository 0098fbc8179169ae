"""Attention among tokens that hash alike (Reformer, Kitaev et al. 2020, arXiv:2001.04451).

Queries are keys too. In each of several rounds the tokens are sorted by bucket and cut into chunks; a chunk looks at
itself and at its neighbours, and the rounds are weighed by what their softmaxes sum to. The rounds follow one another
in a circle: the first chunk of a round has the last of the round before as its neighbour, as in the released code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.rows import move_rows

# Scores of masked keys, and of a token with itself: it looks at itself only if there is no other key.
MASKED, SELF = -1e9, -1e5
EPS = 1e-6
LAST = jnp.iinfo(jnp.int32).max  # sorts padding behind everything


def hash_buckets(
    x: Float[Array, "b t h d"], rotations: Float[Array, "h d r n"], buckets: tuple[int, ...]
) -> Int[Array, "b h r t"]:
    """The bucket of each token, head and round: argmax of [x R, -x R] (arXiv:1509.02897).

    Args:
      x: queries.
      rotations: a random matrix for each head and round; n is half the sum of `buckets`.
      buckets: how many there are, or factors of it: each is hashed alone, the first counts least.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rotated = jnp.einsum("bthd,hdrn->bhrtn", jax.lax.stop_gradient(x).astype(wide), rotations.astype(wide))
    number, start, factor = 0, 0, 1
    for count in buckets:
        part = rotated[..., start : start + count // 2]
        number = number + factor * jnp.argmax(jnp.concatenate([part, -part], axis=-1), axis=-1)
        start, factor = start + count // 2, factor * count
    return number.astype(jnp.int32)


def attend_hashed(
    qk: Float[Array, "b t h d"],
    v: Float[Array, "b t h e"],
    buckets: Int[Array, "b h r t"],
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
    causal: bool = True,
    segments: Int[Array, "b t"] | None = None,
    mask: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b t h e"]:
    """Softmax attention of each token over the chunks of its buckets.

    Keys are queries of length 1 (their mean square is 1, over √d). A causal mask hides later keys, but a later token
    can still move the borders of chunks, and so change which earlier keys are seen.

    Args:
      qk: queries, which are keys too.
      v: values.
      buckets: of `hash_buckets`.
      chunk: tokens of a chunk.
      before: chunks before its own that a token looks at.
      after: chunks after it.
      causal: look at no later position.
      segments: documents; a token looks at its own alone, and is sorted among its own.
      mask: False for tokens that are no keys; they are sorted behind the others.
    """
    (b, t, h, _), rounds, tokens = qk.shape, buckets.shape[2], -(-qk.shape[1] // chunk) * chunk
    wide = jnp.promote_types(qk.dtype, jnp.float32)

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, tokens - t)) + ((0, 0),) * (x.ndim - 2))

    real = pad(jnp.ones((b, t), bool) if mask is None else mask)
    ids = pad(jnp.zeros((b, t), jnp.int32) if segments is None else segments.astype(jnp.int32))
    ids = jnp.where(real, ids, LAST)
    buckets = jnp.pad(buckets, ((0, 0),) * 3 + ((0, tokens - t),))
    order = _sort(jnp.broadcast_to(ids[:, None, None], buckets.shape), buckets)
    ranks = jnp.argsort(order, axis=-1) + tokens * jnp.arange(rounds)[:, None]
    source, copies = order.reshape(b, h, -1), ranks.swapaxes(2, 3)  # of the rows of all rounds; of each token

    def sort(x: Array) -> Array:
        rows = jax.vmap(jax.vmap(move_rows))(pad(x).astype(wide).swapaxes(1, 2), source, copies)
        return rows.reshape(b, h, -1, chunk, x.shape[-1])

    def look(x: Array) -> Array:
        return jnp.concatenate([jnp.roll(x, -i, axis=2) for i in range(-before, after + 1)], axis=3)

    def shown(x: Array) -> Array:
        return jnp.take_along_axis(x[:, None], source, axis=-1).reshape(b, h, -1, chunk)

    queries, at, own = sort(qk), source.reshape(b, h, -1, chunk), shown(ids)
    keys_at, keys_own = look(at)[..., None, :], look(own)[..., None, :]
    allowed = (keys_own == own[..., None]) & (keys_own != LAST)
    allowed = allowed & (keys_at <= at[..., None]) if causal else allowed
    scores = jnp.einsum("bhnqd,bhnkd->bhnqk", queries, look(_normalize(queries)))
    scores = jnp.where(keys_at == at[..., None], SELF, jnp.where(allowed, scores, MASKED))
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    sums = jnp.concatenate([weights @ look(sort(v)), weights.sum(axis=-1, keepdims=True)], axis=-1)
    sums = sums.reshape(b, h, rounds * tokens, -1)

    back = copies.reshape(b, h, -1)
    origin = (order * rounds + jnp.arange(rounds)[:, None]).reshape(b, h, -1, 1)
    sums = jax.vmap(jax.vmap(move_rows))(sums, back, origin).reshape(b, h, tokens, rounds, -1)
    top = jnp.take_along_axis(top.reshape(b, h, -1), back, axis=-1).reshape(b, h, tokens, rounds)
    # Each round's sums are relative to its own greatest score.
    total = (jnp.exp(top - top.max(axis=-1, keepdims=True))[..., None] * sums).sum(axis=3)
    return (total[..., :-1] / total[..., -1:]).swapaxes(1, 2)[:, :t].astype(v.dtype)


def decode_attend_hashed(
    qk: Float[Array, "b s h d"],
    v: Float[Array, "b s h e"],
    buckets: Int[Array, "b h r s"],
    position: Int[Array, ""],
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
) -> Float[Array, "b h e"]:
    """What `attend_hashed` gives the token at `position` if it is the last one; positions after it hold nothing yet."""
    (b, s, h, _), rounds = qk.shape, buckets.shape[2]
    wide, chunks = jnp.promote_types(qk.dtype, jnp.float32), position // chunk + 1
    order = _sort(jnp.broadcast_to(jnp.where(jnp.arange(s) > position, LAST, 0), buckets.shape), buckets)
    rank = jnp.argmax(order == position, axis=-1)
    own = rank // chunk + chunks * jnp.arange(rounds)  # number of its chunk in each round, all rounds counted
    near = (own[..., None] + jnp.arange(-before, after + 1)) % (chunks * rounds)
    ranks = (near % chunks)[..., None] * chunk + jnp.arange(chunk)
    there = (near // chunks)[..., None] * s + jnp.minimum(ranks, s - 1)
    at = jnp.take_along_axis(order.reshape(b, h, -1), there.reshape(b, h, -1), axis=-1)
    allowed = (ranks <= position).reshape(b, h, -1)

    def pick(x: Array) -> Array:
        return jnp.take_along_axis(x.astype(wide).swapaxes(1, 2), at[..., None], axis=2)

    q = jax.lax.dynamic_index_in_dim(qk, position, axis=1, keepdims=False).astype(wide)
    scores = jnp.einsum("bhd,bhkd->bhk", q, _normalize(pick(qk)))
    scores = jnp.where(allowed, jnp.where(at == position, SELF, scores), MASKED)
    return jnp.einsum("bhk,bhke->bhe", jax.nn.softmax(scores, axis=-1), pick(v)).astype(v.dtype)


def _sort(groups: Int[Array, "b h r t"], buckets: Int[Array, "b h r t"]) -> Int[Array, "b h r t"]:
    """Positions by group, then by bucket, then in order."""
    positions = jnp.broadcast_to(jnp.arange(buckets.shape[-1], dtype=jnp.int32), buckets.shape)
    return jax.lax.sort((groups, buckets, positions), dimension=-1, num_keys=2, is_stable=True)[-1]


def _normalize(x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * x.shape[-1] ** -0.5
