"""Attention over tile lists on Hopper GPUs: persistent Mosaic GPU kernels that compute row after row of tiles.

There is one thread block per multiprocessor. The lists are in global memory: a table says where the entries of each row
are, longest rows first. `gpu_block` has the memory, loads and products of a block, `gpu_rows` its computations.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from sparsejax.errors import InputError
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.chunks import pad_to_multiple
from sparsejax.ops.device import device_kind
from sparsejax.ops.kernels import flash
from sparsejax.ops.kernels.flash import LOG2E, M_INIT, Backend, Inputs, KernelConfig, Residuals, score_unit
from sparsejax.ops.kernels.gpu_block import (
    LIMBS,
    NARROW_WIDTH,
    TILE_SIDE,
    WARPGROUP_ROWS,
    Block,
    GlobalInputs,
    Launch,
    Memory,
    Operand,
    Outputs,
    RowVectors,
    Sink,
    Table,
    load_operands,
)
from sparsejax.ops.kernels.gpu_rows import compute_dkv, compute_dq, compute_output
from sparsejax.ops.kernels.lists import (
    CHOSEN,
    EMPTY,
    FULL,
    PARTIAL,
    KernelSlice,
    ShardedTiles,
    TileLists,
    TileSchedule,
    pack_words,
    sort_lists,
)
from sparsejax.ops.kernels.mesh import run_on_mesh

WIDTH_MULTIPLE = 64  # heads are padded to the width of a swizzled row of shared memory
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40  # per thread
INTERPRETER_THREADS = 8
CHUNKS = TILE_SIDE, WARPGROUP_ROWS  # a step covers at most 64 keys of a tile with a choice
DTYPES = "bfloat16", "float16", "float32"
HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")
# Primitives that Mosaic GPU lowers for arrays of positions.
OPERATIONS = frozenset(
    {"abs", "add", "and", "broadcast_in_dim", "convert_element_type", "div", "eq", "ge", "gt", "le", "lt", "max", "min"}
    | {"mul", "ne", "neg", "not", "or", "rem", "select_n", "shift_left", "shift_right_arithmetic"}
    | {"shift_right_logical", "sign", "sub", "xor"}
)


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why this implementation cannot serve the call, or None."""
    kind, version = None if call.interpret else device_kind(), jax.__version_info__
    dtypes = {str(x.dtype) for x in (call.q, call.k, call.v)}
    threads = _interpreter_threads()
    reasons = (
        (
            not call.interpret and not HOPPER.search(kind or ""),
            f"device kind {kind!r} is not a Hopper GPU; interpret=True interprets the kernels",
        ),
        (not call.interpret and version < (0, 11), f"jax {jax.__version__} is older than 0.11"),
        (call.interpret and version < (0, 12), f"interpret mode: jax {jax.__version__} is older than 0.12"),
        (
            call.interpret and threads < INTERPRETER_THREADS,
            f"interpret mode needs {INTERPRETER_THREADS} threads, got {threads}; set NPROC before JAX starts",
        ),
        (
            len(dtypes) > 1 or not dtypes <= {*DTYPES},
            f"q, k and v must have one dtype of {', '.join(DTYPES)}; got {', '.join(sorted(dtypes))}",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None) or flash.unsupported_reason(call)


def _interpreter_threads() -> int:
    """Threads of XLA on the CPU. An interpreted block hangs if its warpgroups need more."""
    return int(os.environ.get("NPROC") or os.cpu_count() or 1)


def run(
    call: AttentionCall, tile: tuple[int, int] | None = None, shards: ShardedTiles | None = None
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t h"]]:
    """Returns the output in the dtype of q, and the log-sum-exp in float32.

    Args:
      call: The call to compute.
      tile: Queries and keys per tile; only (128, 128) is supported.
      shards: See `flash.attend_lists`.

    Raises:
      InputError: The tile is not supported.
    """
    if tile not in (None, (TILE_SIDE, TILE_SIDE)):
        raise InputError("tile", f"{tile} is not supported; impl='gpu' has tiles of {(TILE_SIDE, TILE_SIDE)} only")
    return run_on_mesh(functools.partial(_run_locally, shards=shards), call)


def _run_locally(call: AttentionCall, shards: ShardedTiles | None) -> tuple[Array, Array]:
    width = max(call.q.shape[-1], call.v.shape[-1])
    width += -width % WIDTH_MULTIPLE
    padded = {name: pad_to_multiple(getattr(call, name), width, 3) for name in "qkv"}
    out, lse = flash.attend_lists(BACKEND, dataclasses.replace(call, **padded), (TILE_SIDE, TILE_SIDE), shards)
    return out[..., : call.v.shape[-1]], lse


# The lists in global memory.


def build_table(kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs, by_column: bool) -> Table:
    """The table of a launch. Rows are sorted by length, longest first: blocks start in this order."""
    schedule = TileSchedule(jnp.asarray(schedule.list_ids), TileLists(*map(jnp.asarray, schedule.lists)))
    if inputs.segments is not None:
        schedule = _apply_segments(kernel_slice, schedule, inputs.segments, by_column)
    list_ids, lists, _ = schedule
    rows = jnp.arange(kernel_slice.rows, dtype=jnp.int32)
    count = jax.vmap(lambda row, of_kind: jnp.zeros_like(rows).at[row].add(of_kind.astype(jnp.int32)))
    full = count(lists.rows, lists.kinds == FULL)
    partial = count(lists.rows, (lists.kinds == CHOSEN) | (lists.kinds == PARTIAL))
    start = jax.vmap(lambda row: jnp.searchsorted(row, rows))(lists.rows)
    order = jnp.argsort(-(full + partial), axis=1, stable=True)
    table = jnp.stack([jnp.broadcast_to(rows, full.shape), start.astype(jnp.int32), full, partial], axis=-1)
    table = jnp.take_along_axis(table, order[..., None], axis=1)
    choices = None if inputs.choice is None else _index_words(kernel_slice, lists, inputs, by_column)
    arrays = Table(list_ids, table, lists.columns, lists.heads, lists.masks, choices)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32).ravel(), arrays)


