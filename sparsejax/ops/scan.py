"""The selective scan of Mamba (Gu and Dao 2023, arXiv:2312.00752, algorithm 2), in chunks.

For each channel d with a state of n numbers:

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]
    y[t] = C[t] h[t]

(B is discretised by Euler's rule, as in the released code, not by zero-order hold.) One position follows the other.
The backward pass keeps one state for each chunk; it computes the states of a chunk again, and the rest of a position
again from those.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.ops.chunks import scan_chunks, spread

CHUNK = 64

# On CPU several times faster than the same as broadcasts and sums; see `spread`.
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
    """Mamba's recurrence, in float32 whatever the inputs.

    Args:
      x: input.
      dt: step sizes, positive.
      A: decay rates, negative.
      B: input weights.
      C: output weights.
      state: the state before the first position, zeros if not given.
      starts: True where a document begins; the state is zeros before it.
      chunk: positions of a chunk; the result does not depend on it.

    Returns:
      The output in the dtype of `x`, and the state after the last position in float32. Memory of the backward
      pass grows with `t / chunk` states, not with `t`.
    """
    b, _, d = x.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((b, d, A.shape[1]), wide) if state is None else state.astype(wide)
    advance = jax.checkpoint(functools.partial(_advance, A.astype(wide).T), prevent_cse=False)

    def run_chunk(state, inputs):
        state, y = jax.lax.scan(advance, state, jax.tree.map(lambda a: a.swapaxes(0, 1), inputs))
        return state, y.swapaxes(0, 1)

    inputs = (*(a.astype(wide) for a in (x, dt, B, C)), starts)
    # Padding is a step of size 0, which leaves the state as it is.
    state, y = scan_chunks(run_chunk, state.swapaxes(1, 2), inputs, chunk)
    return y.astype(x.dtype), state.swapaxes(1, 2)


def selective_step(
    x: Float[Array, "b d"],
    dt: Float[Array, "b d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b n"],
    C: Float[Array, "b n"],
    state: Float[Array, "b d n"],
) -> tuple[Float[Array, "b d"], Float[Array, "b d n"]]:
    """One position of `selective_scan`: its output in the dtype of `x` and the next state, in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    inputs = [a.astype(wide) for a in (x, dt, B, C)]
    state, y = _advance(A.astype(wide).T, state.astype(wide).swapaxes(1, 2), (*inputs, None))
    return y.astype(x.dtype), state.swapaxes(1, 2)


def _advance(A, state, inputs):
    """One step; the state is [b, n, d] here, so that the long axis is the contiguous one."""
    x, dt, B, C, start = inputs
    if start is not None:
        state = jnp.where(start[:, None, None], 0, state)
    decay = jnp.exp(spread(dt, A.shape[0], axis=1) * A)
    state = decay * state + _einsum("bn,bd->bnd", B, dt * x)
    return state, _einsum("bn,bnd->bd", C, state)
