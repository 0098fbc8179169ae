"""FlashAttention over tile lists: the code that the kernels of all devices share.

A backend provides three kernels: forward, dq, and dk with dv. This module pads their inputs, launches them per
`lists.KernelSlice`, joins the results, and computes the cheap remainder in XLA: delta and the gradient of the sinks.

The kernels use the names of FlashAttention (arXiv:2205.14135) and cite the algorithms of FlashAttention-2
(arXiv:2307.08691). With o = softmax(s) v, the forward pass (Algorithm 1) keeps the running maximum m and sum l of each
row: p = exp(s - m), alpha = exp(m_old - m), l = alpha * l + rowsum(p), o = alpha * o + p v; lse = m + log(l). The
backward pass (Algorithm 2) recomputes p = exp(s - lse): dp = do vᵀ, ds = p * (dp - delta), dq = ds k, dk = dsᵀ q,
dv = pᵀ do. Here `dtanh` is the derivative of the softcap, and delta = rowsum(do * o) - dlse as lse is an output, too.
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
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.chunks import pad_to_multiple
from sparsejax.ops.kernels.choice import Choice, choose_chunk, pack_choice
from sparsejax.ops.kernels.lists import (
    KernelSlice,
    Plan,
    ShardedTiles,
    TileSchedule,
    plan_pattern,
    plan_shards,
    restrict_plan,
    take_shard,
)
from sparsejax.ops.residuals import MIXED, name_arrays
from sparsejax.ops.sequence import shard_index
from sparsejax.ops.softmax import MASKED, zero_nan
from sparsejax.patterns import Pattern

MAX_HEAD_WIDTH = 256
MAX_FORMULA_OPERATIONS = 64  # kernels look the masks of longer formulas up instead of evaluating them
LOG2E = math.log2(math.e)
M_INIT = MASKED / 2  # initial running maximum: masked scores lie so far below it that their p is 0


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Static parameters of one attention."""

    pattern: Pattern | None  # evaluated in partial tiles; None if kernels look masks up
    t: int  # queries, without padding
    s: int  # keys, without padding
    tile: tuple[int, int]  # queries and keys per tile
    group_size: int  # query heads per key/value head
    scale: float  # factor on q·k
    softcap: float | None
    interpret: bool
    cached_masks: tuple[tuple[int, int], ...]  # as in `lists.Plan`
    chunk: int = 0  # keys per chunk of a choice, see `choice`


class Inputs(NamedTuple):
    """Arrays of one attention, padded to whole tiles. Heads precede positions."""

    q: Float[Array, "b h t d"]
    k: Float[Array, "b g s d"]
    v: Float[Array, "b g s e"]
    sink: Float[Array, " h"] | None
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None
    bits: tuple[Array, ...] | None  # masks of tiles, packed by `Backend.pack_masks`
    choice: Choice | None = None  # blocks that queries choose


class Residuals(NamedTuple):
    """What the backward pass reads besides the inputs."""

    do: Float[Array, "b h t e"]
    lse: Float[Array, "b h t"]
    delta: Float[Array, "b h t"]


