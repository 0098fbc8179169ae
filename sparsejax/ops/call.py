"""The arguments of one `attend` call, checked once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.errors import InputError
from sparsejax.ops.selection import Selection
from sparsejax.ops.sequence import shard_index
from sparsejax.patterns import Pattern

LAYOUTS = {"q": "[b, t, h, d]", "k": "[b, s, g, d]", "v": "[b, s, g, value]"}


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of `attend` with defaults resolved.

    Attributes:
      segments: Segment ids of queries and of keys.
      interpret: True, or the parameters of a Pallas interpreter.
      return_lse: Whether the log-sum-exp, or a gradient through it, is used.
      q_offset: Position of the first query, which `pattern` includes already: only ALiBi needs it.
      selection: Groups of keys that each query chose; it attends to those that the pattern and the segments allow.
      shard_of: Number of queries of the sequence, in `map_shards` with a selection, where a call has those of a shard.

    Raises:
      InputError: Shapes do not agree.
    """

    q: Float[Array, "b t h d"]
    k: Float[Array, "b s g d"]
    v: Float[Array, "b s g value"]
    pattern: Pattern
    scale: float
    softcap: float | None
    sink_logits: Float[Array, " h"] | None
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None
    interpret: Any
    alibi_slopes: Float[Array, " h"] | None = None
    return_lse: bool = True
    q_offset: int = 0
    selection: Selection | None = None
    shard_of: int | None = None

    def __post_init__(self):
        q, k, v = (list(x.shape) for x in (self.q, self.k, self.v))
        for (name, layout), shape in zip(LAYOUTS.items(), (q, k, v), strict=True):
            if len(shape) != 4:
                raise InputError(name, f"shape {shape} is not {layout}")
            if 0 in shape:
                raise InputError(name, f"shape {shape} has an empty axis")
        if k[:3] != v[:3]:
            raise InputError("v", f"shape {v} differs from k's {k} in batch, length or heads")
        (b, t, h, d), (_, s, g, _) = q, k
        if (b, d) != (k[0], k[3]):
            raise InputError("k", f"shape {k} differs from q's {q} in batch or head width")
        if h % g:
            raise InputError("q", f"{h} heads are not divisible by k's {g} heads")
        if self.pattern.heads not in (None, h):
            raise InputError("pattern", f"{self.pattern} is for {self.pattern.heads} heads, q has {h}")
        require_softcap(self.softcap)
        for name in ("sink_logits", "alibi_slopes"):
            if (x := getattr(self, name)) is not None and x.shape != (h,):
                raise InputError(name, f"shape {list(x.shape)} is not [{h}], one number per query head")
        if self.segments is not None and [x.shape for x in self.segments] != [(b, t), (b, s)]:
            shapes = ", ".join(str(list(x.shape)) for x in self.segments)
            raise InputError("segment_ids", f"{shapes}: shapes of queries and keys are not [{b}, {t}], [{b}, {s}]")
        if self.selection is not None:
            self._check_selection(self.selection)

    def _check_selection(self, selection: Selection) -> None:
        (b, t, h, _), (_, s, g, _), shape = self.q.shape, self.k.shape, selection.groups.shape
        scopes = shape[1]
        if shape != (b, scopes, t, shape[3]) or h % scopes or (g % scopes and scopes % g):
            raise InputError("selection", f"groups of shape {list(shape)} are not [{b}, 1 or {g} or {h}, {t}, groups]")
        if selection.blocks.of_key.shape[1] != s:
            raise InputError("selection", f"has blocks of {selection.blocks.of_key.shape[1]} keys, k has {s}")
        if self.pattern.heads is not None:
            raise InputError("pattern", f"{self.pattern} differs between heads, which a selection does not support")

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of scores, softmax and sums: float32, or float64 for float64 inputs."""
        return jnp.promote_types(self.q.dtype, jnp.float32)

    @property
    def first_query(self) -> Int[Array, ""] | int:
        """Index of the first query under the pattern."""
        return 0 if self.shard_of is None else shard_index() * self.q.shape[1]

    @property
    def query_count(self) -> int:
        """Number of queries that the pattern counts."""
        return self.q.shape[1] if self.shard_of is None else self.shard_of

    def head_groups(self) -> dict[Pattern, list[int]]:
        """Query heads by pattern."""
        groups: dict[Pattern, list[int]] = {}
        for head in range(self.q.shape[2]):
            groups.setdefault(self.pattern.for_head(head), []).append(head)
        return groups


def require_softcap(limit: float | None) -> None:
    """Raises InputError unless `limit` is None or a positive number: 0 would make all scores equal."""
    if limit is not None and not 0 < limit < math.inf:
        raise InputError("softcap", f"{limit} is not a positive number; None disables the softcap")


def by_pattern(
    call: AttentionCall, run: Callable[[AttentionCall], tuple[jax.Array, jax.Array]]
) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Runs one call per group of heads that share a pattern, and puts the heads back in order."""
    groups = call.head_groups()
    if len(groups) == 1:
        return run(dataclasses.replace(call, pattern=next(iter(groups))))
    share = call.q.shape[2] // call.k.shape[2]
    results, order = [], []
    for pattern, members in groups.items():  # each query head of a group gets a copy of its key/value head
        order += members
        heads = np.array(members)
        q, k, v = call.q[:, :, heads], call.k[:, :, heads // share], call.v[:, :, heads // share]
        sink, slopes = (None if x is None else x[heads] for x in (call.sink_logits, call.alibi_slopes))
        results.append(
            run(dataclasses.replace(call, q=q, k=k, v=v, pattern=pattern, sink_logits=sink, alibi_slopes=slopes))
        )
    out, lse = (jnp.concatenate(arrays, axis=2)[:, :, np.argsort(order)] for arrays in zip(*results, strict=True))
    return out, lse


@dataclasses.dataclass(frozen=True)
class SelectedCall:
    """Softmax attention to keys that the data select, of a batch of one; for analysis.

    Attributes:
      call: The arguments of attention. Keys that its pattern excludes are not attended to.
      count: Function of query positions [c] that returns how often each selects each key [heads, c, s]; `heads` is 1 if
        all heads select alike. A key that is selected twice has twice the mass.
      self_score: Score of a query with its own position; None for that of the product.
    """

    call: AttentionCall
    count: Callable[[Int[Array, " c"]], Int[Array, "heads c s"]]
    self_score: float | None = None


def selected_call(call: AttentionCall, selection: Selection) -> SelectedCall:
    """The attention of the first sequence to the keys of a selection."""

    def count(queries: Int[Array, " c"]) -> Int[Array, "heads c s"]:
        chosen = Selection(selection.groups[:1, :, queries], selection.blocks).mask[0].astype(jnp.int32)
        return chosen if len(chosen) == 1 else jnp.repeat(chosen, call.q.shape[2] // len(chosen), axis=0)

    return SelectedCall(call, count)
