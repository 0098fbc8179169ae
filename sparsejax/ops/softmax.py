"""The softmax that attention implementations share: scores, masks and the log-sum-exp.

Names follow FlashAttention (arXiv:2205.14135): `m` is the maximum of a row's scores, `l` the sum of exp(score - m), `p`
the probabilities, and `lse` = m + log(l) the log-sum-exp from which FlashAttention-2 (arXiv:2307.08691) recomputes
p = exp(score - lse) in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.patterns import Pattern

MASKED = -1e30  # stands in for minus infinity: finite, so that a fully masked row gives no NaN


def softcap(scores: Float[Array, "*scores"], limit: float | None) -> Float[Array, "*scores"]:
    """Bounds scores smoothly to (-limit, limit) (Gemma 2, arXiv:2408.00118)."""
    return scores if limit is None else limit * jnp.tanh(scores / limit)


def log_multiplicity(pattern: Pattern, *positions: Any) -> Float[Array, " ..."] | float:
    """Log m, the bias that makes a key count m times; takes the arguments of `pattern.allows`."""
    return jnp.log(jnp.maximum(pattern.counts(*positions), 1)) if pattern.repeats else 0.0


def add_alibi(
    scores: Float[Array, " ..."], slopes: Float[Array, " ..."] | None, distance: Int[Array, " ..."]
) -> Float[Array, " ..."]:
    """Subtracts slope * |distance| from the scores (ALiBi, arXiv:2108.12409); the arrays broadcast."""
    return scores if slopes is None else scores - slopes * abs(distance)


def masked_softmax(
    scores: Float[Array, "*batch t s"], mask: Bool[Array, "*#batch #t s"], sink: Float[Array, "*#batch #t 1"] | None
) -> tuple[Float[Array, "*batch t s"], Float[Array, "*batch t"]]:
    """Softmax over the allowed keys, with an optional sink logit in the denominator.

    Returns:
      The probabilities, zeros in a row without an allowed key, and the log-sum-exp with the sink, minus infinity in a
      row with neither key nor sink.
    """
    scores = jnp.where(mask, scores, MASKED)
    m = scores.max(axis=-1, keepdims=True)
    m = m if sink is None else jnp.maximum(m, sink)
    m = jax.lax.stop_gradient(jnp.where(m > MASKED / 2, m, 0.0))
    p = jnp.where(mask, jnp.exp(scores - m), 0.0)
    l = p.sum(axis=-1, keepdims=True)
    l = l if sink is None else l + jnp.exp(sink - m)
    safe_l = jnp.where(l == 0, 1.0, l)
    return p / safe_l, log_sum(m, l)[..., 0]


def log_sum(m: Float[Array, "*rows"], l: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The log-sum-exp m + log(l): minus infinity in a row without keys, NaN in a row that is not finite."""
    return jnp.where(l == 0, -jnp.inf, m + jnp.log(jnp.where(l == 0, 1.0, l)))


def confine_nan(
    q: Float[Array, "*queries d"], k: Float[Array, "*keys d"], v: Float[Array, "*keys value"]
) -> tuple[Float[Array, "*queries d"], Float[Array, "*keys d"], Float[Array, "*keys value"]]:
    """Rows that are not finite as rows of NaN; such a value is zeros, and its key NaN.

    The score of such a query or key is NaN where a query attends to the key, and replaced elsewhere. So a query that
    attends to it gives NaN, and no other query is affected: a NaN value would enter the matrix product of every query,
    with a probability of 0.
    """
    finite_q, finite_k, finite_v = (jnp.isfinite(x).all(axis=-1, keepdims=True) for x in (q, k, v))
    valid = finite_k & finite_v
    return jnp.where(finite_q, q, jnp.nan), jnp.where(valid, k, jnp.nan), jnp.where(valid, v, 0)


def zero_nan(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Zeros instead of NaN, for factors of products with probabilities of 0."""
    return jnp.where(jnp.isnan(x), 0, x)


def merge_lse(
    parts: Sequence[tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]],
) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Output and log-sum-exp of attention over a set of keys, from those over its disjoint parts."""
    outs, lses = zip(*parts, strict=True)
    m = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))
    m = jnp.where(jnp.isfinite(m), m, 0.0)
    sums = [jnp.exp(lse - m) for lse in lses]
    l = functools.reduce(jnp.add, sums)
    safe_l = jnp.where(l == 0, 1.0, l)
    out = sum(
        out.astype(lse.dtype) * (part / safe_l)[..., None] for out, lse, part in zip(outs, lses, sums, strict=True)
    )
    return out.astype(outs[0].dtype), log_sum(m, l)
