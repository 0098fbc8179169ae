"""Attention over tile lists on Hopper GPUs: Mosaic kernels in which each block of threads computes one row of tiles.

Of a block, two warpgroups have half of the row each and keep its sums in registers; a third loads what the row's tiles
need, some steps ahead. Lists are in global memory: a row says where its entries are, the longest rows come first.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
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
from sparsejax.ops.kernels.mesh import device_kind, run_on_mesh
from sparsejax.ops.request import MASKED, Request

SIDE = 128  # of tiles
WARPGROUPS = 2  # that compute
HALF = SIDE // WARPGROUPS  # rows of one: sums of more do not fit into its registers
NARROW = 128  # heads: sums of wider ones leave few registers
WIDTHS = 64  # heads are padded to multiples: what a swizzled row of shared memory holds
SHARED = 227 * 1024 - 4096  # bytes of a block, without what barriers and log-sum-exps take
REGISTERS = 232, 40  # of a thread that computes, and of one that loads
INTERPRETER_THREADS = 8
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
    dtypes = {request.q.dtype, request.k.dtype, request.v.dtype}
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
            dtypes not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}),
            f"q, k and v in bfloat16 or in float16, to which its products would round all else; got "
            f"{', '.join(sorted(map(str, dtypes)))}",
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
      stream: Arrays of which it needs the columns of each step; those of one group are waited for together.
      columns: Of a step, which is a tile or a part of one.
      stages: How many steps there is room for.
      width: Of heads.
      dtype: Of what is multiplied.
      own_lists: Each sequence has lists of its own.
      tight: Registers are few: heads are wide, or scores need more than a product and a formula.
      entries: Of a list.
    """

    spec: Spec
    part: Part
    by_column: bool
    own: tuple[str, ...]
    stream: tuple[tuple[str, ...], ...]
    columns: int
    stages: int
    width: int
    dtype: Any
    own_lists: bool
    tight: bool
    entries: int = 0

    @classmethod
    def of(cls, spec: Spec, part: Part, walk: Walk, inputs: Inputs, own, stream, by_column=False, columns=64) -> Call:
        width, dtype, segments = inputs.q.shape[-1], inputs.q.dtype, inputs.segments is not None
        tight = width > NARROW or spec.softcap is not None or segments or inputs.bits is not None
        columns = 64 if tight else columns
        stages = (SHARED // (width * dtype.itemsize) - len(own) * SIDE) // (len(stream) * columns)
        own_lists = walk.which.shape[0] > 1 or segments
        return cls(spec, part, by_column, own, stream, columns, min(stages, 3), width, dtype, own_lists, tight)

    @property
    def splits(self) -> int:
        return SIDE // self.columns

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers by name."""
        transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        found = {}
        for name in self.own:
            found[f"own_{name}"] = plgpu.SMEM((WARPGROUPS, HALF, self.width), self.dtype, transforms=transforms)
        for group in self.stream:
            for name in group:
                vector = name in VECTORS
                shape = (self.stages, self.columns) if vector else (self.stages, self.columns, self.width)
                kind = (jnp.float32,) if vector else (self.dtype,)
                found[name] = plgpu.SMEM(shape, *kind, **({} if vector else {"transforms": transforms}))
            found[f"loaded_{group[0]}"] = plgpu.Barrier(num_arrivals=len(group), num_barriers=self.stages)
            found[f"used_{group[0]}"] = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=self.stages)
        found["loaded_own"] = plgpu.Barrier(num_arrivals=len(self.own), num_barriers=WARPGROUPS)
        if self.spec.interpret:
            shape = WARPGROUPS, HALF, self.columns
            found["factor"] = plgpu.SMEM(shape, self.dtype, transforms=transforms)
        return found


VECTORS = ("lse", "slope")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of threads at its row, as one of its warpgroups sees it. `refs`: all memory by name."""

    call: Call
    refs: dict[str, Any]
    b: Any
    member: Any
    row: Any
    start: Any  # of the row's entries
    full: Any
    partial: Any
    group: Any  # warpgroup

    @classmethod
    def here(cls, call: Call, refs: dict[str, Any]) -> Block:
        b, member = lax.axis_index("sequences"), lax.axis_index("heads")
        which = refs["which"][b * len(call.part.heads) + member if call.own_lists else member]
        rows = call.part.stop - call.part.start
        at = (which * rows + lax.axis_index("rows")) * 4
        row, start, full, partial = (refs["rows"][at + i] for i in range(4))
        start = which * call.entries + start
        return cls(call, refs, b, member, row, start, full, partial, lax.axis_index("warpgroup"))

    @property
    def steps(self):
        return (self.full + self.partial) * self.call.splits

    @property
    def first_row(self):
        """Of this warpgroup, among those of the whole array."""
        return (self.call.part.start + self.row) * SIDE + self.group * HALF

    def entry(self, step):
        return self.start + lax.div(step, jnp.int32(self.call.splits))

    def first_column(self, step):
        within = lax.rem(step, jnp.int32(self.call.splits)) * self.call.columns
        return self.refs["columns"][self.entry(step)] * SIDE + within

    def slot(self, step):
        return lax.rem(step, jnp.int32(self.call.stages))

    def own_head(self):
        return self.refs["members"][self.member]

    def stream_head(self, step):
        """Query heads share the head of keys and values; of these, an entry says whose queries it is about."""
        share = self.call.spec.share
        if self.call.by_column:
            return self.own_head() * share + self.refs["heads"][self.entry(step)]
        return lax.div(self.own_head(), jnp.int32(share))

    def own(self, name):
        return self.refs[f"own_{name}"].at[self.group]

    def own_again(self, name):
        """The same, looked up anew."""
        return self.refs[f"own_{name}"].at[self.refs["count"][self.group]]

    def loop(self, step: Callable, carry):
        """`step(i, carry, partial)` for the full tiles, then for the partial ones.

        Where registers are few there are none for what a second loop wants to keep: each step looks what its tile is.
        """
        full = self.full * self.call.splits
        if self.call.tight:
            return lax.fori_loop(0, self.steps, lambda i, carry: step(i, carry, partial=i >= full), carry)
        carry = lax.fori_loop(0, full, functools.partial(step, partial=False), carry)
        return lax.fori_loop(full, self.steps, functools.partial(step, partial=True), carry)

    def wait(self, name, step):
        plgpu.barrier_wait(self.refs[f"loaded_{name}"].at[self.slot(step)])

    def release(self, name, step):
        plgpu.barrier_arrive(self.refs[f"used_{name}"].at[self.slot(step)])


def _load(block: Block) -> None:
    """The columns of all steps, as soon as there is room."""
    call, refs = block.call, block.refs
    plgpu.set_max_registers(REGISTERS[1], action="decrease")

    def load(step, wait: bool):
        head, slot = block.stream_head(step), block.slot(step)
        columns = pl.ds(block.first_column(step), call.columns)
        for group in call.stream:
            if wait:
                plgpu.barrier_wait(refs[f"used_{group[0]}"].at[slot])
            for name in group:
                source, loaded = refs[f"all_{name}"].at[block.b, head, columns], refs[f"loaded_{group[0]}"].at[slot]
                plgpu.copy_gmem_to_smem(source, refs[name].at[slot], loaded)

    pl.loop(0, jnp.minimum(block.steps, call.stages))(functools.partial(load, wait=False))
    pl.loop(call.stages, block.steps)(functools.partial(load, wait=True))


def _load_own(block: Block) -> None:
    loaded, rows = block.refs["loaded_own"].at[block.group], pl.ds(block.first_row, HALF)
    for name in block.call.own:
        source = block.refs[f"all_{name}"].at[block.b, block.own_head(), rows]
        plgpu.copy_gmem_to_smem(source, block.own(name), loaded)
    plgpu.barrier_wait(loaded)


def _multiply(x, y) -> Array:
    """The product of two matrices in shared memory, float32."""

    def compute(acc):
        plgpu.wgmma(acc, x, y)
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32))


