"""The diagonal linear recurrence: each channel keeps a part of what it holds and adds its input.

    h[t] = exp(log_decay[t]) h[t-1] + x[t]

What is at the heart of LRU (arXiv:2303.06349) and RG-LRU (arXiv:2402.19427). Chunks run one after the other, positions
inside of one by a parallel prefix (Blelloch 1990) over pairs of decay and input. The gradient is the same recurrence
from the end, g[t] = exp(log_decay[t+1]) g[t+1] + dh[t]. It needs the states, which are the output: nothing else is
stored, and nothing has to be computed again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.ops.chunks import scan_chunks

CHUNK = 64


def linear_scan(
    x: Float[Array, "b t d"],
    log_decay: Float[Array, "b t d"],
    state: Float[Array, "b d"] | None = None,
    starts: Bool[Array, "b t"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """The recurrence above, in float32 whatever the inputs.

    Args:
      x: input.
      log_decay: logarithms of what is kept from the position before, not positive.
      state: the state before the first position, zeros if not given.
      starts: True where a document begins; the state is zeros before it.
      chunk: positions of a chunk; the result does not depend on it.

    Returns:
      The states in the dtype of `x`, and the last one in float32.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    decay = jnp.exp(log_decay.astype(wide))
    decay = decay if starts is None else jnp.where(starts[..., None], 0, decay)
    state = jnp.zeros(x[:, 0].shape, wide) if state is None else state.astype(wide)
    y = _scan(x.astype(wide), decay, state, chunk)
    return y.astype(x.dtype), y[:, -1]


def linear_step(
    x: Float[Array, "b d"], log_decay: Float[Array, "b d"], state: Float[Array, "b d"]
) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """One position of `linear_scan`: the next state in the dtype of `x`, and in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.exp(log_decay.astype(wide)) * state.astype(wide) + x.astype(wide)
    return state.astype(x.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(x: Array, decay: Array, state: Array, chunk: int) -> Array:
    """All states [b, t, d]."""

    def run_chunk(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, added = jax.lax.associative_scan(_compose, inputs, axis=1)
        states = kept * state[:, None] + added
        return states[:, -1], states

    # The zeros behind the last position forget the state, which nobody reads.
    return scan_chunks(run_chunk, state, (decay, x), chunk)[1]


def _compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """What is kept and added over two spans of positions, the second behind the first."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _scan_forward(x: Array, decay: Array, state: Array, chunk: int) -> tuple[Array, tuple[Array, ...]]:
    y = _scan(x, decay, state, chunk)
    return y, (decay, state, y)


def _scan_backward(chunk: int, saved: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, Array]:
    decay, state, y = saved
    following = jnp.pad(decay[:, :0:-1], ((0, 0), (1, 0), (0, 0)))  # from the end; nothing follows the last
    d_x = _scan(d_y[:, ::-1], following, jnp.zeros_like(state), chunk)[:, ::-1]
    before = jnp.concatenate([state[:, None], y[:, :-1]], axis=1)
    return d_x, d_x * before, d_x[:, 0] * decay[:, 0]


_scan.defvjp(_scan_forward, _scan_backward)
