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

from sparsejax.ops.chunks import CHUNK, broadcast_axis, require_shapes, scan_chunks
from sparsejax.ops.sequence import carry_state, divides, map_shards


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
    decay = dt.astype(dtype) * A.astype(dtype)
    inputs = (x.astype(dtype) * broadcast_axis(dt.astype(dtype), p), decay, B.astype(dtype), C.astype(dtype))
    inputs += (jnp.zeros((b, t), bool) if starts is None else starts,)
    # Padding has decay 1 and adds nothing, so it leaves the state unchanged.
    state, y = scan_chunks(_run_chunk, state, inputs, chunk)
    return y.astype(x.dtype), state


def _scan_shard(
    chunk: int, inputs: tuple[Array, Array, Array, Array, Array | None], replicated: tuple[Array, Array]
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The output of a shard, and the state after it; what a shard adds to the state is one product."""
    (x, dt, B, C, starts), (A, state) = inputs, replicated
    (b, t, h, p), g = x.shape, B.shape[2]
    decay = dt * A
    later = jnp.cumsum(decay[:, ::-1], axis=1)[:, ::-1] - decay  # from after each position to the end
    weight, total = jnp.exp(later), jnp.exp(decay.sum(axis=1))
    if starts is not None:
        document = jnp.cumsum(starts, axis=1)
        weight = jnp.where((document == document[:, -1:])[..., None], weight, 0)
        total = jnp.where(document[:, -1:] == 0, total, 0)
    weighted = (x * (dt * weight)[..., None]).reshape(b, t, g, h // g, p)
    added = jnp.einsum("btgrp,btgn->bgrpn", weighted, B).reshape(state.shape)
    before, after = carry_state(total[..., None, None], added, state)
    return ssd(x, dt, A, B, C, before, starts, chunk)[0], after


def _run_chunk(
    state: Float[Array, "b h p n"], chunk: tuple[Array, Array, Array, Array, Array]
) -> tuple[Float[Array, "b h p n"], Float[Array, "b c h p"]]:
    """The state after a chunk, and its outputs."""
    x, decay, B, C, starts = chunk
    (b, c, h, p), (g, n) = x.shape, B.shape[2:]
    document = jnp.cumsum(starts, axis=1)  # 0: the document of the incoming state
    state_decay = jnp.exp(jnp.cumsum(decay, axis=1)) * (document == 0)[..., None]  # [b, c, h], of the incoming state
    matrix = decay_matrix(decay, document)
    last = jnp.moveaxis(matrix[:, :, -1], 1, -1)  # [b, c, h]: decay from each position to the end of the chunk
    heads = x.reshape(b, c, g, h // g, p)
    weights = broadcast_axis(jnp.einsum("bcgn,bsgn->bgcs", C, B), h // g, axis=2) * matrix.reshape(b, g, -1, c, c)
    y = jnp.einsum("bgrcs,bsgrp->bcgrp", weights, heads)
    from_state = jnp.einsum("bcgn,bgrpn->bcgrp", C, state.reshape(b, g, h // g, p, n))
    y = y + from_state * broadcast_axis(state_decay.reshape(b, c, g, -1), p)
    left = heads * broadcast_axis(last.reshape(b, c, g, -1), p)
    added = jnp.einsum("bcgrp,bcgn->bgrpn", left, B).reshape(state.shape)
    return state * broadcast_axis(broadcast_axis(state_decay[:, -1], p), n) + added, y.reshape(x.shape)


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