def _accumulate(block: Block, acc: Array, x, y, meanwhile: Callable[[], None] = lambda: None) -> Array:
    """The sum acc + x · y, where y and perhaps x are in shared memory; `meanwhile` is done while it is computed.

    Interpret mode has neither accumulators that start with a value nor products with a factor in registers.
    """
    if block.call.spec.interpret:
        factor = x
        if isinstance(x, jax.Array):
            factor = block.refs["factor"].at[block.group]
            factor[...] = x
            plgpu.commit_smem()
        meanwhile()
        return acc + _multiply(factor, y)

    def compute(ref):
        plgpu.wgmma(ref, x, y)
        meanwhile()

    return pl.run_state(compute)(plgpu.ACC.init(acc))


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
    rows = pl.ds(block.group * HALF, HALF)
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
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    _load_own(block)
    head = block.own_head()
    sink = [refs[name][head] for name in ("sink", "sink_top", "sink_total")] if "sink" in refs else None
    top = _fill((HALF,), LOWEST if sink is None else sink[1], layout.reduce(1))
    total = _fill((HALF,), 0.0 if sink is None else sink[2], layout.reduce(1))
    acc = _fill((HALF, call.width), 0.0, layout)
    pl.when(block.steps > 0)(lambda: block.wait("k", 0))
    pl.when(block.group == 1)(lambda: _take_turns(block))

    def step(i, carry, partial):
        acc, top, total = carry
        slot = block.slot(i)
        scores = _multiply_in_turn(block, block.own("q"), refs["k"].at[slot].T)
        block.release("k", i)
        scores = bound_scores(call.spec, scores)
        scores = _mask(block, i, partial, scores, MASKED)
        now = jnp.maximum(top, scores.max(axis=1))
        terms = jnp.exp2((scores - _along_rows(now, shape)) * (unit * LOG2E))
        fade = jnp.exp2((top - now) * (unit * LOG2E))
        acc = acc * _along_rows(fade, acc.shape)
        total = fade * total + terms.sum(axis=1)
        acc, total, now, terms = _settle(block, acc, total, now, terms.astype(call.dtype))
        plgpu.barrier_arrive(refs["turn"])
        block.wait("v", i)
        plgpu.barrier_wait(refs["turn"])
        ahead = functools.partial(pl.when(i + 1 < block.steps), lambda: block.wait("k", i + 1))
        acc = _accumulate(block, acc, terms, refs["v"].at[slot], ahead)
        block.release("v", i)
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
    to = refs["out_lse"].at[block.b, block.member, pl.ds(block.row * SIDE + block.group * HALF, HALF)]
    plgpu.copy_smem_to_gmem(refs["rows_lse"].at[block.group], to)
    plgpu.wait_smem_to_gmem(0)


