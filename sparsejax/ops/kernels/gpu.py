"""Attention over tile lists on Hopper GPUs: Mosaic kernels in which blocks of threads compute row after row of tiles.

There is one block for each multiprocessor. Two of its warpgroups have half of a row each and keep its sums in
registers; a third loads what the row's tiles need, some steps ahead, and goes on to the next row while this one is
computed. Lists are in global memory: a row says where its entries are, the longest rows come first.

Tensor cores multiply numbers of 16 bits. In float32 an array is the sum of three in bfloat16, its pieces, and a product
that of the six products of pieces that float32 can hold (arXiv:1904.06376); a block then has half of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from sparsejax.ops.chunks import fill_chunks
from sparsejax.ops.kernels import flash
from sparsejax.ops.kernels.flash import LOG2E, LOWEST, Back, Backend, Inputs, Spec, bound_scores, score_unit
from sparsejax.ops.kernels.lists import EMPTY, FULL, PARTIAL, Part, TileLists, Walk, pack_words, sort_lists
from sparsejax.ops.kernels.mesh import core_count, device_kind, run_on_mesh
from sparsejax.ops.request import MASKED, Request

SIDE = 128  # of tiles
WARPGROUPS = 2  # that compute a row of tiles
HALF = SIDE // WARPGROUPS  # rows of one: sums of more do not fit into its registers
PIECES = 3  # in bfloat16, of a number in float32
NARROW = 128  # heads: sums of wider ones leave few registers
WIDTHS = 64  # heads are padded to multiples: what a swizzled row of shared memory holds
AHEAD = 3  # steps that are loaded before they are computed, at most
SHARED = 227 * 1024 - 3072  # bytes of a block, without what barriers and vectors take
REDUCTIONS = 1024  # bytes more that it takes to find the maxima and sums of rows
REGISTERS = {"increase": 232, "decrease": 40}  # of a thread that computes, and of one that loads
CORES = 132  # multiprocessors of an H100, if the machine does not say
INTERPRETED_CORES = 2  # so that each has several rows
INTERPRETER_THREADS = 8
DTYPES = "bfloat16", "float16", "float32"
KINDS = re.compile(r"\bG?H(100|200|800|20)\b")
# What the compiler has an instruction for, with positions of a tile as operands.
OPERATIONS = frozenset(
    {"abs", "add", "and", "broadcast_in_dim", "convert_element_type", "div", "eq", "ge", "gt", "le", "lt", "max", "min"}
    | {"mul", "ne", "neg", "not", "or", "rem", "select_n", "shift_left", "shift_right_arithmetic"}
    | {"shift_right_logical", "sign", "sub", "xor"}
)


def refuse(request: Request) -> str | None:
    """Why this implementation cannot serve the request, or None."""
    kind, version = None if request.interpret else device_kind(), jax.__version_info__
    dtypes = {str(x.dtype) for x in (request.q, request.k, request.v)}
    reasons = (
        (
            not request.interpret and not (KINDS.search(kind) and version >= (0, 11)),
            f"it needs a Hopper GPU and jax 0.11 or newer, or interpret=True; here: {kind}, jax {jax.__version__}",
        ),
        (
            request.interpret and version < (0, 12),
            f"interpreting it needs jax 0.12 or newer, here is {jax.__version__}",
        ),
        (
            request.interpret and _threads() < INTERPRETER_THREADS,
            f"interpreting it needs {INTERPRETER_THREADS} threads, here are {_threads()}: set NPROC before JAX starts",
        ),
        (
            len(dtypes) > 1 or not dtypes <= {*DTYPES},
            f"q, k and v all in {', or all in '.join(DTYPES)}; got {', '.join(sorted(dtypes))}",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None) or flash.refuse(request)


def _threads() -> int:
    """Of XLA on the CPU. With fewer than wait for each other in an interpreted block, it hangs."""
    return int(os.environ.get("NPROC") or os.cpu_count() or 1)


def run(
    request: Request, tile: tuple[int, int] | None = None, selected: Int[Array, "#b h rows k"] | None = None
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32.

    Args:
      request: what is asked.
      tile: queries and keys of a tile; (128, 128) is all there is.
      selected: as in `flash.attend_lists`.

    Raises:
      ValueError: another tile.
    """
    if tile not in (None, (SIDE, SIDE)):
        raise ValueError(f"attend: gpu: tiles of ({SIDE}, {SIDE}), got {tile}")
    if selected is not None:
        return _run_here(request, selected)
    return run_on_mesh(functools.partial(_run_here, selected=None), request)


