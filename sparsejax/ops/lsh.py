"""Attention among tokens with equal hashes (Reformer, arXiv:2001.04451).

Queries serve as keys. In each of several rounds, tokens are sorted by bucket and cut into chunks. A chunk attends to
itself and to neighbouring chunks, and the softmaxes of the rounds are merged by their normalisers. The chunks of all
rounds form a ring: the first chunk of a round follows the last chunk of the previous round, as in the released code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.ops.blocks import document_starts, make_blocks
from sparsejax.ops.chunks import pad_to_multiple
from sparsejax.ops.rows import move_rows
from sparsejax.ops.selection import Selection, Visible, choose, over_queries
from sparsejax.ops.selectors import last_members
from sparsejax.patterns import Causal

# Scores of masked keys, and of a token with itself, to which it attends only if there is no other key.
MASKED, SELF = -1e9, -1e5
EPS = 1e-6
QUERIES = 64  # queries of `decode_attend_hashed` whose keys are in memory at a time
PADDING = jnp.iinfo(jnp.int32).max  # the segment of padding: sorts after all others


def hashed_pairs(length: int, rounds: int, chunk: int, before: int = 1, after: int = 0) -> int:
    """Number of (query, key) pairs that `attend_hashed` scores per head, masked ones included."""
    return rounds * -(-length // chunk) * chunk * (before + 1 + after) * chunk


def hash_buckets(
    x: Float[Array, "b t h d"], rotations: Float[Array, "h d r n"], buckets: tuple[int, ...]
) -> Int[Array, "b h r t"]:
    """Bucket per token, head and round: argmax of [x R, -x R] (arXiv:1509.02897).

    Args:
      x: Queries.
      rotations: Random matrix R per head and round; n is half the sum of `buckets`.
      buckets: The number of buckets, or factors of it that are hashed separately, least significant first.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rotated = jnp.einsum("bthd,hdrn->bhrtn", jax.lax.stop_gradient(x).astype(dtype), rotations.astype(dtype))
    bucket, start, factor = jnp.zeros((), jnp.int32), 0, 1
    for count in buckets:
        part = rotated[..., start : start + count // 2]
        bucket = bucket + factor * jnp.argmax(jnp.concatenate([part, -part], axis=-1), axis=-1)
        start, factor = start + count // 2, factor * count
    return bucket.astype(jnp.int32)


def attend_hashed(
    qk: Float[Array, "b t h d"],
    v: Float[Array, "b t h value"],
    buckets: Int[Array, "b h r t"],
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
    causal: bool = True,
    segments: Int[Array, "b t"] | None = None,
    mask: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b t h value"]:
    """Softmax attention of each token over its chunk and neighbouring chunks, in each round.

    Keys are queries of length 1 (mean square 1, divided by √d). A causal mask hides later keys, but a later token can
    still move the borders of chunks, and so change which earlier keys a token attends to.

    Args:
      qk: Queries, which serve as keys.
      v: Values.
      buckets: The result of `hash_buckets`.
      chunk: Tokens per chunk.
      before: Preceding chunks to attend to.
      after: Following chunks to attend to.
      causal: Whether later positions are masked.
      segments: Segment ids; a token is sorted among and attends to tokens of its segment.
      mask: False for tokens that are not keys; they are sorted last.
    """
    (b, t, h, _), rounds, padded = qk.shape, buckets.shape[2], -(-qk.shape[1] // chunk) * chunk
    dtype = jnp.promote_types(qk.dtype, jnp.float32)

    if mask is not None:  # a masked value that is not finite would enter products with a probability of 0
        qk, v = (jnp.where(mask[..., None, None] | jnp.isfinite(x), x, 0) for x in (qk, v))

    def pad(x: Shaped[Array, "b t *rest"]) -> Shaped[Array, "b padded *rest"]:
        return jnp.pad(x, ((0, 0), (0, padded - t)) + ((0, 0),) * (x.ndim - 2))

    is_key = pad(jnp.ones((b, t), bool) if mask is None else mask)
    ids = pad(jnp.zeros((b, t), jnp.int32) if segments is None else segments.astype(jnp.int32))
    ids = jnp.where(is_key, ids, PADDING)
    buckets = jnp.pad(buckets, ((0, 0),) * 3 + ((0, padded - t),))
    order = _sort(jnp.broadcast_to(ids[:, None, None], buckets.shape), buckets)
    ranks = jnp.argsort(order, axis=-1) + padded * jnp.arange(rounds)[:, None]
    source, copies = order.reshape(b, h, -1), ranks.swapaxes(2, 3)  # token per sorted row; sorted rows per token

    def sort(x: Float[Array, "b t h width"]) -> Float[Array, "b h chunks c width"]:
        rows = jax.vmap(jax.vmap(move_rows))(pad(x).astype(dtype).swapaxes(1, 2), source, copies)
        return rows.reshape(b, h, -1, chunk, x.shape[-1])

    def with_neighbours(x: Shaped[Array, "b h chunks c *rest"]) -> Shaped[Array, "b h chunks k *rest"]:
        return jnp.concatenate([jnp.roll(x, -i, axis=2) for i in range(-before, after + 1)], axis=3)

    q, positions = sort(qk), source.reshape(b, h, -1, chunk)
    q_ids = jnp.take_along_axis(ids[:, None], source, axis=-1).reshape(b, h, -1, chunk)
    k_positions, k_ids = with_neighbours(positions)[..., None, :], with_neighbours(q_ids)[..., None, :]
    allowed = (k_ids == q_ids[..., None]) & (k_ids != PADDING)
    allowed = allowed & (k_positions <= positions[..., None]) if causal else allowed
    scores = jnp.einsum("bhnqd,bhnkd->bhnqk", q, with_neighbours(normalize_keys(q)))
    scores = jnp.where(k_positions == positions[..., None], SELF, jnp.where(allowed, scores, MASKED))
    m = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    p = jnp.exp(scores - m)
    sums = jnp.concatenate([p @ with_neighbours(sort(v)), p.sum(axis=-1, keepdims=True)], axis=-1)
    sums = sums.reshape(b, h, rounds * padded, -1)

    back = copies.reshape(b, h, -1)
    origin = (order * rounds + jnp.arange(rounds)[:, None]).reshape(b, h, -1, 1)
    sums = jax.vmap(jax.vmap(move_rows))(sums, back, origin).reshape(b, h, padded, rounds, -1)
    m = jnp.take_along_axis(m.reshape(b, h, -1), back, axis=-1).reshape(b, h, padded, rounds)
    # The sums of each round are relative to its maximum.
    total = (jnp.exp(m - m.max(axis=-1, keepdims=True))[..., None] * sums).sum(axis=3)
    return (total[..., :-1] / total[..., -1:]).swapaxes(1, 2)[:, :t].astype(v.dtype)


def count_hashed(
    queries: Int[Array, " c"],
    buckets: Int[Array, "h r t"],
    segments: Int[Array, " t"],
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
) -> Int[Array, "h c t"]:
    """Returns in how many rounds a query of `attend_hashed` meets each key, causality and segments apart.

    Args:
      queries: Positions of the queries.
      buckets: The result of `hash_buckets` for one sequence.
      segments: Segment ids of the tokens; those below 0 are sorted last, as padding is.
      chunk: As in `attend_hashed`, as are the next two.
      before: Preceding chunks.
      after: Following chunks.
    """
    (h, rounds, t), chunks = buckets.shape, -(-buckets.shape[2] // chunk)
    gap = chunks * chunk - t
    ids = jnp.pad(jnp.where(segments < 0, PADDING, segments), (0, gap), constant_values=PADDING)
    buckets = jnp.pad(buckets, ((0, 0), (0, 0), (0, gap)))[None]
    ranks = jnp.argsort(_sort(jnp.broadcast_to(ids, buckets.shape), buckets), axis=-1)[0, ..., :t]
    ring = ranks // chunk + chunks * jnp.arange(rounds)[:, None]  # chunks of all rounds
    counts = jnp.zeros((h, len(queries), t), jnp.int32)
    for offset in range(-before, after + 1):
        near = (ring[..., queries] + offset) % (chunks * rounds)
        for query_round in range(rounds):
            for key_round in range(rounds):
                counts += near[:, query_round, :, None] == ring[:, key_round, None]
    return counts


def decode_attend_hashed(
    qk: Float[Array, "b s h d"],
    v: Float[Array, "b s h value"],
    buckets: Int[Array, "b h r s"],
    positions: Int[Array, "b t"],
    ends: Int[Array, " b"],
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
) -> Float[Array, "b t h value"]:
    """Rows `positions` of causal `attend_hashed` over the tokens before position `ends` of each sequence.

    The slots from `ends` on are ignored. All positions are sorted once.
    """
    (b, s, h, _), rounds, end = qk.shape, buckets.shape[2], ends[:, None, None, None]
    dtype, chunks = jnp.promote_types(qk.dtype, jnp.float32), -(-end // chunk)
    order = _sort(jnp.broadcast_to(jnp.where(jnp.arange(s) >= end, PADDING, 0), buckets.shape), buckets)
    ranks = jnp.argsort(order, axis=-1)
    sorted_keys, keys, values = order.reshape(b, h, -1), *(x.astype(dtype).swapaxes(1, 2) for x in (qk, v))

    def attend_block(positions: Int[Array, "b n"]) -> Float[Array, "b h n value"]:
        n = positions.shape[1]
        rank = jnp.take_along_axis(ranks, positions[:, None, None], axis=-1)
        ring = (rank // chunk + chunks * jnp.arange(rounds)[:, None])[..., None]  # chunks of all rounds
        near = (ring + jnp.arange(-before, after + 1)) % (chunks * rounds)[..., None]
        inside = (near % chunks[..., None])[..., None] * chunk + jnp.arange(chunk)
        index = (near // chunks[..., None])[..., None] * s + jnp.minimum(inside, s - 1)
        by_query = [jnp.moveaxis(x, 2, 3).reshape(b, h, n, -1) for x in (index, inside)]
        k_positions = jnp.take_along_axis(sorted_keys, by_query[0].reshape(b, h, -1), axis=-1)

        def take(x: Float[Array, "b h s width"]) -> Float[Array, "b h n k width"]:
            return jnp.take_along_axis(x, k_positions[..., None], axis=2).reshape(b, h, n, -1, x.shape[-1])

        q_positions, k_at = positions[:, None, :, None], k_positions.reshape(b, h, n, -1)
        allowed = (by_query[1] < end) & (k_at <= q_positions)
        q = jnp.take_along_axis(keys, positions[:, None, :, None], axis=2)
        scores = jnp.einsum("bhnd,bhnkd->bhnk", q, normalize_keys(take(keys)))
        scores = jnp.where(allowed, jnp.where(k_at == q_positions, SELF, scores), MASKED)
        picked = jnp.where(allowed[..., None], take(values), 0)
        return jnp.einsum("bhnk,bhnke->bhne", jax.nn.softmax(scores, axis=-1), picked)

    size = min(QUERIES, positions.shape[1])
    blocks = pad_to_multiple(positions, size, 1).reshape(b, -1, size)
    out = jnp.moveaxis(jax.lax.map(attend_block, jnp.moveaxis(blocks, 1, 0)), 0, 2).reshape(b, h, -1, v.shape[-1])
    return out.swapaxes(1, 2)[:, : positions.shape[1]].astype(v.dtype)


def select_hashed(
    buckets: Int[Array, "b h r t"],
    members: int,
    *,
    segments: tuple[Int[Array, "b t"], Int[Array, "b t"]] | None = None,
) -> Selection:
    """The strictly causal form: the last `members` tokens of the bucket of a query in each round.

    A token that is alone in its buckets attends to itself, and others do not, as in `attend_hashed`. No later token
    changes a choice.

    Args:
      buckets: The result of `hash_buckets`.
      members: Tokens per round, the query included.
      segments: Segment ids of queries and of keys; tokens whose ids differ are padding.
    """
    b, h, rounds, t = buckets.shape
    labels = buckets
    if segments is not None:
        starts, count = document_starts(segments[1]), buckets.max() + 1
        exists = (segments[0] == segments[1])[:, None, None]
        labels = jnp.where(exists, labels + (starts * count)[:, None, None], -1 - jnp.arange(t))
    keys = last_members(labels.reshape(b, h * rounds, t), members).reshape(b, h, rounds, t, -1)
    return Selection(_unite_rounds(keys, jnp.broadcast_to(jnp.arange(t), (b, t))), make_blocks(t, 1))


def decode_select_hashed(
    queries: Int[Array, "b h r c"],
    buckets: Int[Array, "b h r s"],
    members: int,
    positions: tuple[Int[Array, "b c"], Int[Array, "b s"]],
    length: int,
) -> Selection:
    """As `select_hashed`, for queries whose keys are in a cache.

    Args:
      queries: Buckets of the queries.
      buckets: Buckets of the keys.
      members: Tokens per round, the query included.
      positions: Positions of the queries and of the keys, -1 in an empty slot.
      length: Length of the sequence.
    """

    def choose_chunk(buckets: Array, chunk: Array, visible: Visible) -> Int[Array, "b h c k"]:
        same = jnp.moveaxis(chunk, 1, 3)[..., None] == jnp.moveaxis(buckets, 1, 3)[..., None, :]
        visible_keys = same & visible.keys[:, None, None]
        latest = jnp.broadcast_to(positions[1][:, None, None, None].astype(jnp.float32), visible_keys.shape)
        keys = choose(latest, visible_keys, members)
        return _unite_rounds(keys, visible.positions)

    options, blocks = {"positions": positions, "length": length}, make_blocks(buckets.shape[-1], 1)
    queries, buckets = (jnp.moveaxis(x, 3, 1) for x in (queries, buckets))
    groups = over_queries(choose_chunk, queries, buckets, Causal(), blocks, **options)
    return Selection(jnp.moveaxis(groups, 1, 2), blocks)


def _unite_rounds(keys: Int[Array, "b h r t w"], positions: Int[Array, "#b t"]) -> Int[Array, "b h t k"]:
    """The keys of all rounds, each once; without the query, unless it is alone."""
    united = jnp.moveaxis(keys, 2, 3).reshape(*keys.shape[:2], keys.shape[3], -1)
    queries, none = positions[:, None, :, None], jnp.iinfo(jnp.int32).max
    is_other = (united >= 0) & (united != queries)
    united = jnp.where(is_other | ((united == queries) & ~is_other.any(axis=-1, keepdims=True)), united, none)
    united = jnp.sort(united, axis=-1)
    repeats = jnp.pad(united[..., 1:] == united[..., :-1], ((0, 0),) * 3 + ((1, 0),))
    united = jnp.sort(jnp.where(repeats, none, united), axis=-1)
    return jnp.where(united == none, -1, united)


def _sort(segments: Int[Array, "b h r t"], buckets: Int[Array, "b h r t"]) -> Int[Array, "b h r t"]:
    """Positions by segment, then by bucket, then in order."""
    positions = jnp.broadcast_to(jnp.arange(buckets.shape[-1], dtype=jnp.int32), buckets.shape)
    return jax.lax.sort((segments, buckets, positions), dimension=-1, num_keys=2, is_stable=True)[-1]


def normalize_keys(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Returns the keys of queries: of mean square 1, divided by the root of their width."""
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * x.shape[-1] ** -0.5
