"""Attention over tile lists on Hopper GPUs: Mosaic kernels in which blocks of threads compute row after row of tiles.

There is one block for each multiprocessor. Lists are in global memory: a row says where its entries are, the longest
rows come first. `gpu_block` is what a block has and does, `gpu_rows` what it computes.
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

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.chunks import fill_chunks
from sparsejax.ops.kernels import flash
from sparsejax.ops.kernels.flash import LOG2E, LOWEST, Back, Backend, Inputs, Spec, score_unit
from sparsejax.ops.kernels.gpu_block import HALF, NARROW, PIECES, SIDE, Block, Call, load
from sparsejax.ops.kernels.gpu_rows import compute_d_keys_values, compute_d_queries, compute_output
from sparsejax.ops.kernels.lists import EMPTY, FULL, PARTIAL, Part, TileLists, Walk, pack_words, sort_lists
from sparsejax.ops.kernels.mesh import device_kind, run_on_mesh

WIDTHS = 64  # heads are padded to multiples: what a swizzled row of shared memory holds
REGISTERS = {"increase": 232, "decrease": 40}  # of a thread that computes, and of one that loads
INTERPRETER_THREADS = 8
DTYPES = "bfloat16", "float16", "float32"
KINDS = re.compile(r"\bG?H(100|200|800|20)\b")
# What the compiler has an instruction for, with positions of a tile as operands.
OPERATIONS = frozenset(
    {"abs", "add", "and", "broadcast_in_dim", "convert_element_type", "div", "eq", "ge", "gt", "le", "lt", "max", "min"}
    | {"mul", "ne", "neg", "not", "or", "rem", "select_n", "shift_left", "shift_right_arithmetic"}
    | {"shift_right_logical", "sign", "sub", "xor"}
)


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot serve the call, or None."""
    kind, version = None if call.interpret else device_kind(), jax.__version_info__
    dtypes = {str(x.dtype) for x in (call.q, call.k, call.v)}
    reasons = (
        (
            not call.interpret and not (KINDS.search(kind) and version >= (0, 11)),
            f"it needs a Hopper GPU and jax 0.11 or newer, or interpret=True; here: {kind}, jax {jax.__version__}",
        ),
        (
            call.interpret and version < (0, 12),
            f"interpreting it needs jax 0.12 or newer, here is {jax.__version__}",
        ),
        (
            call.interpret and _threads() < INTERPRETER_THREADS,
            f"interpreting it needs {INTERPRETER_THREADS} threads, here are {_threads()}: set NPROC before JAX starts",
        ),
        (
            len(dtypes) > 1 or not dtypes <= {*DTYPES},
            f"q, k and v all in {', or all in '.join(DTYPES)}; got {', '.join(sorted(dtypes))}",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None) or flash.unsupported_reason(call)


def _threads() -> int:
    """Of XLA on the CPU. With fewer than wait for each other in an interpreted block, it hangs."""
    return int(os.environ.get("NPROC") or os.cpu_count() or 1)


def run(
    call: AttentionCall, tile: tuple[int, int] | None = None, selected: Int[Array, "#b h rows k"] | None = None
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Output in the dtype of q, log-sum-exp in float32.

    Args:
      call: what is asked.
      tile: queries and keys of a tile; (128, 128) is all there is.
      selected: as in `flash.attend_lists`.

    Raises:
      ValueError: another tile.
    """
    if tile not in (None, (SIDE, SIDE)):
        raise ValueError(f"attend: gpu: tiles of ({SIDE}, {SIDE}), got {tile}")
    if selected is not None:
        return _run_here(call, selected)
    return run_on_mesh(functools.partial(_run_here, selected=None), call)


def _run_here(call: AttentionCall, selected: Array | None) -> tuple[Array, Array]:
    width = max(call.q.shape[-1], call.v.shape[-1])
    width += -width % WIDTHS
    wide = {name: fill_chunks(getattr(call, name), width, 3) for name in "qkv"}
    out, lse = flash.attend_lists(BACKEND, dataclasses.replace(call, **wide), (SIDE, SIDE), selected)
    return out[..., : call.v.shape[-1]], lse


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


# The calls.


def _forward(spec: Spec, part: Part, walk: Walk, inputs: Inputs) -> tuple[Array, Array]:
    call = Call.of(spec, part, walk, inputs, ("q",), ("k", "v"), again=False, columns=SIDE)
    outputs = {"out": call.output(), "out_lse": jax.ShapeDtypeStruct(call.output().shape[1:-1], jnp.float32)}
    scratch = {"rows_lse": plgpu.SMEM((call.warpgroups, HALF), jnp.float32)}
    if call.warpgroups > 1:
        scratch["turn"] = plgpu.Barrier(num_arrivals=call.warpgroups)
    out, lse = _call(compute_output, "attend_forward", call, walk, inputs, None, outputs, scratch)
    return _join_pieces(out), lse


def _d_queries(spec: Spec, part: Part, walk: Walk, inputs: Inputs, back: Back) -> Array:
    call = Call.of(spec, part, walk, inputs, ("q", "d_out"), ("k", "v"))
    (d_q,) = _call(compute_d_queries, "attend_d_queries", call, walk, inputs, back, {"out_q": call.output()}, {})
    return _join_pieces(d_q)


def _d_keys_values(spec: Spec, part: Part, walk: Walk, inputs: Inputs, back: Back) -> tuple[Array, Array]:
    """Both at once where the sums of both fit into registers, else one after the other."""

    def run(*names):
        call = Call.of(spec, part, walk, inputs, ("k", "v"), ("q", "d_out"), again="k" in names)
        outputs = {f"out_{name}": call.output() for name in names}
        found = _call(compute_d_keys_values, "attend_d_keys_values", call, walk, inputs, back, outputs, {})
        return tuple(map(_join_pieces, found))

    less_room = (inputs.q.dtype == jnp.float32) + (spec.softcap is not None)
    together = inputs.q.shape[-1] <= NARROW >> less_room
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
        pl.when(group == call.warpgroups)(lambda: _each_row(call, memory, load, "decrease"))

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
