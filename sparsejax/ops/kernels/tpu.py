"""Attention over tile lists on TPUs: Mosaic kernels that visit live tiles only.

The grid has one step per list entry. Entries are packed into one 32-bit word each and prefetched into scalar memory
(`PrefetchScalarGridSpec`), where the index maps read which blocks of the arrays a step needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from sparsejax.errors import InputError
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.chunks import pad_to_multiple
from sparsejax.ops.device import device_kind
from sparsejax.ops.kernels import flash
from sparsejax.ops.kernels.choice import WORD
from sparsejax.ops.kernels.flash import LOG2E, M_INIT, Backend, Inputs, KernelConfig, Residuals, score_unit, unit_scores
from sparsejax.ops.kernels.lists import (
    CHOSEN,
    FULL,
    PARTIAL,
    KernelSlice,
    ShardedTiles,
    TileLists,
    TileSchedule,
    mark_ends,
    pack_words,
)
from sparsejax.ops.kernels.mesh import run_on_mesh
from sparsejax.ops.softmax import MASKED
from sparsejax.patterns import Pattern

LANES = 128
TILE_SIDES = (128, 256, 512)
# Fixed cost of a grid step, in pairs: 0.35 us, where a tile of 512 x 512 takes 1.3 us (v5e). Modelled, not measured.
STEP_COST = 70_000
MAX_ENTRIES = 2**17  # per launch, mask indices included: half of the 1 MiB of scalar memory
MAX_CACHED_MASKS = 4  # 1 MiB of vector memory each, for the largest tile
CHUNKS = 512, 256, 128  # multiples of the number of lanes
NN, NT, TN = ((((x,), (y,)), ((), ())) for x, y in ((1, 0), (1, 1), (0, 0)))  # dot dimensions; T: transposed operand


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot serve the call, or None."""
    kind = None if call.interpret else device_kind()
    reasons = (
        (
            not call.interpret and not _is_supported(kind),
            f"device kind {kind!r} is not a TPU v5e or newer; interpret=True interprets the kernels",
        ),
        (call.dtype != jnp.float32, f"kernels compute in float32, not in {call.dtype}"),
    )
    return next((reason for applies, reason in reasons if applies), None) or flash.unsupported_reason(call)


