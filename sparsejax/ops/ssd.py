"""State space duality: linear attention with decay, in chunks (Mamba-2, arXiv:2405.21060).

Per head, with a state of p x n numbers that decay alike:

    S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]^T
    y[t] = S[t] C[t]

Inside a chunk this is a masked matrix product, y = (L * C B^T) (dt x) with L[i, j] = exp(sum of dt A from j + 1 to i);
the state is carried from chunk to chunk. The backward pass keeps one state per chunk and recomputes the rest. With
dt = 1 this is lightning attention (arXiv:2401.04658).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.broadcast import multiply
from sparsejax.ops.chunks import CHUNK, batch_matmul, pad_to_multiple, require_shapes, scan_chunks
from sparsejax.ops.device import on_cpu
from sparsejax.ops.sequence import carry_state, divides, map_shards

BLOCK = 32  # positions per matrix on a CPU
UNROLLED = 8  # blocks whose states are computed without a loop


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    state: Float[Array, "b h p n"] | None = None,
    starts: Bool[Array, "b t"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The recurrence above, computed in float32.

    Args:
      x: Input.
      dt: Step sizes, not negative.
      A: Decay rates, not positive.
      B: Input weights; group i serves heads i h / g to (i + 1) h / g - 1.
      C: Output weights, grouped likewise.
      state: The state before the first position; defaults to zeros.
      starts: True where a document begins; the state before it counts as zeros.
      chunk: Positions per chunk; does not change the result.

    Returns:
      The output in the dtype of `x`, and the state after the last position in float32.
    """
    weights = {"A": (A, "h"), "B": (B, "b t g n"), "C": (C, "b t g n")}
    require_shapes(x=(x, "b t h p"), dt=(dt, "b t h"), **weights, state=(state, "b h p n"), starts=(starts, "b t"))
    (b, t, h, p), n = x.shape, B.shape[3]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((b, h, p, n), dtype) if state is None else state.astype(dtype)
    if divides(t):
        sharded = (*(a.astype(dtype) for a in (x, dt, B, C)), starts)
        arguments = sharded, (A.astype(dtype), state)
        y, states = map_shards(functools.partial(_scan_shard, chunk), *arguments, outputs=(1, 0))
        return y.astype(x.dtype), states[-b:]
    dt, A = dt.astype(dtype), A.astype(dtype)
    starts = jnp.zeros((b, t), bool) if starts is None else starts
    inputs = multiply(x.astype(dtype), dt[..., None]), multiply(dt, A), B.astype(dtype), C.astype(dtype), starts
    # Padding has decay 1 and adds nothing, so it leaves the state unchanged.
    state, y = scan_chunks(_run_chunk, state, inputs, chunk)
    return y.astype(x.dtype), state