def _index_words(kernel_slice: KernelSlice, lists: TileLists, inputs: Inputs, by_column: bool) -> Array:
    """Index of the words of each entry's tile among those of all sequences, scopes and key tiles."""
    assert inputs.choice is not None
    (b, scopes, tiles, _, _), h, n = inputs.choice.words.shape, inputs.q.shape[1], len(lists.rows)
    sequence, owner = jnp.divmod(jnp.arange(n)[:, None], n // b)
    scope = (owner * (h * b // n) + lists.heads) * scopes // h
    return (sequence * scopes + scope) * tiles + (kernel_slice.start + lists.rows if by_column else lists.columns)


def _apply_segments(
    kernel_slice: KernelSlice, schedule: TileSchedule, segments: tuple[Array, Array], by_column: bool
) -> TileSchedule:
    """Lists per sequence: tiles with disjoint segments become empty, full tiles with several segments partial."""
    (list_ids, lists, _), b = schedule, segments[0].shape[0]
    if list_ids.shape[0] == 1:
        sequence = jnp.repeat(jnp.arange(b), lists.rows.shape[0])
        list_ids = list_ids + jnp.arange(b, dtype=list_ids.dtype)[:, None] * lists.rows.shape[0]
        lists = TileLists(*(jnp.tile(x, (b, 1)) for x in lists))
    else:
        sequence = jnp.zeros(lists.rows.shape[0], jnp.int32).at[list_ids].set(jnp.arange(b, dtype=jnp.int32)[:, None])
    tiles = kernel_slice.start + lists.rows, lists.columns
    (low_q, high_q), (low_k, high_k) = (
        [x[sequence[:, None], tile] for x in ends]
        for ends, tile in zip(
            flash.segment_ranges(segments, (TILE_SIDE, TILE_SIDE)), reversed(tiles) if by_column else tiles, strict=True
        )
    )
    overlap = (low_q <= high_k) & (low_k <= high_q)
    single = (low_q == high_q) & (low_k == high_k)
    kinds = jnp.where(overlap, jnp.where(single, lists.kinds, jnp.minimum(lists.kinds, PARTIAL)), EMPTY)
    return TileSchedule(list_ids, sort_lists(lists._replace(kinds=kinds)))


def pack_masks(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packs masks [distinct, queries, keys] as words [distinct, words, rows].

    A word holds 32 columns of a row, the first in the lowest bit. Rows are queries for the forward pass and dq, and
    keys for dk and dv.
    """
    return pack_words(masks.swapaxes(1, 2)), pack_words(masks)


# The launches.


def _forward(
    config: KernelConfig, kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs
) -> tuple[Array, Array]:
    launch = Launch.build(
        config, kernel_slice, schedule, inputs, (Operand.Q,), (Operand.K, Operand.V), reload=False, columns=TILE_SIDE
    )
    out = launch.output()
    outputs = Outputs(out, jax.ShapeDtypeStruct(out.shape[1:-1], jnp.float32))
    results = _launch(compute_output, "attend_forward", launch, schedule, inputs, None, outputs)
    return _join_limbs(results.out), results.lse


def _dq(
    config: KernelConfig, kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs, residuals: Residuals
) -> Array:
    operands = (Operand.Q, Operand.DO), (Operand.K, Operand.V)
    launch = Launch.build(config, kernel_slice, schedule, inputs, *operands)
    outputs = Outputs(dq=launch.output())
    return _join_limbs(_launch(compute_dq, "attend_dq", launch, schedule, inputs, residuals, outputs).dq)


def _dkv(
    config: KernelConfig, kernel_slice: KernelSlice, schedule: TileSchedule, inputs: Inputs, residuals: Residuals
) -> tuple[Array, Array]:
    """Computes both in one launch if the accumulators of both fit into registers, else in two."""

    def compute(with_dk: bool, with_dv: bool) -> Outputs:
        operands = (Operand.K, Operand.V), (Operand.Q, Operand.DO)
        launch = Launch.build(config, kernel_slice, schedule, inputs, *operands, reload=with_dk)
        outputs = Outputs(dk=launch.output() if with_dk else None, dv=launch.output() if with_dv else None)
        return _launch(compute_dkv, "attend_dkv", launch, schedule, inputs, residuals, outputs)

    halvings = (inputs.q.dtype == jnp.float32) + (config.softcap is not None)  # either takes half of the registers
    if inputs.q.shape[-1] <= NARROW_WIDTH >> halvings:
        results = compute(True, True)
        return _join_limbs(results.dk), _join_limbs(results.dv)
    return _join_limbs(compute(True, False).dk), _join_limbs(compute(False, True).dv)


def _split_limbs(x: Array) -> Float[Array, "limbs b h t d"]:
    """16-bit arrays whose sum is x, exactly unless x is so small that limbs underflow."""
    if x.dtype != jnp.float32:
        return x[None]
    limbs = []
    for _ in range(LIMBS):
        limbs.append(lax.reduce_precision(x, 8, 7))  # XLA would elide a conversion to bfloat16 and back
        x = x - limbs[-1]
    return jnp.stack(limbs).astype(jnp.bfloat16)


def _join_limbs(x: Array) -> Array:
    if len(x) == 1:
        return x[0]
    return functools.reduce(jnp.add, x.astype(jnp.float32)[::-1])


def _launch(
    compute: Callable[[Block], None],
    name: str,
    launch: Launch,
    schedule: TileSchedule,
    inputs: Inputs,
    residuals: Residuals | None,
    outputs: Outputs,
) -> Outputs:
    """Runs a kernel whose blocks share the rows of all heads of all sequences, longest rows first."""
    arrays = _global_inputs(launch, schedule, inputs, residuals)
    scratch = launch.shared_memory()
    structure = jax.tree.structure(Memory(arrays, outputs, scratch))
    # Of the scores, the output and dv one each; of dq and dk besides that of dp, which a launch computes once.
    products = 1 + sum(x is not None for x in (outputs.out, outputs.dq, outputs.dk, outputs.dv))
    products += outputs.dq is not None or outputs.dk is not None

    def body(*refs):
        memory = structure.unflatten(refs)
        warpgroup = lax.axis_index("warpgroup")
        consume = functools.partial(_for_each_row, launch, memory, compute, "increase", CONSUMER_REGISTERS)
        produce = functools.partial(_for_each_row, launch, memory, load_operands, "decrease", PRODUCER_REGISTERS)
        pl.when(warpgroup < launch.warpgroups)(consume)
        pl.when(warpgroup == launch.warpgroups)(produce)

    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.tree.leaves(outputs)),
        scratch_types=tuple(jax.tree.leaves(scratch)),
        grid=(launch.blocks,),
        grid_names=("blocks",),
        num_threads=launch.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        cost_estimate=flash.estimate_cost(
            launch.config, launch.kernel_slice, schedule, inputs, products * launch.width, launch.by_column
        ),
        **(
            {"interpret": plgpu.InterpretGPUParams()}
            if launch.config.interpret
            else {"compiler_params": plgpu.CompilerParams(approx_math=launch.limbs == 1)}  # exp2 accurate to 22 bits
        ),
    )
    return jax.tree.unflatten(jax.tree.structure(outputs), kernel(*jax.tree.leaves(arrays)))


def _for_each_row(launch: Launch, memory: Memory, work: Callable[[Block], None], action: str, registers: int) -> None:
    """Sets the number of registers of a warpgroup, then calls `work` at each row of its block."""
    if launch.warpgroups > 1:  # a single consumer has the maximum from the start
        plgpu.set_max_registers(registers, action=action)

    @plgpu.nd_loop(launch.grid, collective_axes="blocks", init_carry=jnp.int32(0))
    def _(loop, carry):
        block = Block.at(launch, memory, loop, steps_before=carry)
        work(block)
        return carry + block.steps

    plgpu.wait_smem_to_gmem(0)


def _global_inputs(launch: Launch, schedule: TileSchedule, inputs: Inputs, residuals: Residuals | None) -> GlobalInputs:
    unit = score_unit(launch.config)
    operands = {Operand.Q: inputs.q, Operand.K: inputs.k, Operand.V: inputs.v}
    vectors, sink, ids, choice = None, None, (None, None), inputs.choice
    table = build_table(launch.kernel_slice, schedule, inputs, launch.by_column)
    if residuals is not None:
        operands[Operand.DO] = residuals.do
        vectors = RowVectors(residuals.lse / unit, residuals.delta)
    elif inputs.sink is not None:
        m = jnp.maximum(inputs.sink / unit, M_INIT)
        sink = Sink(inputs.sink, m, jnp.exp2((inputs.sink / unit - m) * (unit * LOG2E)))
    if inputs.segments is not None:
        ids = reversed(inputs.segments) if launch.by_column else inputs.segments
    return GlobalInputs(
        table,
        jnp.asarray(launch.kernel_slice.heads, jnp.int32),
        {name: _split_limbs(x) for name, x in operands.items()},
        vectors,
        sink,
        *ids,
        jnp.arange(TILE_SIDE, dtype=jnp.int32),
        None if inputs.bits is None else inputs.bits[launch.by_column],
        None if choice is None else choice._replace(words=choice.words.reshape(-1, *choice.words.shape[3:])),
    )


BACKEND = Backend(_forward, _dq, _dkv, pack_masks, CHUNKS, OPERATIONS)
