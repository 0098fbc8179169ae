"""Computations of a thread block for a row of tiles: the output, dq, or dk and dv.

Equations are those of FlashAttention-2 (arXiv:2307.08691); `flash` lists the names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sparsejax.ops.kernels.choice import WORD
from sparsejax.ops.kernels.flash import LOG2E, M_INIT, score_unit, unit_scores
from sparsejax.ops.kernels.gpu_block import (
    TILE_SIDE,
    WARPGROUP_ROWS,
    Block,
    Launch,
    Operand,
    Product,
    RowVectors,
    Sink,
    accumulate_products,
    broadcast_rows,
    full,
    materialize,
    multiply,
    multiply_overlapped,
    ping_pong_arrive,
    ping_pong_sync,
    ping_pong_wait,
    release_stationary,
    split_limbs,
    store,
)
from sparsejax.ops.softmax import MASKED


def compute_output(block: Block) -> None:
    """Computes the output of a row of queries and the log-sum-exp of its scores (Algorithm 1)."""
    launch, inputs, shared = block.launch, block.inputs, block.shared
    unit, layout, shape = score_unit(launch.config), plgpu.Layout.WGMMA, (WARPGROUP_ROWS, launch.columns)
    plgpu.barrier_wait(shared.stationary_loaded.at[block.stationary_slot])
    head, k_plane, v_plane = block.row_head(), launch.plane(Operand.K), launch.plane(Operand.V)
    sink = None if inputs.sink is None else Sink(*(ref[head] for ref in inputs.sink))
    m = full((WARPGROUP_ROWS,), M_INIT if sink is None else sink.m, layout.reduce(1))
    l = full((WARPGROUP_ROWS,), 0.0 if sink is None else sink.l, layout.reduce(1))
    acc = full((WARPGROUP_ROWS, launch.width), 0.0, layout)
    block.wait_first(0)
    pl.when(block.warpgroup == 1)(lambda: ping_pong_sync(block))

    def step(i, carry, partial):
        acc, m_prev, l = carry
        q = [block.stationary(Operand.Q, limb, reload=launch.limbs > 1) for limb in range(launch.limbs)]
        qk = multiply(block, None, q, i, k_plane, True, ready=1, meanwhile=lambda: ping_pong_sync(block))
        s = _mask(block, i, partial, _unit_scores(launch, qk), MASKED)  # line 8
        m = jnp.maximum(m_prev, s.max(axis=1))  # line 9
        p = _exp_difference(launch, s, broadcast_rows(m, shape))
        alpha = jnp.exp2((m_prev - m) * (unit * LOG2E))
        acc = acc * broadcast_rows(alpha, acc.shape)
        l = alpha * l + p.sum(axis=1)
        acc, l, m, *p = materialize(block, acc, l, m, *split_limbs(block, p))
        ping_pong_arrive(block)
        block.wait(i, v_plane)
        ping_pong_wait(block)
        acc = multiply(block, acc, p, i, v_plane, False, ready=1, meanwhile=lambda: block.wait_first(i + 1))  # line 10
        return acc, m, l

    acc, m, l = block.for_each_step(step, (acc, m, l))
    pl.when(block.warpgroup == 0)(lambda: ping_pong_sync(block))
    live = l > 0
    safe = jnp.where(live, l, 1.0)
    lse = jnp.where(live, m * unit + jnp.log(safe), -jnp.inf)  # line 13
    if sink is not None:  # in a row without keys the lse is the sink itself, to the last bit
        lse = jnp.where((m == sink.m) & (l == 1), full((WARPGROUP_ROWS,), sink.logit, layout.reduce(1)), lse)
    staging = shared.lse.at[block.warpgroup]
    staging[...] = lse
    store(block, acc * broadcast_rows(1 / safe, acc.shape), Operand.Q, block.outputs.out)  # line 12
    plgpu.copy_smem_to_gmem(staging, block.outputs.lse.at[block.b, block.local_head, block.output_rows])
    release_stationary(block)


def compute_dq(block: Block) -> None:
    """Computes dq of a row of queries (Algorithm 2, line 15, with the loops exchanged)."""
    launch, layout = block.launch, plgpu.Layout.WGMMA
    plgpu.barrier_wait(block.shared.stationary_loaded.at[block.stationary_slot])
    at = block.b, block.row_head(), pl.ds(block.first_row, WARPGROUP_ROWS)
    vectors = RowVectors(
        *(
            functools.partial(
                broadcast_rows,
                plgpu.load(vector.at[at], layout=layout.reduce(1), optimized=False),
                (WARPGROUP_ROWS, launch.columns),
            )
            for vector in block.inputs.vectors
        )
    )
    keep = [Operand.K] if launch.limbs == 1 else []
    if launch.limbs == 1:
        block.wait_first(0)

    def step(i, dq, partial):
        _, ds = _differentiate(block, i, partial, vectors, keep)
        (dq,) = accumulate_products(block, i, [Product(dq, ds, launch.plane(Operand.K, last=True))])
        return dq

    dq = block.for_each_step(step, full((WARPGROUP_ROWS, launch.width), 0.0, layout))
    store(block, dq * launch.config.scale, Operand.Q, block.outputs.dq)
    release_stationary(block)


def compute_dkv(block: Block) -> None:
    """Computes dk, dv or both of a row of keys, as the kernel has outputs (Algorithm 2, lines 12 and 16)."""
    launch, outputs, shared, layout = block.launch, block.outputs, block.shared, plgpu.Layout.WGMMA
    plgpu.barrier_wait(shared.stationary_loaded.at[block.stationary_slot])
    with_dk, with_dv = outputs.dk is not None, outputs.dv is not None
    keep = [Operand.Q] if launch.limbs == 1 else []
    keep += [Operand.DO] if with_dv else []
    if with_dk and launch.limbs == 1:
        block.wait_first(0)

    def step(i, carry, partial):
        dk, dv = carry
        slot = block.vectors_slot(i)

        def broadcast(ref):  # not before it is needed: it takes registers
            vector = plgpu.load(ref.at[slot], layout=layout.reduce(0))
            return lax.broadcast_in_dim(vector, (WARPGROUP_ROWS, launch.columns), [1])

        plgpu.barrier_wait(shared.vectors_loaded.at[slot])
        vectors = RowVectors(*(functools.partial(broadcast, ref) for ref in shared.vectors))
        if with_dk:
            p, ds = _differentiate(block, i, partial, vectors, keep)
            products = [Product(dk, ds, launch.plane(Operand.Q, last=True))]
            products += [Product(dv, p, launch.plane(Operand.DO))] if with_dv else []
            dk, *rest = accumulate_products(block, i, products)
            dv = rest[0] if with_dv else None
        else:
            k = [block.stationary(Operand.K, limb, reload=True) for limb in range(launch.limbs)]
            kq = multiply(block, None, k, i, launch.plane(Operand.Q), True)
            p, _ = _probabilities(block, i, partial, vectors, kq)
            dv = multiply(block, dv, split_limbs(block, p), i, launch.plane(Operand.DO), False)
        plgpu.barrier_arrive(shared.vectors_consumed.at[slot])
        return dk, dv

    zeros = [full((WARPGROUP_ROWS, launch.width), 0.0, layout) if wanted else None for wanted in (with_dk, with_dv)]
    dk, dv = block.for_each_step(step, tuple(zeros))
    block = block.reload()
    if with_dk:
        store(block, dk * launch.config.scale, Operand.K, outputs.dk)
    if with_dv:
        store(block, dv, Operand.V, outputs.dv)
    release_stationary(block)


# Scores, masks and probabilities of a step.


def _unit_scores(launch: Launch, qk: Array) -> Array:
    """`unit_scores`. In 16 bits, without the tanh of the device, which is either slow or accurate to 11 bits."""
    config = launch.config
    if config.softcap is None or launch.limbs > 1:
        return unit_scores(config, qk)
    exp_2x = jnp.exp2(qk * (2 * LOG2E * config.scale / config.softcap))
    return 1 - 2 * lax.square(lax.rsqrt(1 + exp_2x))  # tanh x = 1 - 2 / (1 + exp 2x)


def _exp_difference(launch: Launch, s: Array, offset: Array) -> Array:
    """exp(s - offset), of scores in units of `score_unit`."""
    factor = score_unit(launch.config) * LOG2E
    if launch.limbs > 1:
        return jnp.exp2((s - offset) * factor)  # the difference is exact
    return jnp.exp2(s * factor - offset * factor)  # one instruction per score; accurate enough for 16 bits


def _probabilities(block: Block, step, partial, vectors: RowVectors, qk: Array) -> tuple[Array, Array]:
    """Returns p as a factor of products, and p * dtanh, from the products q·k of a step (Algorithm 2, lines 10, 11).

    `vectors`: functions that broadcast lse and delta over the scores.
    """
    launch = block.launch
    s = _unit_scores(launch, qk)
    p = _exp_difference(launch, s, vectors.lse())
    p = _mask(block, step, partial, p, 0.0)  # p instead of s: fewer registers are live by now
    dtanh = None if launch.config.softcap is None else 1 - s * s
    return p.astype(launch.dtype) if launch.limbs == 1 else p, p if dtanh is None else p * dtanh


def _differentiate(block: Block, step, partial, vectors: RowVectors, keep: Sequence[Operand]) -> tuple[Array, Array]:
    """Returns p and the gradient of q·k up to the scale (Algorithm 2, lines 10, 11, 13 and 14)."""
    transform = functools.partial(_probabilities, block, step, partial, vectors)
    (p, p_dtanh), dp = multiply_overlapped(block, step, transform, keep)
    return p, p_dtanh * (dp - vectors.delta())


def _mask(block: Block, step, partial, x: Array, masked: float) -> Array:
    """Replaces scores or probabilities of pairs that are not allowed, which only partial tiles have."""
    if isinstance(partial, bool):
        return _mask_partial(block, step, x, masked) if partial else x
    return lax.cond(partial, lambda: _mask_partial(block, step, x, masked), lambda: x)


def _mask_partial(block: Block, step, x: Array, masked: float) -> Array:
    launch, inputs, shape, layout = block.launch, block.inputs, x.shape, plgpu.Layout.WGMMA
    if inputs.choice is not None:
        x = jnp.where(_unpack_choice(block, step, shape), x, masked)
    config, start = launch.config, block.first_column(step)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    column = plgpu.load(inputs.iota.at[pl.ds(0, shape[1])], layout=layout.reduce(0), optimized=False)
    column = lax.broadcast_in_dim(column, shape, [1])
    if inputs.bits is not None:
        allowed = _unpack_mask(block, step, column)
    else:
        positions = block.first_row + row, start + column
        q, k = reversed(positions) if launch.by_column else positions
        allowed = config.pattern.allows(q, k, config.t, config.s)
        allowed = allowed & (k < config.s) if config.s % TILE_SIDE else allowed
    if inputs.row_ids is None:
        return jnp.where(allowed, x, masked)
    row_ids, column_ids = (
        lax.broadcast_in_dim(
            plgpu.load(ids.at[block.b, pl.ds(first, size)], layout=layout.reduce(1 - axis), optimized=False),
            shape,
            [axis],
        )
        for axis, (ids, first, size) in enumerate(
            ((inputs.row_ids, block.first_row, WARPGROUP_ROWS), (inputs.column_ids, start, launch.columns))
        )
    )
    return jnp.where(allowed & (row_ids == column_ids), x, masked)


def _unpack_mask(block: Block, step, column: Array) -> Array:
    """The part of a tile's mask that a step needs, packed by `pack_masks`."""
    launch, inputs = block.launch, block.inputs
    mask = inputs.table.masks[block.entry(step)]
    first = lax.rem(step, jnp.int32(launch.splits)) * (launch.columns // 32)
    rows = pl.ds(block.half * WARPGROUP_ROWS, WARPGROUP_ROWS)
    word = None
    for i in range(launch.columns // 32):
        ref = inputs.bits.at[mask, first + i, rows]
        words = broadcast_rows(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False), column.shape)
        word = words if word is None else jnp.where(column >= 32 * i, words, word)
    return lax.shift_right_logical(word, column & 31) & 1 != 0


def _unpack_choice(block: Block, step, shape: tuple[int, int]) -> Array:
    """Whether queries chose the blocks of keys, see `choice.Choice`."""
    launch, (words, numbers) = block.launch, block.inputs.choice
    rows, columns = (block.first_row, shape[0], 0), (block.first_column(step), shape[1], 1)
    (q_start, q_size, q_axis), (k_start, k_size, k_axis) = (columns, rows) if launch.by_column else (rows, columns)

    def load(ref, start, size, axis):
        vector = plgpu.load(ref.at[pl.ds(start, size)], layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)
        return lax.broadcast_in_dim(vector, shape, [axis])

    number = load(numbers.at[block.b if numbers.shape[0] > 1 else 0], k_start, k_size, k_axis)
    index, chunks, word = block.inputs.table.choices[block.entry(step)], TILE_SIDE // launch.config.chunk, None
    parts = words.shape[1] // chunks
    first = lax.div(lax.rem(k_start, jnp.int32(TILE_SIDE)), jnp.int32(launch.config.chunk)) * parts if chunks > 1 else 0
    for part in range(parts):
        of_part = load(words.at[index, first + part], q_start, q_size, q_axis)
        word = of_part if word is None else jnp.where(number >= WORD * part, of_part, word)
    return word & (1 << (number & (WORD - 1))) != 0
