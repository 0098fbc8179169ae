"""Indexers: learned scores of keys, which choose the keys of an attention, and the loss that trains them.

The lightning indexer of DeepSeek-V3.2-Exp scores keys for all heads (arXiv:2512.02556). MiniMax-M3 has an index head
per key/value head, and Qwen4 scores the mean key of a block.

The loss is the divergence of the scores from the attention that they serve (DeepSeek-V3.2-Exp, section 2.1). The
attention is the teacher and a constant: no gradient flows to its queries and keys. In the warm-up both distributions
are over all keys that a query may attend to. In the sparse stage both are over the chosen keys: the teacher is the
attention as it then runs, a softmax over the chosen keys per head. The gradient with respect to the scores is
softmax(scores) - teacher on these keys, and 0 elsewhere.

If the index has a key per block, the teacher of a block is the attention to all of its keys. Attention to keys outside
of the blocks that compete has no student: it is left out, and the rest is normalized. The entries of compressed
attention, whose softmax has keys of a window besides, are treated alike.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from sparsejax.errors import InputError
from sparsejax.ops.blocks import Blocks, make_blocks, split_equally
from sparsejax.ops.selection import Selection, Visible, over_queries, score_tiles, select, tiled_chunk
from sparsejax.ops.softmax import MASKED, masked_softmax
from sparsejax.patterns import Pattern

TINY = 1e-37  # keeps the logarithm of a probability of 0 finite


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("q", "k", "weights"), meta_fields=("relu", "per_head")
)
@dataclasses.dataclass(frozen=True)
class Index:
    """Queries and keys of an indexer.

    Attributes:
      q: Index queries.
      k: Index keys of tokens, or of blocks, which all index heads share.
      weights: Weight per query and index head; None for 1.
      relu: Whether products below 0 count as 0.
      per_head: Whether each index head has scores of its own instead of a part of one sum.
    """

    q: Float[Array, "b t n d"]
    k: Float[Array, "b s d"]
    weights: Float[Array, "b t n"] | None = None
    relu: bool = True
    per_head: bool = False

    def scores(
        self,
        q: Float[Array, "b c n d"],
        weights: Float[Array, "b c n"] | None,
        k: Float[Array, "b s d"] | Float[Array, "b scopes c s d"] | None = None,
    ) -> Float[Array, "b scopes c s"]:
        """Weight * relu(q·k / √d) in float32, summed over the heads, or per head.

        Args:
          q: Some of the queries.
          weights: Their weights.
          k: Keys for all queries, by default those of the index, or for each scope and query.
        """
        k, dtype = self.k if k is None else k, jnp.promote_types(q.dtype, jnp.float32)
        keys = "bsd" if k.ndim == 3 else "bncsd" if self.per_head else "bxcsd"
        q = jnp.moveaxis(q.astype(dtype), 2, 1)
        products = jnp.einsum(f"bncd,{keys}->bncs", q, k.astype(dtype)) * q.shape[-1] ** -0.5
        products = jax.nn.relu(products) if self.relu else products
        products = products if weights is None else products * jnp.moveaxis(weights, 2, 1)[..., None].astype(dtype)
        if self.per_head:
            return products
        # XLA:CPU computes these sums 12 times as fast as the reduction that they equal.
        return functools.reduce(jnp.add, jnp.split(products, products.shape[1], axis=1))


def select_indexed(
    index: Index,
    top_k: int,
    pattern: Pattern,
    *,
    blocks: Blocks | None = None,
    local: int = 0,
    has_block_keys: bool = False,
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    positions: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    length: int | None = None,
) -> Selection:
    """The keys, or blocks of keys, with the largest scores of an index.

    The score of a block is the largest score of its keys that a query may attend to. If the index has a key per block
    instead, only blocks all of whose keys a query may attend to compete, and the last one, if it is not among them, is
    chosen besides.

    Args:
      index: The index.
      top_k: Blocks per query.
      pattern: The allowed keys.
      blocks: The blocks; None for keys.
      local: Last blocks, with that of the query, that are always chosen; they count among `top_k`.
      has_block_keys: Whether the keys of the index are those of blocks.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`.
      length: Length of the sequence that the pattern describes.

    Raises:
      InputError: `top_k` is below 1.
    """
    if top_k < 1:
        raise InputError("top_k", f"{top_k} is below 1")
    index = jax.lax.stop_gradient(index)
    blocks = make_blocks(index.k.shape[1], 1) if blocks is None else blocks

    def score(k: Array, arrays: tuple[Array, Array | None], visible: Visible) -> tuple[Array, Array | None]:
        def pool(k: Array, mask: Array) -> Array:
            scores = jnp.where(mask[:, None], index.scores(*arrays, k), -jnp.inf)
            return scores if blocks.size == 1 else split_equally(scores, blocks.size, -jnp.inf).max(axis=-1)

        scores = index.scores(*arrays, visible.take(k)) if has_block_keys else score_tiles(pool, k, visible)
        return scores, visible.force(0, local) if local else None

    arrays = index.q, index.weights
    options = {"segments": segments, "positions": positions, "length": length, "chunk": tiled_chunk(blocks)}
    return select(score, arrays, index.k, blocks, top_k, pattern, complete=has_block_keys, **options)


def indexer_divergence(
    index: Index,
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    pattern: Pattern,
    selection: Selection | None = None,
    *,
    blocks: Blocks | None = None,
    lse: Float[Array, "b t h"] | None = None,
    scale: float | None = None,
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    positions: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
) -> Float[Array, "b t"]:
    """Divergence KL(teacher || student) per query, in nats; the report sums it, others take the mean.

    The teacher is the mean over the heads; with scores per head, over those of a key/value head, and the divergence is
    the mean over the key/value heads. Scores of a chunk of queries are in memory at a time, and the backward pass
    recomputes them.

    Args:
      index: The index, which alone has a gradient.
      q: Queries of the attention.
      k: Keys of the attention.
      pattern: The allowed keys.
      selection: The chosen keys of the sparse stage; None for the warm-up.
      blocks: The blocks that the keys of the index stand for, of which only whole ones compete; None for keys. They
        are those of the selection.
      lse: Log-sum-exp of the attention if it has other keys than `k`; None if it has not.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.
      positions: Positions of queries and of keys, see `select`.
    """
    q, k, lse = jax.lax.stop_gradient((q, k, lse))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    (b, t, h, d), g, scopes = q.shape, k.shape[2], index.q.shape[2] if index.per_head else 1
    q, k = q.reshape(b, t, scopes, g // scopes, h // g, d), k.reshape(b, -1, scopes, g // scopes, d)
    lse = None if lse is None else lse.reshape(q.shape[:-1])
    groups = None if selection is None else jnp.moveaxis(selection.groups, 1, 2)

    def diverge(all_keys: tuple[Array, Array], chunk: PyTree, visible: Visible) -> Float[Array, "b 1 c"]:
        q, lse, index_q, weights, groups = chunk
        (attended, index_keys), mask = all_keys, visible.keys[:, None]
        if selection is not None:
            groups = jnp.moveaxis(groups, 2, 1)
            keys = Selection(groups, selection.blocks).keys
            attended = jax.vmap(_take, (2, 1), 1)(attended, keys)
            index_keys, mask = _take(index_keys, keys if blocks is None else groups), _take_mask(visible.keys, keys)
        mass = _average_heads(q, attended, mask, scale, lse)
        if blocks is not None:
            mask = jnp.broadcast_to(mask, (b, *mask.shape[1:]))
            if selection is None:
                index_keys = visible.take(index_keys)
                mass, mask = visible.blocks.split(mass, 0.0), visible.blocks.split(mask, False)
            else:
                mass, mask = (x.reshape(*x.shape[:-1], -1, blocks.size) for x in (mass, mask))
            mass, mask = mass.sum(axis=-1), mask.all(axis=-1)
        mass = jnp.where(mask, jax.lax.stop_gradient(mass), 0.0)
        teacher = mass / jnp.maximum(mass.sum(axis=-1, keepdims=True), TINY)
        scores = jnp.where(mask, index.scores(index_q, weights, index_keys), MASKED)
        student = jax.nn.log_softmax(scores, axis=-1)
        terms = jnp.where(mask & (teacher > 0), teacher * (jnp.log(jnp.maximum(teacher, TINY)) - student), 0.0)
        return terms.sum(axis=-1).mean(axis=1, keepdims=True)

    arrays, options = (q, lse, index.q, index.weights, groups), {"segments": segments, "positions": positions}
    blocks_of_keys = make_blocks(k.shape[1], 1) if blocks is None else blocks
    return over_queries(diverge, arrays, (k, index.k), pattern, blocks_of_keys, **options)[..., 0]


def _take(x: Shaped[Array, "b s ..."], keys: Int[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """The rows of `x` at these keys; an arbitrary row for -1."""
    return jax.vmap(lambda x, keys: x[jnp.maximum(keys, 0)])(x, keys)


def _take_mask(mask: Bool[Array, "#b c s"], keys: Int[Array, "b x c k"]) -> Bool[Array, "b x c k"]:
    mask = jnp.broadcast_to(mask[:, None], (len(keys), keys.shape[1], *mask.shape[1:]))
    return (keys >= 0) & jnp.take_along_axis(mask, jnp.maximum(keys, 0), axis=-1)


def _average_heads(
    q: Float[Array, "b c x g r d"],
    k: Float[Array, "b s x g d"] | Float[Array, "b x c s g d"],
    mask: Bool[Array, "#b #x c s"],
    scale: float,
    lse: Float[Array, "b c x g r"] | None,
) -> Float[Array, "b x c s"]:
    """The mean over the heads of each scope of attention probabilities; zeros for a query without a key.

    Keys are those of all queries, or of each scope and query. The log-sum-exp defaults to that over them.
    """
    dtype, keys = jnp.promote_types(q.dtype, jnp.float32), "bsxgd" if k.ndim == 5 else "bxcsgd"
    logits = jnp.einsum(f"bcxgrd,{keys}->bxgrcs", q.astype(dtype), k.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    mask = mask[:, :, None, None]
    if lse is None:
        p, _ = masked_softmax(logits * scale, mask, None)
    else:
        p = jnp.where(mask, jnp.exp(logits * scale - jnp.moveaxis(lse, 1, -1)[..., None]), 0.0)
    return p.mean(axis=(2, 3))