@dataclasses.dataclass(frozen=True)
class Backend:
    """Kernels of one kind of device. Each computes one slice; heads and rows of its results are those of the slice.

    Attributes:
      forward: Computes the output and its log-sum-exp.
      dq: Computes the gradient of q.
      dkv: Computes the gradients of k and v.
      pack_masks: Packs masks, bool [distinct, queries, keys], for the kernels.
      chunks: Keys per chunk of a choice that the kernels support, descending; see `choice`.
      operations: Primitives that a pattern's formula may consist of; None for any.
      max_entries: Maximum number of list entries per launch, halved if masks are looked up; None for no limit.
      max_cached_masks: Number of distinct masks that a kernel can compute once and cache.
    """

    forward: Callable[[KernelConfig, KernelSlice, TileSchedule, Inputs], tuple[Array, Array]]
    dq: Callable[[KernelConfig, KernelSlice, TileSchedule, Inputs, Residuals], Array]
    dkv: Callable[[KernelConfig, KernelSlice, TileSchedule, Inputs, Residuals], tuple[Array, Array]]
    pack_masks: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    chunks: tuple[int, ...]
    operations: frozenset[str] | None = None
    max_entries: int | None = None
    max_cached_masks: int = 0


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why no backend can serve the call, or None."""
    width = max(call.q.shape[-1], call.v.shape[-1])
    reasons = (
        (width > MAX_HEAD_WIDTH, f"head width {width} exceeds {MAX_HEAD_WIDTH}"),
        (call.alibi_slopes is not None, "ALiBi is not supported"),
        (call.pattern.repeats, "keys with multiplicity above one are not supported"),
        (call.shard_of is not None, "queries of a shard that chose their keys are not supported"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def attend_lists(
    backend: Backend, call: AttentionCall, tile: tuple[int, int], shards: ShardedTiles | None = None
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Computes attention in the kernels of a backend.

    Args:
      backend: The kernels.
      call: The call to compute.
      tile: Queries and keys per tile.
      shards: The live tiles of each shard of a sequence, if the arrays are those of a shard; in whole tiles.

    Returns:
      The output in the dtype of q, and the log-sum-exp in float32.
    """
    t, s, group_size = call.q.shape[1], call.k.shape[1], call.q.shape[2] // call.k.shape[2]
    plan, chunk, choice = _plan(backend, call, tile) if shards is None else _plan_shard(backend, call, shards)
    formula = call.pattern if plan.bits is None else None
    config = KernelConfig(
        formula, t, s, tile, group_size, call.scale, call.softcap, call.interpret, plan.cached_masks, chunk
    )
    q, k, v = (
        pad_to_multiple(jnp.moveaxis(x, 2, 1), side, 2)
        for x, side in ((call.q, tile[0]), (call.k, tile[1]), (call.v, tile[1]))
    )
    sink = None if call.sink_logits is None else call.sink_logits.astype(jnp.float32)
    segments = None
    if call.segments is not None:
        segments = tuple(
            pad_to_multiple(x.astype(jnp.int32), side, 1) for x, side in zip(call.segments, tile, strict=True)
        )
    bits = None if plan.bits is None else tuple(map(jnp.asarray, backend.pack_masks(plan.bits)))
    launches = plan.rows, plan.columns
    slices, schedules = zip(*(zip(*pairs, strict=True) for pairs in launches), strict=True)
    out, lse = _attend(backend, config, slices, schedules, Inputs(q, k, v, sink, segments, bits, choice))
    return jnp.moveaxis(out[:, :, :t], 1, 2), jnp.moveaxis(lse[:, :, :t], 1, 2)


def _plan(backend: Backend, call: AttentionCall, tile: tuple[int, int]) -> tuple[Plan, int, Choice | None]:
    """The launches for the pattern, restricted to what the selection chooses; keys per chunk; and the choice."""
    pattern, (b, t, h, _), (_, s, g, _), selection = call.pattern, call.q.shape, call.k.shape, call.selection
    evaluated, lists = has_formula(pattern, t, s, backend.operations), 1
    chunk, choice, cached = 0, None, backend.max_cached_masks
    if selection is not None:
        lists, chunk = b * selection.groups.shape[1], choose_chunk(selection.blocks, backend.chunks, tile[1])
        choice, kinds = pack_choice(selection, tile, chunk)
        if choice.words.shape[3] > tile[1] // chunk:  # a tile that the pattern fills may be PARTIAL: it has no mask
            cached = 0
    entries = backend.max_entries and backend.max_entries // (lists if evaluated else 2 * lists)
    plan = plan_pattern(pattern, t, s, tile, (h, g), evaluated, entries, cached)
    return plan if selection is None else restrict_plan(plan, kinds, (h, g)), chunk, choice


def _plan_shard(backend: Backend, call: AttentionCall, shards: ShardedTiles) -> tuple[Plan, int, None]:
    """The launches of this shard. They look their masks up: a formula would need the positions in the sequence."""
    heads, entries = (call.q.shape[2], call.k.shape[2]), backend.max_entries and backend.max_entries // 2
    return take_shard(plan_shards(call.pattern, shards, heads, entries), shard_index()), 0, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(backend, config, slices, schedules, inputs):
    """The padded output [b,h,t,e], in the dtype of q, and lse [b,h,t]."""
    launches = zip(slices[0], schedules[0], strict=True)
    results = [backend.forward(config, *launch, inputs) for launch in launches]
    return _join_slices(slices[0], results)


def _attend_forward(backend, config, slices, schedules, inputs):
    out, lse = name_arrays(_attend(backend, config, slices, schedules, inputs), MIXED)
    return (out, lse), (schedules, inputs, out, lse)