def run(
    call: AttentionCall, tile: tuple[int, int] | None = None, shards: ShardedTiles | None = None
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Returns the output in the dtype of q, and the log-sum-exp in float32.

    Args:
      call: The call to compute.
      tile: Queries and keys per tile, multiples of 128; defaults to `choose_tile`.
      shards: See `flash.attend_lists`.
    """
    return run_on_mesh(functools.partial(_run_locally, tile=tile, shards=shards), call)


def _run_locally(call: AttentionCall, tile: tuple[int, int] | None, shards: ShardedTiles | None) -> tuple[Array, Array]:
    tile = tile or choose_tile(call.pattern, call.q.shape[1], call.k.shape[1])
    if call.q.dtype != jnp.float16:
        return flash.attend_lists(BACKEND, call, tile, shards)
    wide = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}  # TPUs have no float16
    out, lse = flash.attend_lists(BACKEND, dataclasses.replace(call, **wide), tile, shards)
    return out.astype(jnp.float16), lse


def choose_tile(pattern: Pattern, t: int, s: int, sides: Sequence[int] = TILE_SIDES) -> tuple[int, int]:
    """The square tile of least modelled cost: small tiles cover fewer dead pairs, large tiles take fewer steps."""
    longest = max(TILE_SIDES[0], 2 ** math.ceil(math.log2(max(t, s, 1))))
    cost = {n: pattern.tiles(t, s, (n, n))[0] * (n * n + STEP_COST) for n in sides if n <= longest}
    best = min(cost, key=cost.get)
    return best, best


def _is_supported(kind: str) -> bool:
    return kind.startswith("TPU") and not kind.startswith(("TPU v2", "TPU v3", "TPU v4"))


# The lists in scalar memory.


@dataclasses.dataclass(frozen=True)
class PackedEntry:
    """Bit layout of a list entry, from the lowest bits: kind (2), first (1), last (1), mask, head, column, row."""

    mask_bits: int
    head_bits: int
    column_bits: int

    @classmethod
    def build(cls, config: KernelConfig, rows: int, columns: int) -> PackedEntry:
        """The layout for lists of `rows` x `columns` tiles.

        Raises:
          InputError: An entry does not fit into 32 bits.
        """
        sizes = len(config.cached_masks), config.group_size, columns, rows
        mask, head, column, row = (max(n - 1, 0).bit_length() for n in sizes)
        if 4 + mask + head + column + row > 32:
            problem = f"{rows} x {columns} tiles of {config.tile} do not fit into 32-bit list entries; use larger tiles"
            raise InputError("tile", problem)
        return cls(mask, head, column)

    def pack(self, lists: TileLists) -> Array | np.ndarray:
        first, last = mark_ends(lists.rows)
        packed = (lists.rows << self.column_bits | lists.columns) << self.head_bits | lists.heads
        packed = packed << self.mask_bits | lists.masks if self.mask_bits else packed
        return packed << 4 | last * 8 | first * 4 | lists.kinds

    def row(self, packed):
        return lax.shift_right_logical(packed, 4 + self.mask_bits + self.head_bits + self.column_bits)

    def column(self, packed):
        return lax.shift_right_logical(packed, 4 + self.mask_bits + self.head_bits) & (1 << self.column_bits) - 1

    def head(self, packed):
        return lax.shift_right_logical(packed, 4 + self.mask_bits) & (1 << self.head_bits) - 1

    def mask(self, packed):
        return lax.shift_right_logical(packed, 4) & (1 << self.mask_bits) - 1


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of one launch: sequences x heads of the slice x entries of the longest list."""

    config: KernelConfig
    kernel_slice: KernelSlice
    layout: PackedEntry
    entries: int
    lists_per_sequence: bool
    by_column: bool  # rows of the lists are key tiles: for dk and dv
    tiles: tuple[int, int]  # number of query tiles and of key tiles

    @classmethod
    def build(
        cls, config: KernelConfig, kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs, by_column: bool
    ) -> Grid:
        tiles = inputs.q.shape[2] // config.tile[0], inputs.k.shape[2] // config.tile[1]
        layout = PackedEntry.build(config, kernel_slice.rows, tiles[0] if by_column else tiles[1])
        entries, per_sequence = schedule.lists.rows.shape[1], schedule.list_ids.shape[0] > 1
        return cls(config, kernel_slice, layout, entries, per_sequence, by_column, tiles)

    def scalars(self, schedule: TileSchedule, inputs: Inputs) -> tuple[Array, ...]:
        """The arrays in scalar memory, int32 [n] each, in the order in which `step` takes them."""
        ranges = np.zeros(1)
        if inputs.segments is not None:
            ends = flash.segment_ranges(inputs.segments, self.config.tile)
            ranges = jnp.concatenate([x.ravel() for pair in ends for x in pair])
        masks = np.zeros(1) if inputs.bits is None else schedule.lists.masks
        heads = np.array(self.kernel_slice.heads)
        arrays = self.layout.pack(schedule.lists), schedule.list_ids, heads, masks, ranges
        return tuple(jnp.asarray(x, jnp.int32).ravel() for x in arrays)

    def step(self, b, local_head, entry, lists, list_ids, heads, masks, ranges) -> GridStep:
        """The step at one point of the grid. The last five arguments are refs in scalar memory."""
        list_id = list_ids[b * len(self.kernel_slice.heads) + local_head if self.lists_per_sequence else local_head]
        index = list_id * self.entries + entry
        packed = lists[index]
        row, column = self.kernel_slice.start + self.layout.row(packed), self.layout.column(packed)
        head, tiles = heads[local_head], (column, row) if self.by_column else (row, column)
        head = head * self.config.group_size + self.layout.head(packed) if self.by_column else head
        return GridStep(self, b, local_head, entry, head, *tiles, packed, index, masks, ranges)

    def block(self, shape: tuple[int | None, ...], index: Callable[[GridStep], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *ids: index(self.step(*ids)))


@dataclasses.dataclass(frozen=True)
class GridStep:
    """One step of the grid."""

    grid: Grid
    b: Any
    local_head: Any  # index of the head in the slice
    entry: Any  # index of the entry in its list
    head: Any  # query head
    q_tile: Any
    k_tile: Any
    packed: Any  # the packed entry
    index: Any  # index of the entry among those of all lists
    masks: Any  # ref: mask indices of all entries
    ranges: Any  # ref: smallest and largest segment ids of query tiles, then of key tiles

    @property
    def kind(self):
        return self.packed & 3

    @property
    def first(self):
        return (self.packed & 4) != 0

    @property
    def last(self):
        return ((self.packed & 8) != 0) | (self.entry == pl.num_programs(2) - 1)

    def segments_overlap(self):
        """Whether the ranges of segment ids of the tile's queries and keys overlap."""
        (rows, columns), sequences = self.grid.tiles, self.ranges.shape[0] // 2 // sum(self.grid.tiles)
        q, k = self.b * rows + self.q_tile, 2 * sequences * rows + self.b * columns + self.k_tile
        low, high = self.ranges[q], self.ranges[sequences * rows + q]
        return (low <= self.ranges[sequences * columns + k]) & (self.ranges[k] <= high)


# Stages of the kernels. The scores of a tile are [queries, keys] in the forward pass and [keys, queries] in the
# backward passes (`transposed`), so that lse and delta are needed as rows and never as columns.


class Refs(NamedTuple):
    """What a kernel reads: the blocks of its inputs at a step, and its scratch. None for what it does not have."""

    q: Any
    k: Any
    v: Any
    sink: Any = None
    do: Any = None
    lse: Any = None
    delta: Any = None
    q_ids: Any = None
    k_ids: Any = None
    bits: Any = None
    words: Any = None
    numbers: Any = None
    cached_masks: Any = None


def _scores(config: KernelConfig, q: Array, k: Array, transposed: bool) -> Array:
    """Algorithm 1, line 8; Algorithm 2, line 10."""
    return unit_scores(config, _dot(k, q, NT) if transposed else _dot(q, k, NT))


def _mask(step: GridStep, refs: Refs, s: Array, kind: int, transposed: bool) -> Array:
    """Sets the scores of pairs that are not allowed to MASKED."""
    allowed = []
    if kind == PARTIAL and refs.bits is not None:
        allowed.append(_unpack_mask(refs.bits[...], s.shape))
    elif kind == PARTIAL and refs.cached_masks is not None:
        allowed.append(refs.cached_masks[step.grid.layout.mask(step.packed)] == 0)  # s + mask would keep NaN
    elif kind == PARTIAL:
        allowed.append(_evaluate_pattern(step.grid.config, step.q_tile, step.k_tile, transposed))
    if kind != FULL and refs.words is not None:
        allowed.append(_unpack_choice(step.grid.config.chunk, refs, kind, transposed))
    if refs.q_ids is not None:
        q, k = refs.q_ids[...], refs.k_ids[...]
        allowed.append(q == k.T if transposed else k == q.T)
    return jnp.where(functools.reduce(jnp.logical_and, allowed), s, MASKED) if allowed else s


def _cache_masks(step: GridStep, refs: Refs, transposed: bool) -> None:
    """Computes the distinct masks at the first step of a head, as terms of the scores: 0 or MASKED."""
    if refs.cached_masks is None:
        return
    config = step.grid.config

    @pl.when(step.entry == 0)
    def compute():
        for i, tiles in enumerate(config.cached_masks):
            refs.cached_masks[i] = jnp.where(_evaluate_pattern(config, *tiles, transposed), 0.0, MASKED)


def _evaluate_pattern(config: KernelConfig, q_tile: Any, k_tile: Any, transposed: bool) -> Array:
    """The mask of a tile by the pattern's formula."""
    (height, width), (q_axis, k_axis) = config.tile, (1, 0) if transposed else (0, 1)
    q = q_tile * height + lax.broadcasted_iota(jnp.int32, _along_axis(height, q_axis), q_axis)
    k = k_tile * width + lax.broadcasted_iota(jnp.int32, _along_axis(width, k_axis), k_axis)
    allowed = config.pattern.allows(q, k, config.t, config.s)
    return allowed & (k < config.s) if config.s % width else allowed


def _along_axis(size: int, axis: int) -> tuple[int, int]:
    return (size, 1) if axis == 0 else (1, size)


def _unpack_mask(words: Array, shape: tuple[int, int]) -> Array:
    """Inverse of `pack_words` for one mask."""
    bit = 1 << (lax.broadcasted_iota(jnp.int32, shape, 0) & 31)
    return jnp.repeat(words, 32, axis=0) & bit != 0


def _unpack_choice(chunk: int, refs: Refs, kind: int, transposed: bool) -> Array:
    """The mask of a tile by the blocks that its queries chose."""
    numbers = refs.numbers[...]
    if transposed:
        masks = [_test_bits(refs, first, chunk, kind) for first in range(0, numbers.shape[1], chunk)]
        return jnp.concatenate(masks, axis=0) != 0
    groups, words = [numbers[:, i : i + LANES] for i in range(0, numbers.shape[1], LANES)], []
    for i, group in enumerate(groups):
        of_block = refs.words[i * LANES // chunk]
        words.append(jnp.take_along_axis(of_block, jnp.broadcast_to(group, of_block.shape), axis=1))
    words = jnp.concatenate(words, axis=1)
    return _unpack_mask(words, (32 * len(words), numbers.shape[1]))


def _test_bits(refs: Refs, first: int, chunk: int, kind: int) -> Array:
    """Nonzero where a query [1, queries] chose the block of a key [keys, 1] of the chunk from key `first`."""
    (words, _), (_, keys), numbers = refs.words.shape, refs.numbers.shape, refs.numbers[:, first : first + chunk]
    bits, parts = 1 << (numbers & (WORD - 1)), words * chunk // keys
    used = range(1 if kind == CHOSEN else parts)
    index = first // chunk * parts
    by_part = (bits if len(used) == 1 else jnp.where(numbers // WORD == part, bits, 0) for part in used)
    hits = [refs.words[index + part : index + part + 1] & bit.T for part, bit in enumerate(by_part)]
    return functools.reduce(jnp.bitwise_or, hits)


def pack_masks(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packs masks [distinct, queries, keys] for the forward pass and, transposed, for the backward passes."""
    return pack_words(masks), pack_words(masks.swapaxes(1, 2))


def _dot(x: Array, y: Array, dims) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _broadcast_lanes(x: Array, size: int) -> Array:
    """Widens [rows, 128], constant within a row, to [rows, size]."""
    return jnp.tile(x, (1, size // LANES)) if size % LANES == 0 else x[:, :size]


def _visit_tile(step: GridStep, refs: Refs, accumulate: Callable[[int], None]) -> None:
    """Calls `accumulate(kind)` if the tile is live."""
    live = step.segments_overlap() if refs.q_ids is not None else True
    for kind in (FULL, PARTIAL) if refs.words is None else (FULL, CHOSEN, PARTIAL):
        pl.when((step.kind == kind) & live)(functools.partial(accumulate, kind))


# The kernels. Outputs and accumulators are refs.


def _forward_kernel(step: GridStep, refs: Refs, out, lse, m_ref, l_ref, acc):
    """FlashAttention-2, Algorithm 1; m and l are replicated along the lanes."""
    unit = score_unit(step.grid.config)
    _cache_masks(step, refs, transposed=False)

    @pl.when(step.first)
    def initialize():  # line 5, with the sink as the first score
        sink = None if refs.sink is None else refs.sink[step.head] / unit
        low = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        m_ref[...] = low if sink is None else jnp.maximum(low, sink)
        l_ref[...] = jnp.zeros_like(l_ref) if sink is None else jnp.exp2((sink - m_ref[...]) * (unit * LOG2E))
        acc[...] = jnp.zeros_like(acc)

    def accumulate(kind):  # lines 8 to 10
        s = _scores(step.grid.config, refs.q[...], refs.k[...], transposed=False)
        s = _mask(step, refs, s, kind, transposed=False)
        m_prev = m_ref[...]
        m = jnp.maximum(m_prev, s.max(axis=1, keepdims=True))
        p = jnp.exp2((s - _broadcast_lanes(m, s.shape[1])) * (unit * LOG2E))
        alpha = jnp.exp2((m_prev - m) * (unit * LOG2E))
        m_ref[...] = m
        l_ref[...] = alpha * l_ref[...] + p.sum(axis=1, keepdims=True)
        v = refs.v[...]
        acc[...] = acc[...] * _broadcast_lanes(alpha, acc.shape[1]) + _dot(p.astype(v.dtype), v, NN)

    _visit_tile(step, refs, accumulate)

    @pl.when(step.last)
    def finalize():  # lines 12 and 13
        live = l_ref[...] > 0
        safe = jnp.where(live, l_ref[...], 1.0)
        out[...] = (acc[...] * _broadcast_lanes(1 / safe, acc.shape[1])).astype(out.dtype)
        row_lse = jnp.where(live, m_ref[...] * unit + jnp.log(safe), -jnp.inf)
        if refs.sink is not None:  # in a row without keys the lse is the sink itself, to the last bit
            sink = refs.sink[step.head]
            row_lse = jnp.where((m_ref[...] == sink / unit) & (l_ref[...] == 1), sink, row_lse)
        lse[...] = row_lse[:, :1].T


def _differentiate(step: GridStep, refs: Refs, kind: int) -> tuple[Array, Array]:
    """Returns p and the gradient of q·k up to the scale, [keys, queries] (Algorithm 2, lines 10, 11, 13 and 14)."""
    config = step.grid.config
    s = _scores(config, refs.q[...], refs.k[...], transposed=True)
    dtanh = None if config.softcap is None else 1 - s * s
    s = _mask(step, refs, s, kind, transposed=True)
    p = jnp.exp2((s - refs.lse[...] / score_unit(config)) * (score_unit(config) * LOG2E))
    ds = p * (_dot(refs.v[...], refs.do[...], NT) - refs.delta[...])
    return p, ds if dtanh is None else ds * dtanh


def _dq_kernel(step: GridStep, refs: Refs, dq, acc):
    """FlashAttention-2, Algorithm 2, line 15, with the loops exchanged: one row of query tiles at a time."""
    _cache_masks(step, refs, transposed=True)

    @pl.when(step.first)
    def initialize():
        acc[...] = jnp.zeros_like(acc)

    def accumulate(kind):
        _, ds = _differentiate(step, refs, kind)
        k = refs.k[...]
        acc[...] += _dot(ds.astype(k.dtype), k, TN)

    _visit_tile(step, refs, accumulate)

    @pl.when(step.last)
    def finalize():
        dq[...] = (acc[...] * step.grid.config.scale).astype(dq.dtype)


def _dkv_kernel(step: GridStep, refs: Refs, dk, dv, dk_acc, dv_acc):
    """FlashAttention-2, Algorithm 2, lines 12 and 16."""
    _cache_masks(step, refs, transposed=True)

    @pl.when(step.first)
    def initialize():
        dk_acc[...], dv_acc[...] = jnp.zeros_like(dk_acc), jnp.zeros_like(dv_acc)

    def accumulate(kind):
        p, ds = _differentiate(step, refs, kind)
        q, do = refs.q[...], refs.do[...]
        dv_acc[...] += _dot(p.astype(do.dtype), do, NN)
        dk_acc[...] += _dot(ds.astype(q.dtype), q, NN)

    _visit_tile(step, refs, accumulate)

    @pl.when(step.last)
    def finalize():
        dk[...] = (dk_acc[...] * step.grid.config.scale).astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)


# The launches.


class Operand(NamedTuple):
    """An input, and the block of it that a step reads."""

    array: Array
    block: pl.BlockSpec


class Output(NamedTuple):
    """An output, and the block of it that a step writes."""

    shape: tuple[int, ...]
    dtype: Any
    block: pl.BlockSpec


def _forward(
    config: KernelConfig, kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs
) -> tuple[Array, Array]:
    grid = Grid.build(config, kernel_slice, schedule, inputs, by_column=False)
    (height, _), (b, _, _, e) = config.tile, inputs.v.shape
    heads, rows = len(kernel_slice.heads), kernel_slice.rows * height
    outputs = [
        Output((b, heads, rows, e), inputs.q.dtype, grid.block((None, None, height, e), _row_block)),
        Output((b, heads, 1, rows), jnp.float32, grid.block((None, None, 1, height), _lse_block)),
    ]
    scratch = [(height, LANES), (height, LANES), (height, e)]
    out, lse = _launch(_forward_kernel, "attend_forward", grid, schedule, inputs, None, outputs, scratch)
    return out, lse[:, :, 0]


def _dq(
    config: KernelConfig, kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs, residuals: Residuals
) -> Array:
    grid = Grid.build(config, kernel_slice, schedule, inputs, by_column=False)
    (height, _), (b, _, _, d) = config.tile, inputs.q.shape
    shape = b, len(kernel_slice.heads), kernel_slice.rows * height, d
    outputs = [Output(shape, inputs.q.dtype, grid.block((None, None, height, d), _row_block))]
    (dq,) = _launch(_dq_kernel, "attend_dq", grid, schedule, inputs, residuals, outputs, [(height, d)])
    return dq


def _dkv(
    config: KernelConfig, kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs, residuals: Residuals
) -> tuple[Array, Array]:
    grid = Grid.build(config, kernel_slice, schedule, inputs, by_column=True)
    (_, width), b, widths = config.tile, inputs.k.shape[0], (inputs.k.shape[-1], inputs.v.shape[-1])
    heads, rows = len(kernel_slice.heads), kernel_slice.rows * width
    outputs = [
        Output((b, heads, rows, n), inputs.k.dtype, grid.block((None, None, width, n), _row_block)) for n in widths
    ]
    scratch = [(width, n) for n in widths]
    dk, dv = _launch(_dkv_kernel, "attend_dkv", grid, schedule, inputs, residuals, outputs, scratch)
    return dk, dv


def _row_block(step: GridStep) -> tuple:
    """Block of an output [b, heads, rows, width] of a slice."""
    row = step.k_tile if step.grid.by_column else step.q_tile
    return step.b, step.local_head, row - step.grid.kernel_slice.start, 0


def _lse_block(step: GridStep) -> tuple:
    return step.b, step.local_head, 0, step.q_tile - step.grid.kernel_slice.start


def _launch(
    kernel: Callable,
    name: str,
    grid: Grid,
    schedule: TileSchedule,
    inputs: Inputs,
    residuals: Residuals | None,
    outputs: Sequence[Output],
    scratch: Sequence[tuple[int, ...]],
) -> Sequence[Array]:
    """Runs a kernel over the grid. `scratch`: shapes of its float32 accumulators."""
    operands = _operands(grid, inputs, residuals)
    names = [name for name, operand in operands._asdict().items() if operand is not None]
    present = [getattr(operands, name) for name in names]
    scalars, steps = grid.scalars(schedule, inputs), grid.entries if schedule.steps is None else schedule.steps
    d, e = inputs.q.shape[-1], inputs.v.shape[-1]
    width = d + e if residuals is None else 2 * (d + e) if grid.by_column else 2 * d + e
    if cached := len(grid.config.cached_masks):
        names.append("cached_masks")
        scratch = [(cached, *grid.config.tile[:: 1 if residuals is None else -1]), *scratch]

    def body(*refs):
        step = grid.step(*(pl.program_id(i) for i in range(3)), *refs[: len(scalars)])
        blocks, refs = refs[len(scalars) :][: len(present)], refs[len(scalars) + len(present) :]
        outs, masks, accumulators = refs[: len(outputs)], (), refs[len(outputs) :]
        if cached:
            masks, accumulators = accumulators[:1], accumulators[1:]
        kernel(step, Refs(**dict(zip(names, (*blocks, *masks), strict=True))), *outs, *accumulators)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(inputs.q.shape[0], len(grid.kernel_slice.heads), steps),
            in_specs=[operand.block for operand in present],
            out_specs=[output.block for output in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[shape_like(inputs.q, output.shape, output.dtype) for output in outputs],
        cost_estimate=flash.estimate_cost(grid.config, grid.kernel_slice, schedule, inputs, width, grid.by_column),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=grid.config.interpret,
        name=name,
    )(*scalars, *(operand.array for operand in present))


def _operands(grid: Grid, inputs: Inputs, residuals: Residuals | None) -> Refs:
    """The inputs of a kernel as `Operand`s."""
    (height, width), group_size = grid.config.tile, grid.config.group_size

    def of_queries(x):
        block = grid.block((None, None, height, x.shape[-1]), lambda step: (step.b, step.head, step.q_tile, 0))
        return Operand(x, block)

    def of_keys(x):
        shape = None, None, width, x.shape[-1]
        return Operand(x, grid.block(shape, lambda step: (step.b, step.head // group_size, step.k_tile, 0)))

    def row_vector(x):
        block = grid.block((None, None, 1, height), lambda step: (step.b, step.head, 0, step.q_tile))
        return Operand(x[:, :, None], block)

    refs = Refs(of_queries(inputs.q), of_keys(inputs.k), of_keys(inputs.v))
    if residuals is None and inputs.sink is not None:
        refs = refs._replace(sink=Operand(inputs.sink, pl.BlockSpec(memory_space=pltpu.SMEM)))
    if residuals is not None:
        do, lse, delta = residuals
        refs = refs._replace(do=of_queries(do), lse=row_vector(lse), delta=row_vector(delta))
    if inputs.segments is not None:
        q_ids, k_ids = (x[:, None] for x in inputs.segments)
        refs = refs._replace(
            q_ids=Operand(q_ids, grid.block((None, 1, height), lambda step: (step.b, 0, step.q_tile))),
            k_ids=Operand(k_ids, grid.block((None, 1, width), lambda step: (step.b, 0, step.k_tile))),
        )
    if inputs.bits is not None:
        bits = inputs.bits[0 if residuals is None else 1]
        block = grid.block((None, *bits.shape[1:]), lambda step: (step.masks[step.index], 0, 0))
        refs = refs._replace(bits=Operand(bits, block))
    if inputs.choice is not None:
        (words, numbers), chunks, scopes = inputs.choice, width // grid.config.chunk, inputs.choice.words.shape[1]

        def locate(step):
            return step.b, step.head * scopes // inputs.q.shape[1], step.k_tile

        if residuals is None:
            words = _words_of_blocks(words, height, chunks)
            shape, index = words.shape[4:], lambda step: (*locate(step), step.q_tile, 0, 0)
            block = grid.block((None, None, chunks, None, *shape), index)
        else:
            block = grid.block((None, None, None, words.shape[3], height), lambda step: (*locate(step), 0, step.q_tile))
        of_key = grid.block((None, 1, width), lambda step: (0 if len(numbers) == 1 else step.b, 0, step.k_tile))
        refs = refs._replace(words=Operand(words, block), numbers=Operand(numbers[:, None], of_key))
    return refs


def _words_of_blocks(
    words: Int[Array, "b scopes tiles n t"], height: int, chunks: int
) -> Int[Array, "b scopes chunks rows words lanes"]:
    """Transposes the bits of a choice: one word per block of a chunk and 32 queries."""
    b, scopes, tiles, n, t = words.shape
    words, shifts = words.reshape(b, scopes, tiles * chunks, n // chunks, t // 32, 1, 32), jnp.arange(32)
    bits = (words >> shifts[:, None] & 1) << shifts
    words = jnp.moveaxis(bits.sum(axis=-1, dtype=jnp.int32), 3, 4)
    words = words.reshape(b, scopes, tiles * chunks, t // height, height // 32, -1)
    return pad_to_multiple(words, LANES, 5)


def shape_like(x: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Inside `shard_map`, an output varies over the mesh axes over which `x` varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


BACKEND = Backend(_forward, _dq, _dkv, pack_masks, CHUNKS, max_entries=MAX_ENTRIES, max_cached_masks=MAX_CACHED_MASKS)