def _run_here(request: Request, selected: Array | None) -> tuple[Array, Array]:
    width = max(request.q.shape[-1], request.v.shape[-1])
    width += -width % WIDTHS
    wide = {name: fill_chunks(getattr(request, name), width, 3) for name in "qkv"}
    out, lse = flash.attend_lists(BACKEND, dataclasses.replace(request, **wide), (SIDE, SIDE), selected)
    return out[..., : request.v.shape[-1]], lse


# The lists in global memory.


class Table(NamedTuple):
    """Lists as blocks of threads read them."""

    which: Int[Array, "#b heads"]
    rows: Int[Array, "lists rows 4"]  # a row, where its entries start, how many are full and how many partial
    columns: Int[Array, "lists n"]
    heads: Int[Array, "lists n"]
    masks: Int[Array, "lists n"]

    @classmethod
    def of(cls, part: Part, walk: Walk, inputs: Inputs, by_column: bool) -> Table:
        """Of each list, the longest rows first: blocks start in this order."""
        walk = Walk(jnp.asarray(walk.which), TileLists(*map(jnp.asarray, walk.lists)))
        if inputs.bits is not None:
            whole = jnp.where(walk.lists.kinds == FULL, inputs.bits[0].shape[0] - 1, walk.lists.masks)
            walk = walk._replace(lists=walk.lists._replace(masks=whole))
        if inputs.segments is not None:
            walk = _sort_by_segments(part, walk, inputs.segments, by_column)
        which, lists = walk
        rows = jnp.arange(part.stop - part.start, dtype=jnp.int32)
        count = jax.vmap(lambda row, of_kind: jnp.zeros_like(rows).at[row].add(of_kind.astype(jnp.int32)))
        full, partial = (count(lists.rows, lists.kinds == kind) for kind in (FULL, PARTIAL))
        start = jax.vmap(lambda row: jnp.searchsorted(row, rows))(lists.rows)
        order = jnp.argsort(-(full + partial), axis=1, stable=True)
        table = jnp.stack([jnp.broadcast_to(rows, full.shape), start.astype(jnp.int32), full, partial], axis=-1)
        table = jnp.take_along_axis(table, order[..., None], axis=1)
        return cls(which, table, lists.columns, lists.heads, lists.masks)


def _sort_by_segments(part: Part, walk: Walk, segments: tuple[Array, Array], by_column: bool) -> Walk:
    """Lists for each sequence: tiles whose segments cannot meet are empty, full ones of more than one are partial."""
    (which, lists), b = walk, segments[0].shape[0]
    if which.shape[0] == 1:
        of = jnp.repeat(jnp.arange(b), lists.rows.shape[0])
        which = which + jnp.arange(b, dtype=which.dtype)[:, None] * lists.rows.shape[0]
        lists = TileLists(*(jnp.tile(x, (b, 1)) for x in lists))
    else:
        of = jnp.zeros(lists.rows.shape[0], jnp.int32).at[which].set(jnp.arange(b, dtype=jnp.int32)[:, None])
    tiles = part.start + lists.rows, lists.columns
    (low_q, high_q), (low_k, high_k) = (
        [x[of[:, None], tile] for x in ends]
        for ends, tile in zip(
            flash.segment_ranges(segments, (SIDE, SIDE)), reversed(tiles) if by_column else tiles, strict=True
        )
    )
    meets = (low_q <= high_k) & (low_k <= high_q)
    alone = (low_q == high_q) & (low_k == high_k)
    kinds = jnp.where(meets, jnp.where(alone, lists.kinds, jnp.minimum(lists.kinds, PARTIAL)), EMPTY)
    return Walk(which, sort_lists(lists._replace(kinds=kinds)))