def _take_turns(block: Block) -> None:
    """One warpgroup multiplies while the other has its softmax."""
    plgpu.barrier_arrive(block.refs["turn"])
    plgpu.barrier_wait(block.refs["turn"])


def _multiply_in_turn(block: Block, x, y) -> Array:
    def compute(acc):
        plgpu.wgmma(acc, x, y)
        _take_turns(block)
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32))


def _store(block: Block, name: str, x: Array, to: str) -> None:
    """What this warpgroup found, by way of the memory that its rows of an input were in."""
    rows = pl.ds(block.row * SIDE + block.group * HALF, HALF)
    block.own(name)[...] = x.astype(block.call.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(block.own(name), block.refs[to].at[block.b, block.member, rows])


def _weigh(block: Block, step, partial: bool, lse: Callable[[], Array]) -> tuple[Array, Array | None]:
    """Weights of a step, and by what a softcap shrinks the gradients of its scores. `lse`: [rows, columns]."""
    call, own, stream = block.call, block.call.own[0], block.call.stream[0][0]
    scores = bound_scores(call.spec, _multiply(block.own_again(own), block.refs[stream].at[block.slot(step)].T))
    bend = None if call.spec.softcap is None else 1 - scores * scores
    weights = jnp.exp2((scores - lse()) * (score_unit(call.spec) * LOG2E))
    return _mask(block, step, partial, weights, 0.0), bend  # not of the scores: fewer registers are in use by now


def _differentiate(block: Block, step, weights: Array, bend: Array | None, slope: Callable[[], Array]) -> Array:
    """The gradient of q·k."""
    own, stream = block.call.own[1], block.call.stream[1][0]
    d_scores = weights * _accumulate(block, slope(), block.own_again(own), block.refs[stream].at[block.slot(step)].T)
    return d_scores if bend is None else d_scores * bend


def _d_queries_rows(block: Block) -> None:
    call, refs, layout = block.call, block.refs, plgpu.Layout.WGMMA
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    _load_own(block)
    at = block.b, block.own_head(), pl.ds(block.first_row, HALF)
    lse, slope = (
        functools.partial(
            _along_rows,
            plgpu.load(refs[f"all_{name}"].at[at], layout=layout.reduce(1), optimized=False),
            (HALF, call.columns),
        )
        for name in VECTORS
    )

    def step(i, acc, partial):
        block.wait("k", i)
        weights, bend = _weigh(block, i, partial, lse)
        block.wait("v", i)
        d_scores = _differentiate(block, i, weights, bend, slope)
        block.release("v", i)
        acc = _accumulate(block, acc, d_scores.astype(call.dtype), refs["k"].at[block.slot(i)])
        block.release("k", i)
        return acc

    acc = block.loop(step, _fill((HALF, call.width), 0.0, layout))
    _store(block, "q", acc * call.spec.scale, "out_q")
    plgpu.wait_smem_to_gmem(0)


def _d_keys_values_rows(block: Block) -> None:
    call, refs, layout = block.call, block.refs, plgpu.Layout.WGMMA
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    _load_own(block)

    def step(i, sums, partial):
        slot, sums = block.slot(i), dict(sums)

        def spread(name):  # only when it is needed: it takes registers
            vector = plgpu.load(refs[name].at[slot], layout=layout.reduce(0))
            return lax.broadcast_in_dim(vector, (HALF, call.columns), [1])

        block.wait("q", i)
        block.wait("d_out", i)
        weights, bend = _weigh(block, i, partial, functools.partial(spread, "lse"))
        if "v" in sums:
            sums["v"] = _accumulate(block, sums["v"], weights.astype(call.dtype), refs["d_out"].at[slot])
        if "k" in sums:
            d_scores = _differentiate(block, i, weights, bend, functools.partial(spread, "slope"))
            sums["k"] = _accumulate(block, sums["k"], d_scores.astype(call.dtype), refs["q"].at[slot])
        block.release("d_out", i)
        block.release("q", i)
        return sums

    wanted = [name for name in "kv" if f"out_{name}" in refs]
    sums = block.loop(step, {name: _fill((HALF, call.width), 0.0, layout) for name in wanted})
    block = Block.here(call, refs)  # read again rather than kept in registers
    for name in wanted:
        _store(block, name, sums[name] * call.spec.scale if name == "k" else sums[name], f"out_{name}")
    plgpu.wait_smem_to_gmem(0)


# The calls.


def _forward(spec: Spec, part: Part, walk: Walk, inputs: Inputs) -> tuple[Array, Array]:
    call = Call.of(spec, part, walk, inputs, ("q",), (("k",), ("v",)), columns=SIDE)
    shape = inputs.q.shape[0], len(part.heads), (part.stop - part.start) * SIDE
    outputs = {
        "out": jax.ShapeDtypeStruct((*shape, call.width), call.dtype),
        "out_lse": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    scratch = {"rows_lse": plgpu.SMEM((WARPGROUPS, HALF), jnp.float32)}
    scratch["turn"] = plgpu.Barrier(num_arrivals=WARPGROUPS)
    return _call(_forward_rows, "attend_forward", call, walk, inputs, None, outputs, scratch)


def _d_queries(spec: Spec, part: Part, walk: Walk, inputs: Inputs, back: Back) -> Array:
    call = Call.of(spec, part, walk, inputs, ("q", "d_out"), (("k",), ("v",)))
    shape = inputs.q.shape[0], len(part.heads), (part.stop - part.start) * SIDE, call.width
    outputs = {"out_q": jax.ShapeDtypeStruct(shape, call.dtype)}
    return _call(_d_queries_rows, "attend_d_queries", call, walk, inputs, back, outputs, {})[0]


def _d_keys_values(spec: Spec, part: Part, walk: Walk, inputs: Inputs, back: Back) -> tuple[Array, Array]:
    """Both at once where the sums of both fit into registers, else one after the other."""
    call = Call.of(spec, part, walk, inputs, ("k", "v"), (("q",), ("d_out", *VECTORS)), by_column=True)
    shape = inputs.q.shape[0], len(part.heads), (part.stop - part.start) * SIDE, call.width
    outputs = {f"out_{name}": jax.ShapeDtypeStruct(shape, call.dtype) for name in "kv"}
    run = functools.partial(_call, _d_keys_values_rows, "attend_d_keys_values", call, walk, inputs, back)
    if call.width <= NARROW and spec.softcap is None:
        return tuple(run(outputs, {}))
    return tuple(run({name: shape}, {})[0] for name, shape in outputs.items())


def _call(compute, name: str, call: Call, walk: Walk, inputs: Inputs, back: Back | None, outputs, scratch):
    """One kernel: a block of threads for each row of each head of each sequence, the longest rows first."""
    table = Table.of(call.part, walk, inputs, call.by_column)
    arrays = _arrays(call, table, inputs, back)
    call = dataclasses.replace(call, entries=table.columns.shape[1])

    def body(*refs, **own):
        block = Block.here(call, dict(zip([*arrays, *outputs], refs, strict=True)) | own)
        pl.when(block.group < WARPGROUPS)(lambda: compute(block))
        pl.when(block.group == WARPGROUPS)(lambda: _load(block))

    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        scratch_types=call.scratch() | scratch,
        grid=(len(call.part.heads), call.part.stop - call.part.start, inputs.q.shape[0]),
        grid_names=("heads", "rows", "sequences"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        **(
            {"interpret": plgpu.InterpretGPUParams()}
            if call.spec.interpret
            else {"compiler_params": plgpu.CompilerParams(approx_math=call.spec.softcap is None)}  # tanh in 11 bits
        ),
    )
    return kernel(*arrays.values())


def _arrays(call: Call, table: Table, inputs: Inputs, back: Back | None) -> dict[str, Array]:
    """What a kernel reads, by name."""
    unit = score_unit(call.spec)
    found = {name: jnp.asarray(x, jnp.int32).ravel() for name, x in table._asdict().items()}
    found["members"] = jnp.asarray(call.part.heads, jnp.int32)
    found |= {"all_q": inputs.q, "all_k": inputs.k, "all_v": inputs.v}
    if back is None and inputs.sink is not None:
        top = jnp.maximum(inputs.sink / unit, LOWEST)
        found |= {"sink": inputs.sink, "sink_top": top}
        found["sink_total"] = jnp.exp2((inputs.sink / unit - top) * (unit * LOG2E))
    if back is not None:
        found |= {"all_d_out": back.d_out, "all_lse": back.lse / unit, "all_slope": back.slope}
    if inputs.segments is not None:
        ids = reversed(inputs.segments) if call.by_column else inputs.segments
        found |= dict(zip(("row_ids", "column_ids"), ids, strict=True))
    found["count"] = jnp.arange(SIDE, dtype=jnp.int32)
    if inputs.bits is not None:
        found["bits"] = inputs.bits[call.by_column]
    return found


BACKEND = Backend(_forward, _d_queries, _d_keys_values, pack_bits, OPERATIONS)
