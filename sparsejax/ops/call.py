"""The arguments of one `attend` call, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.patterns import Pattern


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionCall:
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
    return_lse: bool = True  # the log-sum-exp, or its gradient

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
    call: AttentionCall, run: Callable[[AttentionCall], tuple[Array, Array]]
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """What `run` makes of the call: of each group of heads that follow one pattern in turn."""
    groups = call.head_groups()
    if len(groups) == 1:
        return run(dataclasses.replace(call, pattern=next(iter(groups))))
    share = call.q.shape[2] // call.k.shape[2]
    parts, order = [], []
    for pattern, heads in groups.items():  # each query head of the group takes a key/value head of its own
        order += heads
        own = np.array(heads)
        q, k, v = call.q[:, :, own], call.k[:, :, own // share], call.v[:, :, own // share]
        sink, slopes = (None if x is None else x[own] for x in (call.sink_logits, call.alibi_slopes))
        part = dataclasses.replace(call, q=q, k=k, v=v, pattern=pattern, sink_logits=sink, alibi_slopes=slopes)
        parts.append(run(part))
    out, lse = (jnp.concatenate(arrays, axis=2)[:, :, np.argsort(order)] for arrays in zip(*parts, strict=True))
    return out, lse


def _shapes(*arrays: jax.Array) -> str:
    return ", ".join(str(list(a.shape)) for a in arrays)
