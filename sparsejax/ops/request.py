"""What is asked of an attention implementation, checked once, and the softmax that implementations share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.patterns import Pattern

MASKED = -1e30  # stands in for minus infinity: finite, so that a fully masked row gives no NaN


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One call of `attend`, with shapes that agree. `scale` is resolved, segments are a pair or None."""

    q: Float[Array, "b t h d"]
    k: Float[Array, "b s g d"]
    v: Float[Array, "b s g e"]
    pattern: Pattern
    scale: float
    softcap: float | None
    sink_logits: Float[Array, " h"] | None
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None
    interpret: bool
    alibi_slopes: Float[Array, " h"] | None = None
    wants_lse: bool = True  # the log-sum-exp, or its gradient

    def __post_init__(self):
        if {self.q.ndim, self.k.ndim, self.v.ndim} != {4} or self.k.shape[:-1] != self.v.shape[:-1]:
            raise ValueError(f"attend: q [b,t,h,d], k [b,s,g,d], v [b,s,g,e]; got {_shapes(self.q, self.k, self.v)}")
        (b, t, h, d), (kb, s, g, kd) = self.q.shape, self.k.shape
        if (b, d) != (kb, kd):
            raise ValueError(f"attend: batch and head width of q and k differ: {_shapes(self.q, self.k)}")
        if min(self.q.shape + self.k.shape + self.v.shape) == 0:
            raise ValueError(f"attend: an axis is empty: {_shapes(self.q, self.k, self.v)}")
        if h % g:
            raise ValueError(f"attend: {h} query heads do not divide into {g} key/value heads")
        if self.pattern.heads not in (None, h):
            raise ValueError(f"attend: the pattern is for {self.pattern.heads} heads, q has {h}: {self.pattern}")
        for name in ("sink_logits", "alibi_slopes"):
            if (x := getattr(self, name)) is not None and x.shape != (h,):
                raise ValueError(f"attend: {name} must be [{h}], got {_shapes(x)}")
        if self.segments is not None and [x.shape for x in self.segments] != [(b, t), (b, s)]:
            raise ValueError(f"attend: segment_ids must be [{b},{t}] and [{b},{s}], got {_shapes(*self.segments)}")

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of scores, softmax and sums: float32, or float64 for float64 inputs."""
        return jnp.promote_types(self.q.dtype, jnp.float32)

    def head_groups(self) -> dict[Pattern, list[int]]:
        """Query heads by the pattern they follow."""
        groups: dict[Pattern, list[int]] = {}
        for head in range(self.q.shape[2]):
            groups.setdefault(self.pattern.for_head(head), []).append(head)
        return groups


def by_pattern(
    request: Request, run: Callable[[Request], tuple[Array, Array]]
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """What `run` makes of the request: of each group of heads that follow one pattern in turn."""
    groups = request.head_groups()
    if len(groups) == 1:
        return run(dataclasses.replace(request, pattern=next(iter(groups))))
    share = request.q.shape[2] // request.k.shape[2]
    parts, order = [], []
    for pattern, heads in groups.items():  # each query head of the group takes a key/value head of its own
        order += heads
        own = np.array(heads)
        q, k, v = request.q[:, :, own], request.k[:, :, own // share], request.v[:, :, own // share]
        sink, slopes = (None if x is None else x[own] for x in (request.sink_logits, request.alibi_slopes))
        part = dataclasses.replace(request, q=q, k=k, v=v, pattern=pattern, sink_logits=sink, alibi_slopes=slopes)
        parts.append(run(part))
    out, lse = (jnp.concatenate(arrays, axis=2)[:, :, np.argsort(order)] for arrays in zip(*parts, strict=True))
    return out, lse


def _shapes(*arrays: jax.Array) -> str:
    return ", ".join(str(list(a.shape)) for a in arrays)


def cap(scores: Array, softcap: float | None) -> Array:
    """Bounds scores smoothly to (-softcap, softcap) (Gemma 2, arXiv:2408.00118)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def count_bonus(pattern: Pattern, *positions: Any) -> Array | float:
    """What is added to scores so that a key that counts m times does: log m, shaped like `pattern.allows` of these."""
    return jnp.log(jnp.maximum(pattern.counts(*positions), 1)) if pattern.repeats else 0.0


def lean(
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
