"""Recurrences over the sequence, in chunks: sequential inside, one stored state for each chunk.

The selective scan of Mamba (Gu and Dao 2023, arXiv:2312.00752, algorithm 2). For each channel d with a state
of n numbers:

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]
    y[t] = C[t] h[t]

(B is discretised by Euler's rule, as in the released code, not by zero-order hold.) The backward pass is
written out: it starts each chunk from its stored state, computes the chunk's states again, and runs the
adjoint recurrence g[t] = exp(dt[t+1] A) g[t+1] + C[t] dy[t] from the end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 32


def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    state: Float[Array, "b d n"] | None = None,
    starts: Bool[Array, "b t"] | None = None,
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

    Returns:
      The output in the dtype of `x`, and the state after the last position in float32. Memory of the backward
      pass grows with `t / CHUNK` states, not with `t`.
    """
    b, t, d = x.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((b, d, A.shape[1]), wide) if state is None else state.astype(wide)
    inputs = [_split_chunks(a.astype(wide)) for a in (x, dt, B, C)]
    keep = None if starts is None else 1 - _split_chunks(starts[..., None].astype(wide))
    y, state = _scan_chunks(*inputs, A.astype(wide).T, state.swapaxes(1, 2), keep)
    return _join_chunks(y, t).astype(x.dtype), state.swapaxes(1, 2)


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


def _split_chunks(x: Array) -> Array:
    """[b, t, ...] -> [chunks, CHUNK, b, ...], padded with zeros: a step of size 0 leaves the state as it is."""
    b, t = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -t % CHUNK), (0, 0)))
    return x.swapaxes(0, 1).reshape(-1, CHUNK, b, x.shape[-1])


def _join_chunks(x: Array, t: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:t].swapaxes(0, 1)


def _advance(A, state, inputs):
    """One step; the state is [b, n, d] here, so that the long axis is the contiguous one."""
    x, dt, B, C, keep = inputs
    state = _decay(dt, A, keep) * state + (dt * x)[:, None] * B[..., None]
    return state, (state * C[..., None]).sum(axis=1)


def _decay(dt, A, keep):
    """exp(dt A), or 0 where a document begins: [b, n, d]."""
    decay = jnp.exp(dt[:, None] * A)
    return decay if keep is None else decay * keep[..., None]


@jax.custom_vjp
def _scan_chunks(x, dt, B, C, A, state, keep):
    return _scan_chunks_forward(x, dt, B, C, A, state, keep)[0]


def _scan_chunks_forward(x, dt, B, C, A, state, keep):
    def scan_chunk(state, chunk):
        after, y = jax.lax.scan(lambda h, step: _advance(A, h, step), state, chunk)
        return after, (state, y)

    last, (starts, y) = jax.lax.scan(scan_chunk, state, (x, dt, B, C, keep))
    return (y, last), (x, dt, B, C, A, starts, keep)


def _scan_chunks_backward(residuals, cotangents):
    x, dt, B, C, A, starts, keep = residuals
    dy, d_last = cotangents

    def differentiate_chunk(carry, chunk):
        *inputs, dy, start = chunk
        before = _states_before(A, start, inputs)
        return jax.lax.scan(lambda c, step: _retreat(A, c, step), carry, (*inputs, dy, before), reverse=True)

    carry = d_last, jnp.zeros_like(starts[0])
    (d_state, dA), grads = jax.lax.scan(differentiate_chunk, carry, (x, dt, B, C, keep, dy, starts), reverse=True)
    return *grads, dA.sum(axis=0), d_state, None if keep is None else jnp.zeros_like(keep)


def _states_before(A, start, inputs):
    """The state before each step of a chunk, computed again: [CHUNK, b, n, d]."""

    def advance(state, step):
        return _advance(A, state, step)[0], state

    return jax.lax.scan(advance, start, tuple(inputs))[1]


def _retreat(A, carry, step):
    """The adjoint of `_advance`: from the gradient of the state after a step to that of the state before it."""
    d_state, dA = carry
    x, dt, B, C, keep, dy, before = step
    decay = _decay(dt, A, keep)
    after = decay * before + (dt * x)[:, None] * B[..., None]
    d_state = d_state + C[..., None] * dy[:, None]
    d_exponent = d_state * decay * before  # gradient of dt * A
    d_input = (d_state * B[..., None]).sum(axis=1)  # gradient of dt * x
    grads = (
        d_input * dt,
        d_input * x + (d_exponent * A).sum(axis=1),
        (d_state * (dt * x)[:, None]).sum(axis=-1),
        (after * dy[:, None]).sum(axis=-1),
    )
    return (d_state * decay, dA + d_exponent * dt[:, None]), grads


_scan_chunks.defvjp(_scan_chunks_forward, _scan_chunks_backward)
