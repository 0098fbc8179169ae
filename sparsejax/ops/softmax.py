"""The softmax that attention implementations share: its scores, its masks and its log-sum-exp."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.patterns import Pattern

MASKED = -1e30  # stands in for minus infinity: finite, so that a fully masked row gives no NaN


def softcap(scores: Array, softcap: float | None) -> Array:
    """Bounds scores smoothly to (-softcap, softcap) (Gemma 2, arXiv:2408.00118)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def log_multiplicity(pattern: Pattern, *positions: Any) -> Array | float:
    """What is added to scores so that a key that counts m times does: log m, shaped like `pattern.allows` of these."""
    return jnp.log(jnp.maximum(pattern.counts(*positions), 1)) if pattern.repeats else 0.0


def add_alibi(
    scores: Float[Array, "*scores"], slopes: Float[Array, "*#scores"] | None, distance: Int[Array, "*#scores"]
) -> Float[Array, "*scores"]:
    """Scores that fall with the distance from query to key, by slopes (ALiBi, arXiv:2108.12409)."""
    return scores if slopes is None else scores - slopes * abs(distance)


def masked_softmax(
    scores: Float[Array, "*batch t s"], mask: Bool[Array, "*#batch t s"], sink: Float[Array, "*#batch t 1"] | None
) -> tuple[Float[Array, "*batch t s"], Float[Array, "*batch t"]]:
    """Softmax over the allowed keys, with an optional sink logit in the denominator.

    Returns:
      The weights, all zero in a row with no allowed key, and the log-sum-exp (sink included), minus infinity
      in a row with neither key nor sink.
    """
    scores = jnp.where(mask, scores, MASKED)
    top = scores.max(axis=-1, keepdims=True)
    top = top if sink is None else jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(top > MASKED / 2, top, 0.0))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    live = total > 0
    safe = jnp.where(live, total, 1.0)
    return weights / safe, jnp.where(live, top + jnp.log(safe), -jnp.inf)[..., 0]


def merge_lse(
    parts: Sequence[tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]],
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Attention over a set of keys, from the outputs and log-sum-exps of attention over parts of it."""
    outs, lses = zip(*parts, strict=True)
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    shares = [jnp.exp(lse - top) for lse in lses]
    total = functools.reduce(jnp.add, shares)
    live = total > 0
    safe = jnp.where(live, total, 1.0)
    out = sum(
        out.astype(lse.dtype) * (share / safe)[..., None] for out, lse, share in zip(outs, lses, shares, strict=True)
    )
    return out.astype(outs[0].dtype), jnp.where(live, top + jnp.log(safe), -jnp.inf)
