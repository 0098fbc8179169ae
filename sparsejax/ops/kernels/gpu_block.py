"""A block of threads on a Hopper GPU: its memory, what it loads, the products that its tensor cores compute.

A block computes row after row of tiles. Two of its warpgroups have half of a row each and keep its sums in registers; a
third loads what the row's tiles need, some steps ahead, and goes on to the next row while this one is computed.

Tensor cores multiply numbers of 16 bits. In float32 an array is the sum of three in bfloat16, its pieces, and a product
that of the six products of pieces that float32 can hold (arXiv:1904.06376); a block then has half of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sparsejax.ops.kernels.flash import Inputs, Spec
from sparsejax.ops.kernels.lists import Part, Walk
from sparsejax.ops.kernels.mesh import core_count

SIDE = 128  # of tiles
WARPGROUPS = 2  # that compute a row of tiles
HALF = SIDE // WARPGROUPS  # rows of one: sums of more do not fit into its registers
PIECES = 3  # in bfloat16, of a number in float32
NARROW = 128  # heads: sums of wider ones leave few registers
AHEAD = 3  # steps that are loaded before they are computed, at most
SHARED = 227 * 1024 - 3072  # bytes of a block, without what barriers and vectors take
REDUCTIONS = 1024  # bytes more that it takes to find the maxima and sums of rows
CORES = 132  # multiprocessors of an H100, if the machine does not say
INTERPRETED_CORES = 2  # so that each has several rows
VECTORS = "lse", "slope"  # of the columns of a step, for the gradients of keys and values


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static of one kernel.

    Attributes:
      spec: As for all kernels of an attention.
      part: Which heads and rows.
      by_column: Rows are key tiles.
      own: Arrays of which a warpgroup has its rows in shared memory.
      stream: Arrays of which it needs the columns of each step, in this order; the first is needed again at its end.
      planes: Of a step, in the order in which they are loaded: an array of the stream, and which of its pieces.
      sequences: How many there are.
      columns: Of a step, which is a tile or a part of one.
      slots: How many planes there is room for.
      own_slots: For how many rows at a time there is room for their own arrays.
      width: Of heads.
      pieces: That an array is the sum of.
      warpgroups: That compute in a block.
      dtype: Of what is multiplied.
      own_lists: Each sequence has lists of its own.
      tight: Registers are few: heads are wide, or scores need more than a product and a formula.
      entries: Of a list.
    """

    spec: Spec
    part: Part
    by_column: bool
    own: tuple[str, ...]
    stream: tuple[str, ...]
    planes: tuple[tuple[str, int], ...]
    sequences: int
    columns: int
    slots: int
    own_slots: int
    width: int
    pieces: int
    warpgroups: int
    dtype: Any
    own_lists: bool
    tight: bool
    entries: int = 0

    @classmethod
    def of(cls, spec: Spec, part: Part, walk: Walk, inputs: Inputs, own, stream, again=True, columns=64) -> Call:
        """`again`: the first array of the stream is loaded again at the end of a step, if it cannot stay that long."""
        sequences, _, _, width = inputs.q.shape
        segments, by_column = inputs.segments is not None, stream[0] == "q"
        pieces, dtype = (PIECES, jnp.bfloat16) if inputs.q.dtype == jnp.float32 else (1, inputs.q.dtype)
        tight = width > NARROW or spec.softcap is not None or segments or inputs.bits is not None or pieces > 1
        warpgroups = WARPGROUPS if pieces == 1 else 1  # the pieces of more rows would leave little shared memory
        order = (*stream, stream[0]) if again and pieces > 1 else stream
        planes = tuple((name, piece) for name in order for piece in range(pieces))
        shared = SHARED if len(own) > 1 else SHARED - REDUCTIONS
        columns = 32 if pieces > 1 and width > NARROW else 64 if tight else columns
        rows = shared // (width * jnp.dtype(dtype).itemsize)  # of all arrays
        mine = len(own) * warpgroups * pieces * HALF
        # Its own rows of the next row of tiles are loaded early, if that leaves room for two steps.
        own_slots = 2 if rows - 2 * mine >= 2 * len(planes) * columns else 1
        room = rows - own_slots * mine
        fitting = range(1, min(room // columns, AHEAD * len(planes)) + 1)
        # With many planes, each has the same slot in all steps: a register less for each.
        slots = max(n for n in fitting if pieces == 1 or len(planes) % n == 0)
        own_lists = walk.which.shape[0] > 1 or segments
        sizes = sequences, columns, slots, own_slots, width, pieces, warpgroups
        return cls(spec, part, by_column, own, stream, planes, *sizes, dtype, own_lists, tight)

    @property
    def splits(self) -> int:
        return SIDE // self.columns

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows, sequences and heads; a row twice if a block has half of it."""
        rows = (self.part.stop - self.part.start) * WARPGROUPS // self.warpgroups
        return rows, self.sequences, len(self.part.heads)

    @property
    def blocks(self) -> int:
        cores = INTERPRETED_CORES if self.spec.interpret else core_count() or CORES
        return min(cores, math.prod(self.grid))

    def output(self) -> jax.ShapeDtypeStruct:
        """Of one array, its pieces first."""
        rows = (self.part.stop - self.part.start) * SIDE
        return jax.ShapeDtypeStruct((self.pieces, self.sequences, len(self.part.heads), rows, self.width), self.dtype)

    def plane(self, name: str, last: bool = False) -> int:
        """Which of a step's is the first of an array; or of the array that is needed again, the second time."""
        return len(self.planes) - self.pieces if last and self.pieces > 1 else self.planes.index((name, 0))

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers by name."""
        row = min(self.columns, 64)  # of a swizzled tile
        transforms = plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(2 * row)

        def matrices(*shape):
            return plgpu.SMEM(shape, self.dtype, transforms=transforms)

        parts = self.warpgroups * self.pieces
        found = {f"own_{name}": matrices(self.own_slots * parts, HALF, self.width) for name in self.own}
        found["loaded_own"] = plgpu.Barrier(num_arrivals=len(self.own) * parts, num_barriers=self.own_slots)
        found["used_own"] = plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=self.own_slots)
        found["planes"] = matrices(self.slots, self.columns, self.width)
        found["loaded"] = plgpu.Barrier(num_arrivals=1, num_barriers=self.slots)
        found["used"] = plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=self.slots)
        if self.by_column:
            found |= {name: plgpu.SMEM((AHEAD, self.columns), jnp.float32) for name in VECTORS}
            found["loaded_vectors"] = plgpu.Barrier(num_arrivals=len(VECTORS), num_barriers=AHEAD)
            found["used_vectors"] = plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=AHEAD)
        if self.spec.interpret:
            found["factor"] = matrices(self.warpgroups, HALF, self.columns)
        return found


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of threads at one of its rows, as one of its warpgroups sees it. `refs`: all memory by name."""

    call: Call
    refs: dict[str, Any]
    turn: plgpu.NDLoopInfo
    before: Any  # steps of this block, in earlier rows
    b: Any
    member: Any
    row: Any
    start: Any  # of the row's entries
    full: Any
    partial: Any
    group: Any  # warpgroup
    half: Any  # of the row, that this warpgroup has

    @classmethod
    def at(cls, call: Call, refs: dict[str, Any], turn: plgpu.NDLoopInfo, before) -> Block:
        nth, b, member = turn.index
        which = refs["which"][b * len(call.part.heads) + member if call.own_lists else member]
        rows = call.part.stop - call.part.start
        half = group = lax.axis_index("warpgroup")
        if call.warpgroups == 1:
            nth, half = lax.div(nth, jnp.int32(WARPGROUPS)), lax.rem(nth, jnp.int32(WARPGROUPS))
        row, start, full, partial = (refs["rows"][(which * rows + nth) * 4 + i] for i in range(4))
        start = which * call.entries + start
        return cls(call, refs, turn, before, b, member, row, start, full, partial, group, half)

    def again(self) -> Block:
        """The same, looked up anew rather than kept in registers."""
        return Block.at(self.call, self.refs, self.turn, self.before)

    @property
    def steps(self):
        return (self.full + self.partial) * self.call.splits

    @property
    def first_row(self):
        """Of this warpgroup, among those of the whole array."""
        return (self.call.part.start + self.row) * SIDE + self.half * HALF

    @property
    def rows(self):
        """Of this warpgroup, among those of the part."""
        return pl.ds(self.row * SIDE + self.half * HALF, HALF)

    def entry(self, step):
        return self.start + lax.div(step, jnp.int32(self.call.splits))

    def first_column(self, step):
        within = lax.rem(step, jnp.int32(self.call.splits)) * self.call.columns
        return self.refs["columns"][self.entry(step)] * SIDE + within

    def slot(self, step, plane):
        planes, slots = len(self.call.planes), self.call.slots
        if planes % slots == 0 and self.call.pieces > 1:
            return self.refs["count"][plane % slots]  # addresses that do not change would be kept in registers
        return lax.rem((self.before + step) * planes + plane, jnp.int32(slots))

    def vectors_slot(self, step):
        return lax.rem(self.before + step, jnp.int32(AHEAD))

    @property
    def own_slot(self):
        return lax.rem(self.turn.local_index, jnp.int32(self.call.own_slots))

    def own_head(self):
        return self.refs["members"][self.member]

    def stream_head(self, step):
        """Query heads share the head of keys and values; of these, an entry says whose queries it is about."""
        share = self.call.spec.share
        if self.call.by_column:
            return self.own_head() * share + self.refs["heads"][self.entry(step)]
        return lax.div(self.own_head(), jnp.int32(share))

    def own(self, name, piece=0, again=False):
        """`again`: looked up anew rather than kept in a register."""
        group = self.refs["count"][self.group] if again else self.group
        part = self.own_slot * self.call.warpgroups + group
        return self.refs[f"own_{name}"].at[part * self.call.pieces + piece]

    def members(self) -> list[Block]:
        """The same as each of the warpgroups that compute sees it."""
        if self.call.warpgroups == 1:
            return [dataclasses.replace(self, group=0)]
        return [dataclasses.replace(self, group=i, half=i) for i in range(self.call.warpgroups)]

    def loop(self, step: Callable, carry):
        """`step(i, carry, partial)` for the full tiles, then for the partial ones.

        Where registers are few there are none for what a second loop wants to keep: each step looks what its tile is.
        """
        full = self.full * self.call.splits
        if self.call.tight:
            return lax.fori_loop(0, self.steps, lambda i, carry: step(i, carry, partial=i >= full), carry)
        carry = lax.fori_loop(0, full, functools.partial(step, partial=False), carry)
        return lax.fori_loop(full, self.steps, functools.partial(step, partial=True), carry)

    def wait(self, step, plane):
        plgpu.barrier_wait(self.refs["loaded"].at[self.slot(step, plane)])

    def wait_first(self, step):
        """For the first plane of a step, if there is such a step."""
        pl.when(step < self.steps)(lambda: self.wait(step, 0))

    def release(self, step, plane):
        plgpu.barrier_arrive(self.refs["used"].at[self.slot(step, plane)])


def load(block: Block) -> None:
    """A row's own arrays and the planes of all its steps, as soon as there is room."""
    call, refs = block.call, block.refs
    mine = block.own_slot
    pl.when(block.turn.local_index >= call.own_slots)(lambda: plgpu.barrier_wait(refs["used_own"].at[mine]))
    for name, member, piece in itertools.product(call.own, block.members(), range(call.pieces)):
        source = refs[f"all_{name}"].at[piece, block.b, block.own_head(), pl.ds(member.first_row, HALF)]
        plgpu.copy_gmem_to_smem(source, member.own(name, piece), refs["loaded_own"].at[mine])

    def load_step(step):
        head, columns = block.stream_head(step), pl.ds(block.first_column(step), call.columns)
        if call.by_column:
            nth = block.vectors_slot(step)
            taken = block.before + step >= AHEAD
            pl.when(taken)(lambda: plgpu.barrier_wait(refs["used_vectors"].at[nth]))
            for name in VECTORS:
                source = refs[f"all_{name}"].at[block.b, head, columns]
                plgpu.copy_gmem_to_smem(source, refs[name].at[nth], refs["loaded_vectors"].at[nth])
        for plane, (name, piece) in enumerate(call.planes):
            slot = block.slot(step, plane)
            taken = (block.before + step) * len(call.planes) + plane >= call.slots
            pl.when(taken)(functools.partial(plgpu.barrier_wait, refs["used"].at[slot]))
            source = refs[f"all_{name}"].at[piece, block.b, head, columns]
            plgpu.copy_gmem_to_smem(source, refs["planes"].at[slot], refs["loaded"].at[slot])

    pl.loop(0, block.steps)(load_step)


def release_own(block: Block) -> None:
    """Once what was written to it is under way."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(block.refs["used_own"].at[block.own_slot])


def split(block: Block, x: Array) -> list[Array]:
    """The pieces of an array, as factors of products."""
    pieces = []
    for _ in range(block.call.pieces):
        pieces.append(x.astype(block.call.dtype))
        x = x - pieces[-1].astype(jnp.float32)
    return pieces


def contract(
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
    """The sum of acc and of a product, by pieces.

    Args:
      block: Where.
      acc: None for zeros.
      factors: The pieces of the left factor, in shared memory or in registers.
      step: Whose planes are the pieces of the right factor.
      plane: The first of them.
      transposed: They are transposed.
      ready: How many of them have been waited for.
      keep: They are needed again.
      meanwhile: Done while the last products are computed.
    """
    for i in range(block.call.pieces):
        if i >= ready:
            block.wait(step, plane + i)
        right = block.refs["planes"].at[block.slot(step, plane + i)]
        right, last = right.T if transposed else right, i == block.call.pieces - 1
        lefts, more = factors[: len(factors) - i], {"meanwhile": meanwhile} if last else {}
        acc = _multiply(lefts, right, **more) if acc is None else _accumulate(block, [acc], [(lefts, right)], **more)[0]
        if not keep:
            block.release(step, plane + i)
    return acc


def _accumulate(
    block: Block, sums: list[Array], factors: list[tuple[list, Any]], meanwhile: Callable[[], None] = lambda: None
) -> list[Array]:
    """Sums to which products of left factors with a right one are added; `meanwhile` is done as they are computed.

    Interpret mode has neither accumulators that start with a value nor products with a factor in registers.
    """
    if block.call.spec.interpret:
        meanwhile()
        return [
            functools.reduce(functools.partial(_add_product, block, right), lefts, x)
            for x, (lefts, right) in zip(sums, factors, strict=True)
        ]

    def compute(accs):
        for acc, (lefts, right) in zip(accs, factors, strict=True):
            for left in lefts:
                plgpu.wgmma(acc, left, right)
        meanwhile()

    return pl.run_state(compute)([plgpu.ACC.init(x) for x in sums])


def _add_product(block: Block, right, x: Array, left: Array) -> Array:
    if isinstance(left, jax.Array):
        block.refs["factor"].at[block.group][...] = left
        plgpu.commit_smem()
        left = block.refs["factor"].at[block.group]
    return x + _multiply([left], right)


def _multiply(lefts: list, right, meanwhile: Callable[[], None] = lambda: None) -> Array:
    """The sum of products, float32; all factors are in shared memory."""

    def compute(acc):
        for left in lefts:
            plgpu.wgmma(acc, left, right)
        meanwhile()
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((lefts[0].shape[0], right.shape[1]), jnp.float32))


def settle(block: Block, *arrays: Array) -> tuple[Array, ...]:
    """Computed before what follows; interpret mode does everything in order."""
    return arrays if block.call.spec.interpret else lax.optimization_barrier(arrays)


def contract_both(
    block: Block, step, work: Callable[[Array], tuple[Array, ...]], keep: Sequence[str]
) -> tuple[tuple[Array, ...], Array]:
    """Products of own rows with both arrays of the stream; the second is computed while there is work on the first.

    Args:
      block: Where; of 16 bits, the step's first plane has been waited for, as it is here for the next one.
      step: Which.
      work: What is done with the first product.
      keep: Arrays of the stream that are needed again in this step.

    Returns:
      What the work gave, and the second product.
    """
    call = block.call
    again = call.tight or call.by_column  # two sums leave few registers
    lefts = [[block.own(name, piece, again) for piece in range(call.pieces)] for name in call.own]
    planes = {name: call.plane(name) for name in call.stream}
    if call.pieces > 1:
        first, second = (
            functools.partial(contract, block, None, left, step, plane, True, keep=name in keep)
            for left, (name, plane) in zip(lefts, planes.items(), strict=True)
        )
        return work(first()), second()

    def compute(*products):
        for product, (left,), plane in zip(products, lefts, planes.values(), strict=True):
            if plane:
                block.wait(step, plane)
            plgpu.wgmma(product, left, block.refs["planes"].at[block.slot(step, plane)].T)
        (first,) = settle(block, plgpu.wgmma_accumulator_load(products[0], wait_n=1))
        found = settle(block, *work(first))
        # What comes before a branch is done before it; else the assembler waits for the second product before the work.
        block.wait_first(step + 1)
        return found, plgpu.wgmma_accumulator_load(products[1])

    found = pl.run_scoped(compute, *[plgpu.ACC((HALF, call.columns), jnp.float32)] * 2)
    for name, plane in planes.items():
        if name not in keep:
            block.release(step, plane)
    return found


def contract_each(
    block: Block, step, sums: dict[str, Array], factors: dict[str, Array], planes: dict[str, int]
) -> dict[str, Array]:
    """Sums to which the products of factors and planes of the stream are added."""
    call = block.call
    if call.pieces == 1:
        rights = [block.refs["planes"].at[block.slot(step, planes[name])] for name in sums]
        products = [(split(block, factors[name]), right) for name, right in zip(sums, rights, strict=True)]
        found = _accumulate(block, list(sums.values()), products)
        for name in sums:
            block.release(step, planes[name])
        return dict(zip(sums, found, strict=True))
    found = {}
    for name, x in sums.items():
        again = planes[name] >= len(call.stream) * call.pieces  # loaded again, and not waited for yet
        ready = 0 if again else call.pieces
        found[name] = contract(block, x, split(block, factors[name]), step, planes[name], False, ready)
    return found


def take_turns(block: Block) -> None:
    """One warpgroup multiplies while the other has its softmax."""
    offer_turn(block)
    await_turn(block)


def offer_turn(block: Block) -> None:
    """The other warpgroup may multiply."""
    if block.call.warpgroups > 1:
        plgpu.barrier_arrive(block.refs["turn"])


def await_turn(block: Block) -> None:
    """Until the other warpgroup has offered it."""
    if block.call.warpgroups > 1:
        plgpu.barrier_wait(block.refs["turn"])


def store(block: Block, name: str, x: Array, to: str) -> None:
    """What this warpgroup found, by way of the memory that its rows of an input were in."""
    for piece in range(block.call.pieces):
        place = block.own(name, piece)
        place[...] = x.astype(block.call.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, block.refs[to].at[piece, block.b, block.member, block.rows])
        if piece < block.call.pieces - 1:  # read again rather than kept in registers
            x = x - plgpu.load(place, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def fill(shape: tuple[int, ...], value, layout) -> Array:
    """One value everywhere, float32, in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along_rows(x: Array, shape: tuple[int, int]) -> Array:
    """A number of each row in all columns."""
    return lax.broadcast_in_dim(x, shape, [0])
