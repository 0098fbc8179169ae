"""Flash attention over tile lists (arXiv:2205.14135): what the kernels of all machines have around them.

A back end computes parts (`lists.Part`) of three things: the output, dq, and dk with dv. Here they are put together,
with what is cheap beside them: padding, the rest of the softmax's gradient, and that of the sinks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.chunks import fill_chunks
from sparsejax.ops.kernels.lists import Part, Walk, plan_pattern, plan_selection
from sparsejax.ops.softmax import MASKED
from sparsejax.patterns import Pattern

WIDEST = 256  # heads
COSTLY = 64  # operations: a longer formula is not evaluated in the kernel
LOG2E = math.log2(math.e)
LOWEST = MASKED / 2  # a running maximum starts here, so that what is masked has a weight of 0


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static of one call.

    Attributes:
      pattern: None where partial tiles look their masks up.
      t: Number of queries, without padding.
      s: Number of keys, likewise.
      tile: Queries and keys of a tile.
      share: Query heads of a key/value head.
      scale: Factor on q·k.
      softcap: As in `attend`.
      interpret: What `pallas_call` is given.
      kept: Tiles (of queries, of keys) whose masks are all that there are; empty if there are too many.
    """

    pattern: Pattern | None
    t: int
    s: int
    tile: tuple[int, int]
    share: int
    scale: float
    softcap: float | None
    interpret: bool
    kept: tuple[tuple[int, int], ...]


class Inputs(NamedTuple):
    """Arrays of one call, padded to whole tiles. Heads stand before positions."""

    q: Float[Array, "b h t d"]
    k: Float[Array, "b g s d"]
    v: Float[Array, "b g s e"]
    sink: Float[Array, " h"] | None
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None
    bits: tuple[Array, ...] | None  # masks of partial tiles as the back end packs them


class Back(NamedTuple):
    """What the backward pass knows besides: the gradient of a score is weight * (d_out · v + slope)."""

    d_out: Float[Array, "b h t e"]
    lse: Float[Array, "b h t"]
    slope: Float[Array, "b h t"]