def pack_bits(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks [distinct, queries, keys] and at last one of all pairs, as words [distinct, words, rows].

    A word is 32 columns of a row, the first in the lowest bit. Rows are queries for the forward pass and for dq, and
    keys for dk and dv.
    """
    masks = np.concatenate([masks, np.ones_like(masks[:1])])
    return pack_words(masks.swapaxes(1, 2)), pack_words(masks)


# What a block of threads does.


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


VECTORS = ("lse", "slope")


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

    def release(self, step, plane):
        plgpu.barrier_arrive(self.refs["used"].at[self.slot(step, plane)])


def _load(block: Block) -> None:
    """A row's own arrays and the planes of all its steps, as soon as there is room."""
    call, refs = block.call, block.refs
    mine = block.own_slot
    pl.when(block.turn.local_index >= call.own_slots)(lambda: plgpu.barrier_wait(refs["used_own"].at[mine]))
    for name, member, piece in itertools.product(call.own, block.members(), range(call.pieces)):
        source = refs[f"all_{name}"].at[piece, block.b, block.own_head(), pl.ds(member.first_row, HALF)]
        plgpu.copy_gmem_to_smem(source, member.own(name, piece), refs["loaded_own"].at[mine])

    def load(step):
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

    pl.loop(0, block.steps)(load)


def _release_own(block: Block) -> None:
    """Once what was written to it is under way."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(block.refs["used_own"].at[block.own_slot])


def _split(block: Block, x: Array) -> list[Array]:
    """The pieces of an array, as factors of products."""
    pieces = []
    for _ in range(block.call.pieces):
        pieces.append(x.astype(block.call.dtype))
        x = x - pieces[-1].astype(jnp.float32)
    return pieces


def _contract(
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


def _settle(block: Block, *arrays: Array) -> tuple[Array, ...]:
    """Computed before what follows; interpret mode does everything in order."""
    return arrays if block.call.spec.interpret else lax.optimization_barrier(arrays)


def _fill(shape: tuple[int, ...], value, layout) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _along_rows(x: Array, shape: tuple[int, int]) -> Array:
    """A number of each row in all columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def _mask(block: Block, step, partial, x: Array, other: float) -> Array:
    """What counts of a step's scores or weights; `other` for what does not, which only partial tiles have."""
    if isinstance(partial, bool):
        return _mask_partial(block, step, x, other) if partial else x
    return lax.cond(partial, lambda: _mask_partial(block, step, x, other), lambda: x)


def _mask_partial(block: Block, step, x: Array, other: float) -> Array:
    call, refs, shape, layout = block.call, block.refs, x.shape, plgpu.Layout.WGMMA
    spec, start = call.spec, block.first_column(step)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    column = plgpu.load(refs["count"].at[pl.ds(0, shape[1])], layout=layout.reduce(0), optimized=False)
    column = lax.broadcast_in_dim(column, shape, [1])
    if "bits" in refs:
        allowed = _unpack(block, step, column)
    else:
        positions = block.first_row + row, start + column
        q, k = reversed(positions) if call.by_column else positions
        allowed = spec.pattern.allows(q, k, spec.t, spec.s)
        allowed = allowed & (k < spec.s) if spec.s % SIDE else allowed
    if "row_ids" not in refs:
        return jnp.where(allowed, x, other)
    ids = [
        plgpu.load(refs[name].at[block.b, pl.ds(first, size)], layout=layout.reduce(1 - axis), optimized=False)
        for axis, (name, first, size) in enumerate(
            (("row_ids", block.first_row, HALF), ("column_ids", start, call.columns))
        )
    ]
    allowed = allowed & (lax.broadcast_in_dim(ids[0], shape, [0]) == lax.broadcast_in_dim(ids[1], shape, [1]))
    return jnp.where(allowed, x, other)


def _unpack(block: Block, step, column: Array) -> Array:
    """A step's part of the mask of its tile; see `pack_bits`."""
    call, refs = block.call, block.refs
    mask = refs["masks"][block.entry(step)]
    first = lax.rem(step, jnp.int32(call.splits)) * (call.columns // 32)
    rows = pl.ds(block.half * HALF, HALF)
    word = None
    for i in range(call.columns // 32):
        words = plgpu.load(refs["bits"].at[mask, first + i, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        words = _along_rows(words, column.shape)
        word = words if word is None else jnp.where(column >= 32 * i, words, word)
    return lax.shift_right_logical(word, column & 31) & 1 != 0


# The kernels.


def _forward_rows(block: Block) -> None:
    call, refs = block.call, block.refs
    unit, layout, shape = score_unit(call.spec), plgpu.Layout.WGMMA, (HALF, call.columns)
    plgpu.barrier_wait(refs["loaded_own"].at[block.own_slot])
    head, first_k, first_v = block.own_head(), call.plane("k"), call.plane("v")
    sink = [refs[name][head] for name in ("sink", "sink_top", "sink_total")] if "sink" in refs else None
    top = _fill((HALF,), LOWEST if sink is None else sink[1], layout.reduce(1))
    total = _fill((HALF,), 0.0 if sink is None else sink[2], layout.reduce(1))
    acc = _fill((HALF, call.width), 0.0, layout)
    pl.when(block.steps > 0)(lambda: block.wait(0, first_k))
    pl.when(block.group == 1)(lambda: _take_turns(block))

    def step(i, carry, partial):
        acc, top, total = carry
        own = [block.own("q", piece, again=call.pieces > 1) for piece in range(call.pieces)]
        scores = _contract(block, None, own, i, first_k, True, ready=1, meanwhile=lambda: _take_turns(block))
        scores = _bound(call, scores)
        scores = _mask(block, i, partial, scores, MASKED)
        now = jnp.maximum(top, scores.max(axis=1))
        terms = _power(call, scores, _along_rows(now, shape))
        fade = jnp.exp2((top - now) * (unit * LOG2E))
        acc = acc * _along_rows(fade, acc.shape)
        total = fade * total + terms.sum(axis=1)
        acc, total, now, *terms = _settle(block, acc, total, now, *_split(block, terms))
        _offer_turn(block)
        block.wait(i, first_v)
        _await_turn(block)
        ahead = functools.partial(pl.when(i + 1 < block.steps), lambda: block.wait(i + 1, first_k))
        acc = _contract(block, acc, terms, i, first_v, False, ready=1, meanwhile=ahead)
        return acc, now, total

    acc, top, total = block.loop(step, (acc, top, total))
    pl.when(block.group == 0)(lambda: _take_turns(block))
    live = total > 0
    safe = jnp.where(live, total, 1.0)
    lse = jnp.where(live, top * unit + jnp.log(safe), -jnp.inf)
    if sink is not None:  # alone in its row, to the last bit
        lse = jnp.where((top == sink[1]) & (total == 1), _fill((HALF,), sink[0], layout.reduce(1)), lse)
    refs["rows_lse"].at[block.group][...] = lse
    _store(block, "q", acc * _along_rows(1 / safe, acc.shape), "out")
    to = refs["out_lse"].at[block.b, block.member, block.rows]
    plgpu.copy_smem_to_gmem(refs["rows_lse"].at[block.group], to)
    _release_own(block)


def _take_turns(block: Block) -> None:
    """One warpgroup multiplies while the other has its softmax."""
    _offer_turn(block)
    _await_turn(block)


def _offer_turn(block: Block) -> None:
    if block.call.warpgroups > 1:
        plgpu.barrier_arrive(block.refs["turn"])


def _await_turn(block: Block) -> None:
    if block.call.warpgroups > 1:
        plgpu.barrier_wait(block.refs["turn"])


def _store(block: Block, name: str, x: Array, to: str) -> None:
    """What this warpgroup found, by way of the memory that its rows of an input were in."""
    for piece in range(block.call.pieces):
        place = block.own(name, piece)
        place[...] = x.astype(block.call.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, block.refs[to].at[piece, block.b, block.member, block.rows])
        if piece < block.call.pieces - 1:  # read again rather than kept in registers
            x = x - plgpu.load(place, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _bound(call: Call, products: Array) -> Array:
    """`bound_scores`, of 16 bits without the machine's tanh, which is either long or has 11 bits."""
    spec = call.spec
    if spec.softcap is None or call.pieces > 1:
        return bound_scores(spec, products)
    grown = jnp.exp2(products * (2 * LOG2E * spec.scale / spec.softcap))
    return 1 - 2 * lax.square(lax.rsqrt(1 + grown))  # tanh x = 1 - 2 / (1 + exp 2x)


def _power(call: Call, scores: Array, less: Array) -> Array:
    """The exponential of a difference of scores in their unit."""
    factor = score_unit(call.spec) * LOG2E
    if call.pieces > 1:
        return jnp.exp2((scores - less) * factor)  # exact until it is rounded
    return jnp.exp2(scores * factor - less * factor)  # one instruction for each score: exact enough for 16 bits


def _weigh(block: Block, step, partial, products: Array, lse: Callable[[], Array]) -> tuple[Array, Array | None]:
    """Weights of a step, and by what a softcap shrinks the gradients of its scores. `lse`: [rows, columns]."""
    spec = block.call.spec
    scores = _bound(block.call, products)
    bend = None if spec.softcap is None else 1 - scores * scores
    weights = _power(block.call, scores, lse())
    return _mask(block, step, partial, weights, 0.0), bend  # not of the scores: fewer registers are in use by now


def _differentiate(
    block: Block, step, weigh: Callable, slope: Callable[[], Array], keep: Sequence[str]
) -> tuple[Array, Array]:
    """Weights, which `weigh` finds from products q·k, and the gradients of these. `keep`: what is needed again."""
    (weights, bend), products = _contract_both(block, step, weigh, keep)
    d_scores = weights * (products + slope())
    return weights, d_scores if bend is None else d_scores * bend


def _begin(block: Block) -> None:
    """The first step's first plane is waited for: `_contract_both` waits for those of later steps."""
    if block.call.pieces == 1:
        pl.when(block.steps > 0)(lambda: block.wait(0, 0))


def _contract_both(block: Block, step, work: Callable[[Array], Any], keep: Sequence[str]) -> tuple[Any, Array]:
    """Products with both arrays of the stream; the second one is computed while there is work on the first one."""
    call = block.call
    again = call.tight or call.by_column  # two sums leave few registers
    lefts = [[block.own(name, piece, again) for piece in range(call.pieces)] for name in call.own]
    planes = {name: call.plane(name) for name in call.stream}
    if call.pieces > 1:
        first, second = (
            functools.partial(_contract, block, None, left, step, plane, True, keep=name in keep)
            for left, (name, plane) in zip(lefts, planes.items(), strict=True)
        )
        return work(first()), second()

    def compute(*products):
        for product, (left,), plane in zip(products, lefts, planes.values(), strict=True):
            if plane:
                block.wait(step, plane)
            plgpu.wgmma(product, left, block.refs["planes"].at[block.slot(step, plane)].T)
        found = work(*_settle(block, plgpu.wgmma_accumulator_load(products[0], wait_n=1)))
        leaves, tree = jax.tree.flatten(found)
        found = jax.tree.unflatten(tree, _settle(block, *leaves))
        # The assembler moves nothing past a branch; else it would have the second product waited for before the work.
        pl.when(step + 1 < block.steps)(lambda: block.wait(step + 1, 0))
        return found, plgpu.wgmma_accumulator_load(products[1])

    found = pl.run_scoped(compute, *[plgpu.ACC((HALF, call.columns), jnp.float32)] * 2)
    for name, plane in planes.items():
        if name not in keep:
            block.release(step, plane)
    return found


def _contract_each(
    block: Block, step, sums: dict[str, Array], factors: dict[str, Array], planes: dict[str, int]
) -> dict[str, Array]:
    """Sums to which the products of factors and planes of the stream are added."""
    call = block.call
    if call.pieces == 1:
        products = [
            (_split(block, factors[name]), block.refs["planes"].at[block.slot(step, planes[name])]) for name in sums
        ]
        found = _accumulate(block, list(sums.values()), products)
        for name in sums:
            block.release(step, planes[name])
        return dict(zip(sums, found, strict=True))
    again = len(call.stream) * call.pieces  # planes from here on have not been waited for
    return {
        name: _contract(
            block,
            x,
            _split(block, factors[name]),
            step,
            planes[name],
            False,
            0 if planes[name] >= again else call.pieces,
        )
        for name, x in sums.items()
    }


def _d_queries_rows(block: Block) -> None:
    call, refs, layout = block.call, block.refs, plgpu.Layout.WGMMA
    plgpu.barrier_wait(refs["loaded_own"].at[block.own_slot])
    at = block.b, block.own_head(), pl.ds(block.first_row, HALF)
    lse, slope = (
        functools.partial(
            _along_rows,
            plgpu.load(refs[f"all_{name}"].at[at], layout=layout.reduce(1), optimized=False),
            (HALF, call.columns),
        )
        for name in VECTORS
    )
    keep = ["k"] if call.pieces == 1 else []
    _begin(block)

    def step(i, acc, partial):
        weigh = functools.partial(_weigh, block, i, partial, lse=lse)
        _, d_scores = _differentiate(block, i, weigh, slope, keep)
        return _contract_each(block, i, acc, {"q": d_scores}, {"q": call.plane("k", last=True)})

    acc = block.loop(step, {"q": _fill((HALF, call.width), 0.0, layout)})
    _store(block, "q", acc["q"] * call.spec.scale, "out_q")
    _release_own(block)


def _d_keys_values_rows(block: Block) -> None:
    call, refs, layout = block.call, block.refs, plgpu.Layout.WGMMA
    wanted = [name for name in "kv" if f"out_{name}" in refs]
    plgpu.barrier_wait(refs["loaded_own"].at[block.own_slot])
    keep = [name for name, again in (("q", call.pieces == 1), ("d_out", "v" in wanted)) if again]
    if "k" in wanted:
        _begin(block)

    def step(i, sums, partial):
        nth = block.vectors_slot(i)

        def spread(name):  # only when it is needed: it takes registers
            vector = plgpu.load(refs[name].at[nth], layout=layout.reduce(0))
            return lax.broadcast_in_dim(vector, (HALF, call.columns), [1])

        plgpu.barrier_wait(refs["loaded_vectors"].at[nth])
        weigh = functools.partial(_weigh, block, i, partial, lse=functools.partial(spread, "lse"))
        if "k" in sums:
            weights, d_scores = _differentiate(block, i, weigh, functools.partial(spread, "slope"), keep)
            factors = {"v": weights, "k": d_scores}
            found = _contract_each(block, i, sums, factors, {"v": call.plane("d_out"), "k": call.plane("q", last=True)})
        else:
            own = [block.own("k", piece, again=True) for piece in range(call.pieces)]
            weights, _ = weigh(_contract(block, None, own, i, call.plane("q"), True))
            found = {"v": _contract(block, sums["v"], _split(block, weights), i, call.plane("d_out"), False)}
        plgpu.barrier_arrive(refs["used_vectors"].at[nth])
        return found

    sums = block.loop(step, {name: _fill((HALF, call.width), 0.0, layout) for name in wanted})
    block = block.again()
    for name in wanted:
        _store(block, name, sums[name] * call.spec.scale if name == "k" else sums[name], f"out_{name}")
    _release_own(block)


# The calls.


def _forward(spec: Spec, part: Part, walk: Walk, inputs: Inputs) -> tuple[Array, Array]:
    call = Call.of(spec, part, walk, inputs, ("q",), ("k", "v"), again=False, columns=SIDE)
    outputs = {"out": call.output(), "out_lse": jax.ShapeDtypeStruct(call.output().shape[1:-1], jnp.float32)}
    scratch = {"rows_lse": plgpu.SMEM((call.warpgroups, HALF), jnp.float32)}
    if call.warpgroups > 1:
        scratch["turn"] = plgpu.Barrier(num_arrivals=call.warpgroups)
    out, lse = _call(_forward_rows, "attend_forward", call, walk, inputs, None, outputs, scratch)
    return _join_pieces(out), lse


def _d_queries(spec: Spec, part: Part, walk: Walk, inputs: Inputs, back: Back) -> Array:
    call = Call.of(spec, part, walk, inputs, ("q", "d_out"), ("k", "v"))
    (d_q,) = _call(_d_queries_rows, "attend_d_queries", call, walk, inputs, back, {"out_q": call.output()}, {})
    return _join_pieces(d_q)


def _d_keys_values(spec: Spec, part: Part, walk: Walk, inputs: Inputs, back: Back) -> tuple[Array, Array]:
    """Both at once where the sums of both fit into registers, else one after the other."""

    def run(*names):
        call = Call.of(spec, part, walk, inputs, ("k", "v"), ("q", "d_out"), again="k" in names)
        outputs = {f"out_{name}": call.output() for name in names}
        found = _call(_d_keys_values_rows, "attend_d_keys_values", call, walk, inputs, back, outputs, {})
        return tuple(map(_join_pieces, found))

    widest = NARROW if inputs.q.dtype != jnp.float32 else NARROW // 2
    together = inputs.q.shape[-1] <= widest and spec.softcap is None
    return run("k", "v") if together else run("k") + run("v")


def _split_pieces(x: Array) -> Float[Array, "pieces b h t d"]:
    """Arrays of 16 bits whose sum is x, to the last bit unless numbers are so small that pieces underflow."""
    if x.dtype != jnp.float32:
        return x[None]
    pieces = []
    for _ in range(PIECES):
        pieces.append(lax.reduce_precision(x, 8, 7))  # a conversion there and back would be left out
        x = x - pieces[-1]
    return jnp.stack(pieces).astype(jnp.bfloat16)


def _join_pieces(x: Array) -> Array:
    if len(x) == 1:
        return x[0]
    return functools.reduce(jnp.add, x.astype(jnp.float32)[::-1])


def _call(compute, name: str, call: Call, walk: Walk, inputs: Inputs, back: Back | None, outputs, scratch):
    """One kernel: blocks of threads take the rows of all heads of all sequences in turn, the longest rows first."""
    table = Table.of(call.part, walk, inputs, call.by_column)
    arrays = _arrays(call, table, inputs, back)
    call = dataclasses.replace(call, entries=table.columns.shape[1])

    def body(*refs, **own):
        memory = dict(zip([*arrays, *outputs], refs, strict=True)) | own
        group = lax.axis_index("warpgroup")
        pl.when(group < call.warpgroups)(lambda: _each_row(call, memory, compute, "increase"))
        pl.when(group == call.warpgroups)(lambda: _each_row(call, memory, _load, "decrease"))

    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        scratch_types=call.scratch() | scratch,
        grid=(call.blocks,),
        grid_names=("blocks",),
        num_threads=call.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        **(
            {"interpret": plgpu.InterpretGPUParams()}
            if call.spec.interpret
            else {"compiler_params": plgpu.CompilerParams(approx_math=call.pieces == 1)}  # exp2 of 22 bits
        ),
    )
    return kernel(*arrays.values())


def _each_row(call: Call, refs: dict[str, Any], work: Callable[[Block], None], registers: str) -> None:
    """What a warpgroup does: `work` at each row of its block, with more or with fewer registers."""
    if call.warpgroups > 1:  # with one, each thread has as many as there can be
        plgpu.set_max_registers(REGISTERS[registers], action=registers)

    @plgpu.nd_loop(call.grid, collective_axes="blocks", init_carry=jnp.int32(0))
    def _(turn, carry):
        block = Block.at(call, refs, turn, carry)
        work(block)
        return carry + block.steps

    plgpu.wait_smem_to_gmem(0)


def _arrays(call: Call, table: Table, inputs: Inputs, back: Back | None) -> dict[str, Array]:
    """What a kernel reads, by name."""
    unit = score_unit(call.spec)
    found = {name: jnp.asarray(x, jnp.int32).ravel() for name, x in table._asdict().items()}
    found["members"] = jnp.asarray(call.part.heads, jnp.int32)
    found |= {f"all_{name}": _split_pieces(getattr(inputs, name)) for name in "qkv"}
    if back is None and inputs.sink is not None:
        top = jnp.maximum(inputs.sink / unit, LOWEST)
        found |= {"sink": inputs.sink, "sink_top": top}
        found["sink_total"] = jnp.exp2((inputs.sink / unit - top) * (unit * LOG2E))
    if back is not None:
        found |= {"all_d_out": _split_pieces(back.d_out), "all_lse": back.lse / unit, "all_slope": back.slope}
    if inputs.segments is not None:
        ids = reversed(inputs.segments) if call.by_column else inputs.segments
        found |= dict(zip(("row_ids", "column_ids"), ids, strict=True))
    found["count"] = jnp.arange(SIDE, dtype=jnp.int32)
    if inputs.bits is not None:
        found["bits"] = inputs.bits[call.by_column]
    return found


BACKEND = Backend(_forward, _d_queries, _d_keys_values, pack_bits, OPERATIONS)
