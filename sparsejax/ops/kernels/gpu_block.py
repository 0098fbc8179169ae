"""A thread block on a Hopper GPU: its memory, its loads, and the products of its tensor cores.

A block computes row after row of tiles with warp specialization (FlashAttention-3, arXiv:2407.08608, section 3.1): two
consumer warpgroups hold the accumulators of half a row each in registers; a producer warpgroup loads operands into a
circular buffer in shared memory, several steps ahead, and continues with the next row while this one is computed.
`stationary` operands belong to a row of tiles, `streamed` operands change with every step.

Tensor cores multiply 16-bit numbers. A float32 array is the sum of three bfloat16 arrays, its limbs, and a product is
the sum of the six products of limbs that contribute to float32 (arXiv:1904.06376). A block then computes half a row.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sparsejax.ops.device import core_count
from sparsejax.ops.kernels.choice import Choice
from sparsejax.ops.kernels.flash import Inputs, KernelConfig
from sparsejax.ops.kernels.lists import KernelSlice, TileSchedule

TILE_SIDE = 128
WARPGROUPS = 2  # consumers that share a row of tiles
WARPGROUP_ROWS = TILE_SIDE // WARPGROUPS  # accumulators of more rows do not fit into the registers of a warpgroup
LIMBS = 3  # bfloat16 numbers per float32 number
NARROW_WIDTH = 128  # accumulators of wider heads leave few registers
MAX_STAGES = 3  # steps loaded ahead
SHARED_BYTES = 227 * 1024 - 3072  # per block, less what barriers and row vectors take
REDUCTION_BYTES = 1024  # needed in addition for the maxima and sums of rows
H100_CORES = 132  # multiprocessors, assumed if the device does not report them
INTERPRETED_CORES = 2  # few enough for each to compute several rows


class Operand(enum.StrEnum):
    """A matrix that the products multiply."""

    Q = "q"
    K = "k"
    V = "v"
    DO = "do"


class Plane(NamedTuple):
    """One limb of a streamed operand: what one slot of the circular buffer holds."""

    operand: Operand
    limb: int


class Table(NamedTuple):
    """Tile lists in global memory, flattened."""

    list_ids: Any  # [#b, heads]
    rows: Any  # [lists, rows, 4]: row, first entry, number of full tiles, number of partial tiles
    columns: Any  # [lists, n]
    heads: Any  # [lists, n]
    masks: Any  # [lists, n]
    choices: Any  # [lists, n]: index of the words of a tile; None without a choice


class RowVectors(NamedTuple):
    """Vectors [b, h, t] of the backward pass in global memory, or those of a step's columns in shared memory."""

    lse: Any  # divided by `score_unit`
    delta: Any


class Sink(NamedTuple):
    """The sinks [h] of the forward pass, and the m and l of rows that have attended to nothing else."""

    logit: Any
    m: Any
    l: Any


class GlobalInputs(NamedTuple):
    """Inputs of a kernel in global memory; None for those that it does not have."""

    table: Table
    slice_heads: Any  # the heads of the slice
    operands: dict[Operand, Any]  # [limbs, b, heads, positions, width] each
    vectors: RowVectors | None
    sink: Sink | None
    row_ids: Any  # segment ids [b, positions]
    column_ids: Any
    iota: Any
    bits: Any
    choice: Choice | None  # words [tiles of all sequences and scopes, n, t]


class Outputs(NamedTuple):
    """Outputs of a kernel in global memory; None for those that it does not have."""

    out: Any = None
    lse: Any = None
    dq: Any = None
    dk: Any = None
    dv: Any = None


class SharedMemory(NamedTuple):
    """Shared memory and barriers of a block; None for what a kernel does not have.

    Fields are in the order of allocation, on which the assembler's schedule depends.
    """

    factor: Any  # staging of a left factor in interpret mode
    planes_loaded: Any  # barriers
    stationary_loaded: Any
    vectors_loaded: Any
    vectors: RowVectors | None
    stationary: dict[Operand, Any]
    planes: Any  # the circular buffer
    lse: Any  # staging of an output
    ping_pong: Any  # barriers
    planes_consumed: Any
    stationary_consumed: Any
    vectors_consumed: Any


class Memory(NamedTuple):
    """All refs of a kernel."""

    inputs: GlobalInputs
    outputs: Outputs
    shared: SharedMemory