@dataclasses.dataclass(frozen=True)
class Backend:
    """Kernels of one machine. Each computes the part, with heads and rows in the order of the part.

    Attributes:
      forward: The output and its log-sum-exp.
      d_queries: The gradient of q.
      d_keys_values: Those of k and v.
      pack: Masks bool [distinct, queries, keys], as the kernels read them.
      operations: What formulas of patterns may be made of; None: anything.
      most: How many entries the lists of one call may have, half as many where masks are looked up; None: any number.
      most_kept: How many distinct masks a kernel can compute once and keep.
    """

    forward: Callable[[Spec, Part, Walk, Inputs], tuple[Array, Array]]  # out [b,heads,rows,e], lse [b,heads,rows]
    d_queries: Callable[[Spec, Part, Walk, Inputs, Back], Array]  # [b,heads,rows,d]
    d_keys_values: Callable[[Spec, Part, Walk, Inputs, Back], tuple[Array, Array]]  # [b,heads,rows,d] and [...,e]
    pack: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    operations: frozenset[str] | None = None
    most: int | None = None
    most_kept: int = 0


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why the kernels of no machine can serve the call, or None."""
    widest = max(call.q.shape[-1], call.v.shape[-1])
    reasons = (
        (widest > WIDEST, f"heads of at most {WIDEST}, got {widest}"),
        (call.alibi_slopes is not None, "no ALiBi"),
        (call.pattern.repeats, "no keys that count more than once"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def attend_lists(
    backend: Backend, call: AttentionCall, tile: tuple[int, int], selected: Int[Array, "#b h rows k"] | None
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Output in the dtype of q, and log-sum-exp in float32.

    Args:
      backend: whose kernels.
      call: what is asked.
      tile: queries and keys of a tile.
      selected: key tiles of each query tile of each head, -1 for none, computed from the data: of the pairs in these,
        those count that the pattern, which must be one for all heads, allows. None: all that it allows.
    """
    pattern, (_, t, h, _), (_, s, g, _) = call.pattern, call.q.shape, call.k.shape
    if selected is None:
        formula = has_formula(pattern, t, s, backend.operations)
        most = backend.most if formula or backend.most is None else backend.most // 2
        plan = plan_pattern(pattern, t, s, tile, (h, g), formula, most, backend.most_kept)
    else:
        plan = plan_selection(selected, pattern, t, s, tile, g)
    formula, scale, softcap = pattern if plan.bits is None else None, call.scale, call.softcap
    spec = Spec(formula, t, s, tile, h // g, scale, softcap, call.interpret, plan.kept)
    q, k, v = (
        fill_chunks(jnp.moveaxis(x, 2, 1), side, 2)
        for x, side in ((call.q, tile[0]), (call.k, tile[1]), (call.v, tile[1]))
    )
    sink = None if call.sink_logits is None else call.sink_logits.astype(jnp.float32)
    segments = None
    if call.segments is not None:
        segments = tuple(
            fill_chunks(x.astype(jnp.int32), side, 1) for x, side in zip(call.segments, tile, strict=True)
        )
    bits = None if plan.bits is None else tuple(map(jnp.asarray, backend.pack(plan.bits)))
    parts = tuple(part for part, _ in plan.rows), tuple(part for part, _ in plan.columns)
    walks = tuple(walk for _, walk in plan.rows), tuple(walk for _, walk in plan.columns)
    out, lse = _attend(backend, spec, parts, walks, Inputs(q, k, v, sink, segments, bits))
    return jnp.moveaxis(out[:, :, :t], 1, 2), jnp.moveaxis(lse[:, :, :t], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(backend, spec, parts, walks, inputs):
    """Out [b,h,t,e] in the dtype of q and lse [b,h,t], both padded."""
    run = functools.partial(backend.forward, spec)
    return _assemble(parts[0], [run(part, walk, inputs) for part, walk in zip(parts[0], walks[0], strict=True)])


def _attend_forward(backend, spec, parts, walks, inputs):
    out, lse = _attend(backend, spec, parts, walks, inputs)
    return (out, lse), (walks, inputs, out, lse)


def _attend_backward(backend, spec, parts, saved, cotangents):
    walks, inputs, out, lse = saved
    d_out, d_lse = cotangents
    slope = d_lse - (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    # A row that sees no key has nothing but masked scores, whose weights are 0 under any finite lse.
    back = Back(d_out.astype(inputs.q.dtype), jnp.where(jnp.isfinite(lse), lse, 0.0), slope)
    runs = [
        [functools.partial(run, spec, part, walk, inputs, back) for part, walk in zip(ours, theirs, strict=True)]
        for run, ours, theirs in zip((backend.d_queries, backend.d_keys_values), parts, walks, strict=True)
    ]
    (d_q,) = _assemble(parts[0], [(run(),) for run in runs[0]])
    d_k, d_v = _assemble(parts[1], [run() for run in runs[1]])
    sink = inputs.sink
    d_sink = None if sink is None else (jnp.exp(sink[:, None] - lse) * slope)[..., : spec.t].sum(axis=(0, 2))
    return None, Inputs(d_q, d_k, d_v, d_sink, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _assemble(parts: Sequence[Part], results: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Arrays [b, heads, rows, ...] of parts as one of all heads and rows."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(part.heads, []).append(i)
    order = np.argsort([head for heads in groups for head in heads])
    whole = []
    for arrays in zip(*results, strict=True):
        rows = [_join([arrays[i] for i in sorted(group, key=lambda i: parts[i].start)], 2) for group in groups.values()]
        joined = _join(rows, 1)
        whole.append(joined if (np.diff(order) == 1).all() else joined[:, order])
    return tuple(whole)


def _join(arrays: list[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def segment_ranges(
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]], tile: tuple[int, int]
) -> list[tuple[Int[Array, "b tiles"], Int[Array, "b tiles"]]]:
    """The least and the greatest id in each tile of queries, and in each of keys; see `Inputs.segments`."""
    tiles = (x.reshape(len(x), -1, side) for x, side in zip(segments, tile, strict=True))
    return [(x.min(axis=-1), x.max(axis=-1)) for x in tiles]


def bound_scores(spec: Spec, products: Array) -> Array:
    """Scores in a unit of `score_unit`: the products q·k as they are, or the tanh of a softcap."""
    if spec.softcap is not None:
        return jnp.tanh(products * (spec.scale / spec.softcap))
    return products if spec.scale > 0 else products * math.copysign(spec.scale != 0, spec.scale)


def score_unit(spec: Spec) -> float:
    """By which scores are multiplied only after the maximum has been taken off, which is exact."""
    return spec.softcap or abs(spec.scale) or 1.0


def has_formula(pattern: Pattern, t: int, s: int, known: frozenset[str] | None = None) -> bool:
    """Whether a kernel can evaluate the pattern in its partial tiles: one for all heads, in few operations.

    `known`: the operations that the machine has; all if not given.
    """
    if pattern.heads is not None:
        return False
    position = jax.ShapeDtypeStruct((), jnp.int32)
    formula = jax.make_jaxpr(lambda q, k: pattern.allows(q, k, t, s))(position, position).jaxpr
    return len(formula.eqns) <= COSTLY and (known is None or _operations(formula) <= known)


def _operations(formula) -> set[str]:
    found = set()
    for equation in formula.eqns:
        inner = equation.params.get("jaxpr")  # of a function that is called
        found |= {equation.primitive.name} if inner is None else _operations(inner.jaxpr)
    return found