def _attend_backward(backend, config, slices, saved, cotangents):
    schedules, inputs, out, lse = saved
    do, dlse = cotangents
    bad = jnp.isnan(out).any(axis=-1)  # rows of NaN, which have no gradient; see `softmax.confine_nan`
    do, out = (jnp.where(bad[..., None], 0, x) for x in (do, out))
    dlse, lse = jnp.where(bad, 0, dlse), jnp.where(bad, -MASKED, lse)
    inputs = inputs._replace(q=zero_nan(inputs.q), k=zero_nan(inputs.k))
    delta = (do.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - dlse  # Algorithm 2, line 4
    # All scores of a row without keys are masked: p is 0 for any finite lse.
    residuals = Residuals(do.astype(inputs.q.dtype), jnp.where(jnp.isfinite(lse), lse, 0.0), delta)
    rows, columns = (zip(*launches, strict=True) for launches in zip(slices, schedules, strict=True))
    (dq,) = _join_slices(slices[0], [(backend.dq(config, *launch, inputs, residuals),) for launch in rows])
    dk, dv = _join_slices(slices[1], [backend.dkv(config, *launch, inputs, residuals) for launch in columns])
    sink, dsink = inputs.sink, None
    if sink is not None:  # a sink is a key with a score but no value: ds = p * (0 - delta)
        dsink = -(jnp.exp(sink[:, None] - lse) * delta)[..., : config.t].sum(axis=(0, 2))
    return None, Inputs(dq, dk, dv, dsink, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def estimate_cost(
    config: KernelConfig, kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs, width: int, by_column: bool
) -> pl.CostEstimate:
    """The work of a launch, for the compiler and for `sparsejax plan`: an upper bound where lists follow from data.

    Args:
      config: Static parameters.
      kernel_slice: What the launch computes.
      schedule: Its lists.
      inputs: The arrays.
      width: Sum of the widths over which, or to which, the products of a pair of a query and a key are.
      by_column: Whether rows of the lists are key tiles.
    """
    (rows, columns), entries = reversed(config.tile) if by_column else config.tile, schedule.lists.rows.shape[1]
    launches, features = inputs.q.shape[0] * len(kernel_slice.heads), inputs.q.shape[-1] + inputs.v.shape[-1]
    moved = entries * columns + 2 * kernel_slice.rows * rows  # each entry reads a tile, each row reads and writes one
    pairs = launches * entries * rows * columns
    return pl.CostEstimate(
        flops=2 * pairs * width,
        transcendentals=pairs,
        bytes_accessed=launches * moved * features * inputs.q.dtype.itemsize,
    )


def _join_slices(slices: Sequence[KernelSlice], results: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Joins the arrays [b, heads, rows, ...] of all slices into arrays of all heads and rows."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, kernel_slice in enumerate(slices):
        groups.setdefault(kernel_slice.heads, []).append(i)
    order = np.argsort([head for heads in groups for head in heads])
    joined = []
    for arrays in zip(*results, strict=True):
        by_start = (sorted(group, key=lambda i: slices[i].start) for group in groups.values())
        heads = _concatenate([_concatenate([arrays[i] for i in group], 2) for group in by_start], 1)
        joined.append(heads if (np.diff(order) == 1).all() else heads[:, order])
    return tuple(joined)


def _concatenate(arrays: list[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def segment_ranges(
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]], tile: tuple[int, int]
) -> list[tuple[Int[Array, "b _"], Int[Array, "b _"]]]:
    """The smallest and the largest segment id per query tile, and per key tile; each [b, tiles]."""
    tiles = (x.reshape(len(x), -1, side) for x, side in zip(segments, tile, strict=True))
    return [(x.min(axis=-1), x.max(axis=-1)) for x in tiles]


def unit_scores(config: KernelConfig, qk: Array) -> Array:
    """Scores divided by `score_unit`: the products q·k themselves, or the tanh of a softcap."""
    if config.softcap is not None:
        return jnp.tanh(qk * (config.scale / config.softcap))
    return qk if config.scale > 0 else qk * math.copysign(config.scale != 0, config.scale)


def score_unit(config: KernelConfig) -> float:
    """Factor from `unit_scores` to scores. Kernels apply it after subtracting the maximum, which is then exact."""
    return config.softcap or abs(config.scale) or 1.0


def has_formula(pattern: Pattern, t: int, s: int, operations: frozenset[str] | None = None) -> bool:
    """Whether kernels can evaluate the pattern: it is the same for all heads and consists of few operations.

    Args:
      pattern: The pattern.
      t: Number of queries.
      s: Number of keys.
      operations: Primitives that the device supports; None for all.
    """
    if pattern.heads is not None:
        return False
    position = jax.ShapeDtypeStruct((), jnp.int32)
    formula = jax.make_jaxpr(lambda q, k: pattern.allows(q, k, t, s))(position, position).jaxpr
    return len(formula.eqns) <= MAX_FORMULA_OPERATIONS and (operations is None or _primitives(formula) <= operations)


def _primitives(jaxpr) -> set[str]:
    names: set[str] = set()
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        names |= {equation.primitive.name} if inner is None else _primitives(inner.jaxpr)
    return names