@dataclasses.dataclass(frozen=True)
class Launch:
    """Static parameters of one kernel launch."""

    config: KernelConfig
    kernel_slice: KernelSlice
    stationary: tuple[Operand, ...]  # of which each consumer holds its rows in shared memory
    streamed: tuple[Operand, ...]  # of which each step loads its columns, in this order
    planes: tuple[Plane, ...]  # loaded per step, in this order; in float32 the first operand may come again at the end
    by_column: bool  # rows are key tiles: for dk and dv
    sequences: int
    columns: int  # per step: a tile or a fraction of one
    slots: int  # planes in the circular buffer
    stationary_slots: int  # rows of tiles whose stationary operands fit into shared memory
    width: int  # of heads
    limbs: int  # per array
    warpgroups: int  # consumers per block
    dtype: Any  # of the factors of products
    lists_per_sequence: bool
    few_registers: bool  # heads are wide, or scores need more than a product and a formula
    entries: int  # per list

    @classmethod
    def build(
        cls,
        config: KernelConfig,
        kernel_slice: KernelSlice,
        schedule: TileSchedule,
        inputs: Inputs,
        stationary: tuple[Operand, ...],
        streamed: tuple[Operand, ...],
        reload: bool = True,
        columns: int = 64,
    ) -> Launch:
        """Fits a launch into shared memory and registers.

        `reload`: in float32, load the first streamed operand again at the end of a step instead of keeping it.
        `columns`: per step, if registers suffice.
        """
        sequences, _, _, width = inputs.q.shape
        segments, by_column = inputs.segments is not None, streamed[0] == Operand.Q
        limbs, dtype = (LIMBS, jnp.bfloat16) if inputs.q.dtype == jnp.float32 else (1, inputs.q.dtype)
        masked = segments or inputs.bits is not None or inputs.choice is not None
        few_registers = width > NARROW_WIDTH or config.softcap is not None or masked or limbs > 1
        warpgroups = WARPGROUPS if limbs == 1 else 1  # the limbs of more rows would leave little shared memory
        order = (*streamed, streamed[0]) if reload and limbs > 1 else streamed
        planes = tuple(Plane(operand, limb) for operand in order for limb in range(limbs))
        shared = SHARED_BYTES if len(stationary) > 1 else SHARED_BYTES - REDUCTION_BYTES
        columns = 32 if limbs > 1 and width > NARROW_WIDTH else 64 if few_registers else columns
        rows = shared // (width * jnp.dtype(dtype).itemsize)  # of all operands together
        stationary_rows = len(stationary) * warpgroups * limbs * WARPGROUP_ROWS
        # The stationary operands of the next row are loaded early if that leaves space for two steps.
        stationary_slots = 2 if rows - 2 * stationary_rows >= 2 * len(planes) * columns else 1
        streamed_rows = rows - stationary_slots * stationary_rows
        fitting = range(1, min(streamed_rows // columns, MAX_STAGES * len(planes)) + 1)
        # With several limbs, a plane has the same slot in all steps, which saves a register per plane.
        slots = max(n for n in fitting if limbs == 1 or len(planes) % n == 0)
        operands = stationary, streamed, planes, by_column
        sizes = sequences, columns, slots, stationary_slots, width, limbs, warpgroups
        per_sequence, entries = schedule.list_ids.shape[0] > 1 or segments, schedule.lists.rows.shape[1]
        return cls(config, kernel_slice, *operands, *sizes, dtype, per_sequence, few_registers, entries)

    @property
    def splits(self) -> int:
        """Steps per tile."""
        return TILE_SIDE // self.columns

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows, sequences and heads. A row counts twice if a block computes half of it."""
        return self.kernel_slice.rows * WARPGROUPS // self.warpgroups, self.sequences, len(self.kernel_slice.heads)

    @property
    def blocks(self) -> int:
        cores = INTERPRETED_CORES if self.config.interpret else core_count() or H100_CORES
        return min(cores, math.prod(self.grid))

    def output(self) -> jax.ShapeDtypeStruct:
        """Shape of an output, [limbs, b, heads, positions, width]."""
        heads, positions = len(self.kernel_slice.heads), self.kernel_slice.rows * TILE_SIDE
        return jax.ShapeDtypeStruct((self.limbs, self.sequences, heads, positions, self.width), self.dtype)

    def plane(self, operand: Operand, last: bool = False) -> int:
        """Index of an operand's first plane within a step; `last`: of the second time if it is loaded again."""
        return len(self.planes) - self.limbs if last and self.limbs > 1 else self.planes.index(Plane(operand, 0))

    def shared_memory(self) -> SharedMemory:
        """Types of the scratch."""
        swizzled = min(self.columns, 64)  # columns of a swizzled tile
        transforms = plgpu.TilingTransform((8, swizzled)), plgpu.SwizzleTransform(2 * swizzled)

        def matrices(*shape):
            return plgpu.SMEM(shape, self.dtype, transforms=transforms)

        def barriers(arrivals, slots):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)

        parts, forward = self.warpgroups * self.limbs, len(self.stationary) == 1
        stationary = matrices(self.stationary_slots * parts, WARPGROUP_ROWS, self.width)
        vectors = RowVectors(*(plgpu.SMEM((MAX_STAGES, self.columns), jnp.float32) for _ in RowVectors._fields))
        return SharedMemory(
            stationary=dict.fromkeys(self.stationary, stationary),
            stationary_loaded=barriers(len(self.stationary) * parts, self.stationary_slots),
            stationary_consumed=barriers(self.warpgroups, self.stationary_slots),
            planes=matrices(self.slots, self.columns, self.width),
            planes_loaded=barriers(1, self.slots),
            planes_consumed=barriers(self.warpgroups, self.slots),
            vectors=vectors if self.by_column else None,
            vectors_loaded=barriers(len(vectors), MAX_STAGES) if self.by_column else None,
            vectors_consumed=barriers(self.warpgroups, MAX_STAGES) if self.by_column else None,
            lse=plgpu.SMEM((self.warpgroups, WARPGROUP_ROWS), jnp.float32) if forward else None,
            ping_pong=plgpu.Barrier(num_arrivals=self.warpgroups) if forward and self.warpgroups > 1 else None,
            factor=matrices(self.warpgroups, WARPGROUP_ROWS, self.columns) if self.config.interpret else None,
        )


@dataclasses.dataclass(frozen=True)
class Block:
    """A thread block at one of its rows of tiles, seen from one of its warpgroups."""

    launch: Launch
    inputs: GlobalInputs
    outputs: Outputs
    shared: SharedMemory
    loop: plgpu.NDLoopInfo  # over the rows of the block
    steps_before: Any  # steps of this block in earlier rows
    b: Any
    local_head: Any  # index of the head in the slice
    row: Any
    first_entry: Any
    full_tiles: Any
    partial_tiles: Any
    warpgroup: Any
    half: Any  # the half of the row that this warpgroup computes

    @classmethod
    def at(cls, launch: Launch, memory: Memory, loop: plgpu.NDLoopInfo, steps_before) -> Block:
        position, b, local_head = loop.index
        table, heads, rows = memory.inputs.table, len(launch.kernel_slice.heads), launch.kernel_slice.rows
        list_id = table.list_ids[b * heads + local_head if launch.lists_per_sequence else local_head]
        half = warpgroup = lax.axis_index("warpgroup")
        if launch.warpgroups == 1:
            position, half = lax.div(position, jnp.int32(WARPGROUPS)), lax.rem(position, jnp.int32(WARPGROUPS))
        row, start, full, partial = (table.rows[(list_id * rows + position) * 4 + i] for i in range(4))
        start = list_id * launch.entries + start
        return cls(launch, *memory, loop, steps_before, b, local_head, row, start, full, partial, warpgroup, half)

    def reload(self) -> Block:
        """The same block, read again instead of kept in registers."""
        return Block.at(self.launch, Memory(self.inputs, self.outputs, self.shared), self.loop, self.steps_before)

    @property
    def steps(self):
        return (self.full_tiles + self.partial_tiles) * self.launch.splits

    @property
    def first_row(self):
        """First position of this warpgroup's rows."""
        return (self.launch.kernel_slice.start + self.row) * TILE_SIDE + self.half * WARPGROUP_ROWS

    @property
    def output_rows(self):
        """Rows of this warpgroup in the outputs of the slice."""
        return pl.ds(self.row * TILE_SIDE + self.half * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def entry(self, step):
        return self.first_entry + lax.div(step, jnp.int32(self.launch.splits))

    def first_column(self, step):
        """First position of a step's columns."""
        within = lax.rem(step, jnp.int32(self.launch.splits)) * self.launch.columns
        return self.inputs.table.columns[self.entry(step)] * TILE_SIDE + within

    def slot(self, step, plane):
        planes, slots = len(self.launch.planes), self.launch.slots
        if planes % slots == 0 and self.launch.limbs > 1:
            return self.inputs.iota[plane % slots]  # a constant address would be kept in a register
        return lax.rem((self.steps_before + step) * planes + plane, jnp.int32(slots))

    def plane(self, step, plane):
        """Ref of a plane of a step."""
        return self.shared.planes.at[self.slot(step, plane)]

    def vectors_slot(self, step):
        return lax.rem(self.steps_before + step, jnp.int32(MAX_STAGES))

    @property
    def stationary_slot(self):
        return lax.rem(self.loop.local_index, jnp.int32(self.launch.stationary_slots))

    def row_head(self):
        """Head of the stationary operands."""
        return self.inputs.slice_heads[self.local_head]

    def column_head(self, step):
        """Head of the streamed operands. For dk and dv, the entry selects the query head within the group."""
        group_size = self.launch.config.group_size
        if self.launch.by_column:
            return self.row_head() * group_size + self.inputs.table.heads[self.entry(step)]
        return lax.div(self.row_head(), jnp.int32(group_size))

    def stationary(self, operand: Operand, limb: int = 0, reload: bool = False):
        """Ref of this warpgroup's rows of an operand. `reload`: read the index again instead of keeping it."""
        warpgroup = self.inputs.iota[self.warpgroup] if reload else self.warpgroup
        index = self.stationary_slot * self.launch.warpgroups + warpgroup
        return self.shared.stationary[operand].at[index * self.launch.limbs + limb]

    def consumers(self) -> list[Block]:
        """The block as each of its consumer warpgroups sees it."""
        if self.launch.warpgroups == 1:
            return [dataclasses.replace(self, warpgroup=0)]
        return [dataclasses.replace(self, warpgroup=i, half=i) for i in range(self.launch.warpgroups)]

    def for_each_step(self, body: Callable, carry):
        """Folds `body(step, carry, partial)` over the full tiles, then over the partial ones.

        If registers are scarce there is one loop whose steps branch on the kind: a second loop would occupy more.
        """
        full = self.full_tiles * self.launch.splits
        if self.launch.few_registers:
            return lax.fori_loop(0, self.steps, lambda i, carry: body(i, carry, partial=i >= full), carry)
        carry = lax.fori_loop(0, full, functools.partial(body, partial=False), carry)
        return lax.fori_loop(full, self.steps, functools.partial(body, partial=True), carry)

    def wait(self, step, plane):
        plgpu.barrier_wait(self.shared.planes_loaded.at[self.slot(step, plane)])

    def wait_first(self, step):
        """Waits for the first plane of a step, if the step exists."""
        pl.when(step < self.steps)(lambda: self.wait(step, 0))

    def release(self, step, plane):
        plgpu.barrier_arrive(self.shared.planes_consumed.at[self.slot(step, plane)])


def load_operands(block: Block) -> None:
    """The producer: loads a row's stationary operands and the planes of all its steps as slots become free."""
    launch, inputs, shared = block.launch, block.inputs, block.shared
    row_slot = block.stationary_slot
    reused = block.loop.local_index >= launch.stationary_slots
    pl.when(reused)(lambda: plgpu.barrier_wait(shared.stationary_consumed.at[row_slot]))
    for operand, consumer, limb in itertools.product(launch.stationary, block.consumers(), range(launch.limbs)):
        rows = pl.ds(consumer.first_row, WARPGROUP_ROWS)
        source = inputs.operands[operand].at[limb, block.b, block.row_head(), rows]
        plgpu.copy_gmem_to_smem(source, consumer.stationary(operand, limb), shared.stationary_loaded.at[row_slot])

    def load_step(step):
        head, columns = block.column_head(step), pl.ds(block.first_column(step), launch.columns)
        if launch.by_column:
            slot = block.vectors_slot(step)
            reused = block.steps_before + step >= MAX_STAGES
            pl.when(reused)(lambda: plgpu.barrier_wait(shared.vectors_consumed.at[slot]))
            for source, target in zip(inputs.vectors, shared.vectors, strict=True):
                source = source.at[block.b, head, columns]
                plgpu.copy_gmem_to_smem(source, target.at[slot], shared.vectors_loaded.at[slot])
        for plane, (operand, limb) in enumerate(launch.planes):
            slot = block.slot(step, plane)
            reused = (block.steps_before + step) * len(launch.planes) + plane >= launch.slots
            pl.when(reused)(functools.partial(plgpu.barrier_wait, shared.planes_consumed.at[slot]))
            source = inputs.operands[operand].at[limb, block.b, head, columns]
            plgpu.copy_gmem_to_smem(source, shared.planes.at[slot], shared.planes_loaded.at[slot])

    pl.loop(0, block.steps)(load_step)


def release_stationary(block: Block) -> None:
    """Frees the stationary operands once the outputs staged in their memory have been copied out."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(block.shared.stationary_consumed.at[block.stationary_slot])


def split_limbs(block: Block, x: Array) -> list[Array]:
    """The limbs of an array in registers, as factors of products."""
    limbs = []
    for _ in range(block.launch.limbs):
        limbs.append(x.astype(block.launch.dtype))
        x = x - limbs[-1].astype(jnp.float32)
    return limbs


def multiply(
    block: Block,
    acc: Array | None,
    factors: list,
    step,
    plane: int,
    transposed: bool,
    ready: int = 0,
    keep: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Array:
    """Adds the product of a left factor and a streamed operand to an accumulator, limb by limb.

    Args:
      block: The block.
      acc: The accumulator; None for zeros.
      factors: Limbs of the left factor, in shared memory or in registers.
      step: The step whose planes are the limbs of the right factor.
      plane: Index of the first of them.
      transposed: Whether to transpose the right factor.
      ready: Number of its limbs that have been waited for.
      keep: Whether to keep its planes for a later product of the step.
      meanwhile: Called while the last products are computed.
    """
    for i in range(block.launch.limbs):
        if i >= ready:
            block.wait(step, plane + i)
        right = block.plane(step, plane + i)
        right, last = right.T if transposed else right, i == block.launch.limbs - 1
        lefts, options = factors[: len(factors) - i], {"meanwhile": meanwhile} if last else {}
        if acc is None:
            acc = _sum_products(lefts, right, **options)
        else:
            (acc,) = _accumulate(block, [acc], [(lefts, right)], **options)
        if not keep:
            block.release(step, plane + i)
    return acc


def _accumulate(
    block: Block, accs: list[Array], factors: list[tuple[list, Any]], meanwhile: Callable[[], None] = lambda: None
) -> list[Array]:
    """Adds the products of left factors and a right factor to each accumulator; calls `meanwhile` during the products.

    Interpret mode supports neither accumulators with an initial value nor left factors in registers.
    """
    if block.launch.config.interpret:
        meanwhile()
        return [
            functools.reduce(functools.partial(_add_product, block, right), lefts, acc)
            for acc, (lefts, right) in zip(accs, factors, strict=True)
        ]

    def compute(acc_refs):
        for acc, (lefts, right) in zip(acc_refs, factors, strict=True):
            for left in lefts:
                plgpu.wgmma(acc, left, right)
        meanwhile()

    return pl.run_state(compute)([plgpu.ACC.init(x) for x in accs])


def _add_product(block: Block, right, acc: Array, left) -> Array:
    if isinstance(left, jax.Array):
        staging = block.shared.factor.at[block.warpgroup]
        staging[...] = left
        plgpu.commit_smem()
        left = staging
    return acc + _sum_products([left], right)


def _sum_products(lefts: list, right, meanwhile: Callable[[], None] = lambda: None) -> Array:
    """The sum of products of factors in shared memory, float32."""

    def compute(acc):
        for left in lefts:
            plgpu.wgmma(acc, left, right)
        meanwhile()
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((lefts[0].shape[0], right.shape[1]), jnp.float32))


def materialize(block: Block, *arrays: Array) -> tuple[Array, ...]:
    """Orders the computation of arrays before what follows. Interpret mode runs in program order anyway."""
    return arrays if block.launch.config.interpret else lax.optimization_barrier(arrays)


def multiply_overlapped(
    block: Block, step, transform: Callable[[Array], tuple[Array, ...]], keep: Sequence[Operand]
) -> tuple[tuple[Array, ...], Array]:
    """Multiplies both stationary operands by the streamed ones; the second product overlaps with `transform`.

    The overlap of softmax and products within a warpgroup is that of FlashAttention-3, section 3.2.

    Args:
      block: The block. In 16 bits, the step's first plane has been waited for, as is the next step's here.
      step: The step.
      transform: Function of the first product.
      keep: Streamed operands that a later product of the step needs.

    Returns:
      The result of `transform`, and the second product.
    """
    launch = block.launch
    reload = launch.few_registers or launch.by_column  # two accumulators leave few registers
    lefts = [[block.stationary(name, limb, reload) for limb in range(launch.limbs)] for name in launch.stationary]
    planes = {operand: launch.plane(operand) for operand in launch.streamed}
    if launch.limbs > 1:
        first, second = (
            functools.partial(multiply, block, None, left, step, plane, True, keep=operand in keep)
            for left, (operand, plane) in zip(lefts, planes.items(), strict=True)
        )
        return transform(first()), second()

    def compute(*accs):
        for acc, (left,), plane in zip(accs, lefts, planes.values(), strict=True):
            if plane:
                block.wait(step, plane)
            plgpu.wgmma(acc, left, block.plane(step, plane).T)
        (first,) = materialize(block, plgpu.wgmma_accumulator_load(accs[0], wait_n=1))
        transformed = materialize(block, *transform(first))
        # The branch of `wait_first` ends a basic block: the assembler cannot wait for the second product earlier.
        block.wait_first(step + 1)
        return transformed, plgpu.wgmma_accumulator_load(accs[1])

    products = pl.run_scoped(compute, *[plgpu.ACC((WARPGROUP_ROWS, launch.columns), jnp.float32)] * 2)
    for operand, plane in planes.items():
        if operand not in keep:
            block.release(step, plane)
    return products


class Product(NamedTuple):
    """A product to be added to an accumulator."""

    acc: Any
    factor: Any  # in registers
    plane: int  # index of the first plane of the right factor


def accumulate_products(block: Block, step, products: Sequence[Product]) -> tuple[Array, ...]:
    """The accumulators after adding the products with planes of the step, which are then released."""
    launch = block.launch
    if launch.limbs == 1:
        rights = [block.plane(step, product.plane) for product in products]
        factors = [(split_limbs(block, product.factor), right) for product, right in zip(products, rights, strict=True)]
        accs = _accumulate(block, [product.acc for product in products], factors)
        for product in products:
            block.release(step, product.plane)
        return tuple(accs)
    accs = []
    for acc, factor, plane in products:
        loaded_again = plane >= len(launch.streamed) * launch.limbs
        ready = 0 if loaded_again else launch.limbs
        accs.append(multiply(block, acc, split_limbs(block, factor), step, plane, False, ready))
    return tuple(accs)


# Ping-pong scheduling (FlashAttention-3, section 3.1): one consumer multiplies during the softmax of the other.


def ping_pong_sync(block: Block) -> None:
    """Lets the other consumer multiply and waits until it has finished."""
    ping_pong_arrive(block)
    ping_pong_wait(block)


def ping_pong_arrive(block: Block) -> None:
    """Lets the other consumer multiply."""
    if block.launch.warpgroups > 1:
        plgpu.barrier_arrive(block.shared.ping_pong)


def ping_pong_wait(block: Block) -> None:
    """Waits until this consumer may multiply."""
    if block.launch.warpgroups > 1:
        plgpu.barrier_wait(block.shared.ping_pong)


def store(block: Block, x: Array, operand: Operand, output) -> None:
    """Writes rows of an output, staged in the shared memory of a stationary operand."""
    for limb in range(block.launch.limbs):
        staging = block.stationary(operand, limb)
        staging[...] = x.astype(block.launch.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, output.at[limb, block.b, block.local_head, block.output_rows])
        if limb < block.launch.limbs - 1:  # read back instead of kept in registers
            x = x - plgpu.load(staging, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def full(shape: tuple[int, ...], value, layout) -> Array:
    """A constant float32 array in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def broadcast_rows(x: Array, shape: tuple[int, int]) -> Array:
    """Broadcasts one value per row along the columns."""
    return lax.broadcast_in_dim(x, shape, [0])
