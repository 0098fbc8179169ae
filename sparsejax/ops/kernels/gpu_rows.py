"""What a block of threads computes of a row of tiles: the output, or the gradients of its queries or of its keys."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from sparsejax.ops.kernels.flash import LOG2E, LOWEST, bound_scores, score_unit
from sparsejax.ops.kernels.gpu_block import (
    HALF,
    SIDE,
    VECTORS,
    Block,
    Call,
    along_rows,
    await_turn,
    contract,
    contract_both,
    contract_each,
    fill,
    offer_turn,
    release_own,
    settle,
    split,
    store,
    take_turns,
)
from sparsejax.ops.softmax import MASKED


def compute_output(block: Block) -> None:
    """A row of queries: the output, and the log-sum-exp of its scores."""
    call, refs = block.call, block.refs
    unit, layout, shape = score_unit(call.spec), plgpu.Layout.WGMMA, (HALF, call.columns)
    plgpu.barrier_wait(refs["loaded_own"].at[block.own_slot])
    head, first_k, first_v = block.own_head(), call.plane("k"), call.plane("v")
    sink = [refs[name][head] for name in ("sink", "sink_top", "sink_total")] if "sink" in refs else None
    top = fill((HALF,), LOWEST if sink is None else sink[1], layout.reduce(1))
    total = fill((HALF,), 0.0 if sink is None else sink[2], layout.reduce(1))
    acc = fill((HALF, call.width), 0.0, layout)
    block.wait_first(0)
    pl.when(block.group == 1)(lambda: take_turns(block))

    def step(i, carry, partial):
        acc, top, total = carry
        own = [block.own("q", piece, again=call.pieces > 1) for piece in range(call.pieces)]
        scores = contract(block, None, own, i, first_k, True, ready=1, meanwhile=lambda: take_turns(block))
        scores = _bound(call, scores)
        scores = _mask(block, i, partial, scores, MASKED)
        now = jnp.maximum(top, scores.max(axis=1))
        terms = _power(call, scores, along_rows(now, shape))
        fade = jnp.exp2((top - now) * (unit * LOG2E))
        acc = acc * along_rows(fade, acc.shape)
        total = fade * total + terms.sum(axis=1)
        acc, total, now, *terms = settle(block, acc, total, now, *split(block, terms))
        offer_turn(block)
        block.wait(i, first_v)
        await_turn(block)
        acc = contract(block, acc, terms, i, first_v, False, ready=1, meanwhile=lambda: block.wait_first(i + 1))
        return acc, now, total

    acc, top, total = block.loop(step, (acc, top, total))
    pl.when(block.group == 0)(lambda: take_turns(block))
    live = total > 0
    safe = jnp.where(live, total, 1.0)
    lse = jnp.where(live, top * unit + jnp.log(safe), -jnp.inf)
    if sink is not None:  # alone in its row, to the last bit
        lse = jnp.where((top == sink[1]) & (total == 1), fill((HALF,), sink[0], layout.reduce(1)), lse)
    refs["rows_lse"].at[block.group][...] = lse
    store(block, "q", acc * along_rows(1 / safe, acc.shape), "out")
    to = refs["out_lse"].at[block.b, block.member, block.rows]
    plgpu.copy_smem_to_gmem(refs["rows_lse"].at[block.group], to)
    release_own(block)


def compute_d_queries(block: Block) -> None:
    """A row of queries: their gradients."""
    call, refs, layout = block.call, block.refs, plgpu.Layout.WGMMA
    plgpu.barrier_wait(refs["loaded_own"].at[block.own_slot])
    at = block.b, block.own_head(), pl.ds(block.first_row, HALF)
    lse, slope = (
        functools.partial(
            along_rows,
            plgpu.load(refs[f"all_{name}"].at[at], layout=layout.reduce(1), optimized=False),
            (HALF, call.columns),
        )
        for name in VECTORS
    )
    keep = ["k"] if call.pieces == 1 else []
    if call.pieces == 1:
        block.wait_first(0)

    def step(i, acc, partial):
        weigh = functools.partial(_weigh, block, i, partial, lse=lse)
        _, d_scores = _differentiate(block, i, weigh, slope, keep)
        return contract_each(block, i, acc, {"q": d_scores}, {"q": call.plane("k", last=True)})

    acc = block.loop(step, {"q": fill((HALF, call.width), 0.0, layout)})
    store(block, "q", acc["q"] * call.spec.scale, "out_q")
    release_own(block)


def compute_d_keys_values(block: Block) -> None:
    """A row of keys: their gradients and those of their values, or only one of these as the call has outputs for."""
    call, refs, layout = block.call, block.refs, plgpu.Layout.WGMMA
    wanted = [name for name in "kv" if f"out_{name}" in refs]
    plgpu.barrier_wait(refs["loaded_own"].at[block.own_slot])
    keep = [name for name, again in (("q", call.pieces == 1), ("d_out", "v" in wanted)) if again]
    if "k" in wanted and call.pieces == 1:
        block.wait_first(0)

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
            found = contract_each(block, i, sums, factors, {"v": call.plane("d_out"), "k": call.plane("q", last=True)})
        else:
            own = [block.own("k", piece, again=True) for piece in range(call.pieces)]
            weights, _ = weigh(contract(block, None, own, i, call.plane("q"), True))
            found = {"v": contract(block, sums["v"], split(block, weights), i, call.plane("d_out"), False)}
        plgpu.barrier_arrive(refs["used_vectors"].at[nth])
        return found

    sums = block.loop(step, {name: fill((HALF, call.width), 0.0, layout) for name in wanted})
    block = block.again()
    for name in wanted:
        store(block, name, sums[name] * call.spec.scale if name == "k" else sums[name], f"out_{name}")
    release_own(block)


# Scores, their masks and weights.


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


def _weigh(block: Block, step, partial, products: Array, lse: Callable[[], Array]) -> tuple[Array, Array]:
    """Weights of a step as factors of products, and their derivatives by q·k. `lse`: [rows, columns]."""
    call = block.call
    scores = _bound(call, products)
    weights = _power(call, scores, lse())
    weights = _mask(block, step, partial, weights, 0.0)  # not the scores: fewer registers are in use by now
    slopes = weights if call.spec.softcap is None else weights * (1 - scores * scores)
    return weights.astype(call.dtype) if call.pieces == 1 else weights, slopes


def _differentiate(
    block: Block, step, weigh: Callable, slope: Callable[[], Array], keep: Sequence[str]
) -> tuple[Array, Array]:
    """Weights, which `weigh` finds from products q·k, and the gradients of these. `keep`: what is needed again."""
    (weights, slopes), products = contract_both(block, step, weigh, keep)
    return weights, slopes * (products + slope())


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
        words = along_rows(words, column.shape)
        word = words if word is None else jnp.where(column >= 32 * i, words, word)
    return lax.shift_right_logical(word, column & 31) & 1 != 0