def _scan_shard(
    chunk: int, inputs: tuple[Array, Array, Array, Array, Array | None], replicated: tuple[Array, Array]
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The output of a shard, and the state after it; what a shard adds to the state is one product."""
    (x, dt, B, C, starts), (A, state) = inputs, replicated
    (b, t, h, p), g = x.shape, B.shape[2]
    decay = multiply(dt, A)
    later = jnp.cumsum(decay[:, ::-1], axis=1)[:, ::-1] - decay  # from after each position to the end
    weight, total = jnp.exp(later), jnp.exp(decay.sum(axis=1))
    if starts is not None:
        document = jnp.cumsum(starts, axis=1)
        weight = jnp.where((document == document[:, -1:])[..., None], weight, 0)
        total = jnp.where(document[:, -1:] == 0, total, 0)
    weighted = multiply(x, (dt * weight)[..., None]).reshape(b, t, g, h // g, p)
    added = jnp.einsum("btgrp,btgn->bgrpn", weighted, B).reshape(state.shape)
    before, after = carry_state(total[..., None, None], added, state)
    return ssd(x, dt, A, B, C, before, starts, chunk)[0], after


def _run_chunk(
    state: Float[Array, "b h p n"], chunk: tuple[Array, Array, Array, Array, Array]
) -> tuple[Float[Array, "b h p n"], Float[Array, "b c h p"]]:
    """The state after a chunk, and its outputs; blocks of the chunk run side by side, from zeros."""
    (b, c), size = chunk[0].shape[:2], _block_size(chunk[0].shape[1])
    x, decay, B, C, starts = (pad_to_multiple(a, size, 1).reshape(-1, size, *a.shape[2:]) for a in chunk)
    (_, _, h, p), (g, n) = x.shape, B.shape[2:]
    document = jnp.cumsum(starts, axis=1)  # 0: the document of the incoming state
    state_decay = jnp.exp(jnp.cumsum(decay, axis=1)) * (document == 0)[..., None]  # [bk, c, h], of the incoming state
    matrix = decay_matrix(decay, document)
    last = jnp.moveaxis(matrix[:, :, -1], 1, -1)  # [bk, c, h]: decay from each position to the end of the block
    B, C = jnp.moveaxis(B, 2, 1), jnp.moveaxis(C, 2, 1)  # [bk, g, c, n]
    scores = batch_matmul(C, jnp.swapaxes(B, 2, 3))[:, :, None]
    weights = multiply(matrix.reshape(-1, g, h // g, size, size), scores).reshape(matrix.shape)
    y = jnp.moveaxis(batch_matmul(weights, jnp.moveaxis(x, 2, 1)), 1, 2)
    left = _fold_heads(multiply(x, last[..., None]), g)
    added = batch_matmul(jnp.swapaxes(left, 2, 3), B).reshape(b, -1, h, p, n)
    state, states = _pass_states(state, state_decay[:, -1].reshape(b, -1, h), added)
    states = states.reshape(-1, g, h // g * p, n)
    from_state = jnp.moveaxis(batch_matmul(C, jnp.swapaxes(states, 2, 3)), 1, 2).reshape(x.shape)
    y = y + multiply(from_state, state_decay[..., None])
    return state, y.reshape(b, -1, h, p)[:, :c]


def _block_size(chunk: int) -> int:
    """Positions per matrix: its products take as many operations per position, which a CPU takes one after another."""
    return min(BLOCK, chunk) if on_cpu() else chunk


def _fold_heads(x: Float[Array, "b c h p"], groups: int) -> Float[Array, "b g c rp"]:
    """The features of the heads of each group side by side."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], groups, -1), 2, 1)


def _pass_states(
    state: Float[Array, "b h p n"], decay: Float[Array, "b k h"], added: Float[Array, "b k h p n"]
) -> tuple[Float[Array, "b h p n"], Float[Array, "b k h p n"]]:
    """The state after all blocks, and the states before each, given what a block leaves of a state and adds to it."""

    def advance(state: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, added = block
        return multiply(state, decay[..., None, None]) + added, state

    blocks = jnp.moveaxis(decay, 1, 0), jnp.moveaxis(added, 1, 0)
    state, states = jax.lax.scan(advance, state, blocks, unroll=min(UNROLLED, added.shape[1]))
    return state, jnp.moveaxis(states, 0, 1)


def decay_matrix(decay: Float[Array, "b c h"], document: Int[Array, "b c"]) -> Float[Array, "b h c c"]:
    """L[i, j] = exp(sum of decay from j + 1 to i) if j is not after i and in its document, else 0.

    Each sum is computed on its own, by a product with a triangle of ones: a difference of cumulative sums would lose
    the digits of the longer one. Sums are masked before the exponential, which could overflow.
    """
    c = decay.shape[1]
    triangle = jnp.tri(c, dtype=decay.dtype)
    after = triangle - jnp.eye(c, dtype=decay.dtype)  # [k, j]: k is after j
    sums = jnp.einsum("ik,bkh,kj->bhij", triangle, decay, after, precision=jax.lax.Precision.HIGHEST)
    connected = (triangle > 0) & (document[:, :, None] == document[:, None, :])
    return jnp.exp(jnp.where(connected[:, None], sums, -jnp.inf))
