"""The selective scan of Mamba (arXiv:2312.00752, algorithm 2), in chunks.

Per channel d, with a state of n numbers:

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]
    y[t] = C[t] h[t]

B is discretised by Euler's rule, as in the released code, instead of zero-order hold. Positions run sequentially. The
backward pass keeps one state per chunk, from which it recomputes the states of the chunk, and from these the rest.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.ops.chunks import CHUNK, broadcast_axis, require_shapes, scan_chunks, vary_alike
from sparsejax.ops.sequence import carry_state, divides, map_shards

# Several times faster on CPU than broadcasts and sums; see `broadcast_axis`.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    state: Float[Array, "b d n"] | None = None,
    starts: Bool[Array, "b t"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d n"]]:
    """Mamba's recurrence, computed in float32.

    Args:
      x: Input.
      dt: Step sizes, positive.
      A: Decay rates, negative.
      B: Input weights.
      C: Output weights.
      state: The state before the first position; defaults to zeros.
      starts: True where a document begins; the state before it counts as zeros.
      chunk: Positions per chunk; does not change the result.

    Returns:
      The output in the dtype of `x`, and the state after the last position in float32. The backward pass keeps
      `t / chunk` states instead of `t`.
    """
    weights = {"A": (A, "d n"), "B": (B, "b t n"), "C": (C, "b t n")}
    require_shapes(x=(x, "b t d"), dt=(dt, "b t d"), **weights, state=(state, "b d n"), starts=(starts, "b t"))
    b, _, d = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((b, d, A.shape[1]), dtype) if state is None else state.astype(dtype)
    inputs = (*(a.astype(dtype) for a in (x, dt, B, C)), starts)
    if divides(x.shape[1]):
        arguments = inputs, (A.astype(dtype), state)
        y, states = map_shards(functools.partial(_scan_shard, chunk), *arguments, outputs=(1, 0))
        return y.astype(x.dtype), states[-b:]
    A, state, inputs = vary_alike((A, state, inputs))
    advance = jax.checkpoint(functools.partial(_advance, A.astype(dtype).T), prevent_cse=False)

    def run_chunk(state: Float[Array, "b n d"], inputs: tuple[Array | None, ...]) -> tuple[Array, Array]:
        state, y = jax.lax.scan(advance, state, jax.tree.map(lambda a: a.swapaxes(0, 1), inputs))
        return state, y.swapaxes(0, 1)

    # Padding is a step of size 0, which leaves the state unchanged.
    state, y = scan_chunks(run_chunk, state.swapaxes(1, 2), inputs, chunk)
    return y.astype(x.dtype), state.swapaxes(1, 2)


def _scan_shard(
    chunk: int, inputs: tuple[Array, Array, Array, Array, Array | None], replicated: tuple[Array, Array]
) -> tuple[Float[Array, "b t d"], Float[Array, "b d n"]]:
    """The output of a shard, and the state after it. The states of a shard are computed twice."""
    (x, dt, B, C, starts), (A, state) = inputs, replicated
    _, added = selective_scan(x, dt, A, B, jax.lax.stop_gradient(C), starts=starts, chunk=chunk)
    decay = jnp.exp(dt.sum(axis=1)[..., None] * A)
    decay = decay if starts is None else jnp.where(starts.any(axis=1)[:, None, None], 0, decay)
    before, after = carry_state(decay, added, state)
    return selective_scan(x, dt, A, B, C, before, starts, chunk)[0], after


def _advance(
    A: Float[Array, "n d"], state: Float[Array, "b n d"], inputs: tuple[Array, Array, Array, Array, Array | None]
) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """One step, with the long axis of the state contiguous."""
    x, dt, B, C, start = inputs
    if start is not None:
        state = jnp.where(start[:, None, None], 0, state)
    decay = jnp.exp(broadcast_axis(dt, A.shape[0], axis=1) * A)
    state = decay * state + _einsum("bn,bd->bnd", B, dt * x)
    return state, _einsum("bn,bnd->bd", C, state)
