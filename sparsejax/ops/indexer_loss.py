"""The loss that trains an indexer: the divergence of its scores from the attention that it serves.

DeepSeek-V3.2-Exp, technical report, section 2.1. The attention is the teacher and a constant: no gradient flows to its
queries and keys. In the warm-up both distributions are over all keys that a query may attend to. In the sparse stage
both are over the chosen keys: the teacher is the attention as it then runs, a softmax over the chosen keys per head.
The gradient with respect to the scores is softmax(scores) - teacher on these keys, and 0 elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.selection import Selection, Visible, over_queries
from sparsejax.ops.selectors import index_scores
from sparsejax.ops.softmax import MASKED, masked_softmax
from sparsejax.patterns import Pattern

TINY = 1e-37  # keeps the logarithm of a probability of 0 finite


class Index(NamedTuple):
    """Queries, keys and weights of an indexer, see `index_scores`.

    Attributes:
      q: Index queries.
      k: Index keys, which all heads share.
      weights: Weight per query and head.
    """

    q: Float[Array, "b t n d"]
    k: Float[Array, "b s d"]
    weights: Float[Array, "b t n"]


def indexer_divergence(
    index: Index,
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    pattern: Pattern,
    selection: Selection | None = None,
    *,
    scale: float | None = None,
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
) -> Float[Array, "b t"]:
    """Divergence KL(teacher || student) per query, in nats; the report sums it, others take the mean.

    Scores of a chunk of queries are in memory at a time, and the backward pass recomputes them.

    Args:
      index: The indexer, which alone has a gradient.
      q: Queries of the attention.
      k: Keys of the attention.
      pattern: The allowed keys.
      selection: The chosen keys of the sparse stage, which all heads share; None for the warm-up.
      scale: Factor on q·k; defaults to `d ** -0.5`.
      segments: Segment ids of queries and of keys.
    """
    q, k = jax.lax.stop_gradient((q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = None if selection is None else selection.keys[:, 0]

    def diverge(chunk: tuple[Array, ...], visible: Visible) -> Float[Array, "b 1 c"]:
        q, index_q, weights = chunk[:3]
        keys, index_keys, mask = k, index.k, visible.keys
        if chosen is not None:
            keys, index_keys = (_take(x, chunk[3]) for x in (k, index.k))
            mask = _take_mask(mask, chunk[3])
        teacher = jax.lax.stop_gradient(_average_heads(q, keys, mask, scale))
        student = jax.nn.log_softmax(jnp.where(mask, index_scores(index_q, weights, index_keys), MASKED), axis=-1)
        terms = jnp.where(mask & (teacher > 0), teacher * (jnp.log(jnp.maximum(teacher, TINY)) - student), 0.0)
        return terms.sum(axis=-1)[:, None]

    arrays = (q, index.q, index.weights) if chosen is None else (q, index.q, index.weights, chosen)
    return over_queries(diverge, arrays, pattern, k.shape[1], segments=segments)[..., 0]


def _take(x: Float[Array, " b s *rest"], keys: Int[Array, "b c k"]) -> Float[Array, "b c k *rest"]:
    """The rows of `x` at these keys; an arbitrary row for -1."""
    return jax.vmap(lambda x, keys: x[jnp.maximum(keys, 0)])(x, keys)


def _take_mask(mask: Bool[Array, "#b c s"], keys: Int[Array, "b c k"]) -> Bool[Array, "b c k"]:
    mask = jnp.broadcast_to(mask, (len(keys), *mask.shape[1:]))
    return (keys >= 0) & jnp.take_along_axis(mask, jnp.maximum(keys, 0), axis=-1)


def _average_heads(
    q: Float[Array, "b c h d"],
    k: Float[Array, "b s g d"] | Float[Array, "b c s g d"],
    mask: Bool[Array, "#b c s"],
    scale: float,
) -> Float[Array, "b c s"]:
    """The mean over heads of attention probabilities; zeros for a query without a key.

    Keys are those of all queries, or of each query.
    """
    (b, c, h, d), g = q.shape, k.shape[-2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, equation = q.reshape(b, c, g, h // g, d).astype(dtype), f"bcgrd,b{'c' * (k.ndim - 4)}sgd->bgrcs"
    logits = jnp.einsum(equation, q, k.astype(dtype), precision=jax.lax.Precision.HIGHEST) * scale
    p, _ = masked_softmax(logits, mask[:, None, None], None)
    return p.mean(axis=(1, 2))
