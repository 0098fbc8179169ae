"""The diagonal linear recurrence, per channel:

    h[t] = exp(log_decay[t]) h[t-1] + x[t]

It is the core of LRU (arXiv:2303.06349) and RG-LRU (arXiv:2402.19427). Chunks run sequentially; inside a chunk runs a
parallel prefix (Blelloch 1990) over pairs of decay and input. The gradient is the same recurrence from the end,
g[t] = exp(log_decay[t+1]) g[t+1] + dh[t]. It needs only the states, which are the output, so nothing else is stored or
recomputed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.ops.chunks import CHUNK, require_shapes, scan_chunks, vary_alike
from sparsejax.ops.derivatives import with_derivatives
from sparsejax.ops.sequence import carry_state, divides, map_shards


def linear_scan(
    x: Float[Array, "b t d"],
    log_decay: Float[Array, "b t d"],
    state: Float[Array, "b d"] | None = None,
    starts: Bool[Array, "b t"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """The recurrence above, computed in float32.

    Args:
      x: Input.
      log_decay: Logarithm of the decay from the previous position, not positive.
      state: The state before the first position; defaults to zeros.
      starts: True where a document begins; the state before it counts as zeros.
      chunk: Positions per chunk; does not change the result.

    Returns:
      The states in the dtype of `x`, and the last one in float32.
    """
    require_shapes(x=(x, "b t d"), log_decay=(log_decay, "b t d"), state=(state, "b d"), starts=(starts, "b t"))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    decay = jnp.exp(log_decay.astype(dtype))
    decay = decay if starts is None else jnp.where(starts[..., None], 0, decay)
    state = jnp.zeros(x[:, 0].shape, dtype) if state is None else state.astype(dtype)
    if divides(x.shape[1]):
        logs = jnp.where(jnp.isneginf(log_decay), 0, log_decay).astype(dtype)
        inputs = x.astype(dtype), decay, logs
        y, states = map_shards(functools.partial(_scan_shard, chunk), inputs, state, outputs=(1, 0))
        return y.astype(x.dtype), states[-len(x) :]
    y = _scan(chunk, *vary_alike((x.astype(dtype), decay, state)))
    return y.astype(x.dtype), y[:, -1]


def _scan_shard(
    chunk: int, inputs: tuple[Array, Array, Array], state: Float[Array, "b d"]
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """All states of a shard, and the last: those from zeros, and what is left of the state before."""
    x, decay, logs = inputs
    y = _scan(chunk, x, decay, jnp.zeros_like(state))
    erased = jnp.cumsum(decay == 0, axis=1) > 0
    left = jnp.where(erased, 0, jnp.exp(jnp.cumsum(logs, axis=1)))
    before, after = carry_state(left[:, -1], y[:, -1], state)
    return y + left * before[:, None], after


def _scan_plain(
    chunk: int, x: Float[Array, "b t d"], decay: Float[Array, "b t d"], state: Float[Array, "b d"]
) -> Float[Array, "b t d"]:
    """All states."""

    def run_chunk(state: Float[Array, "b d"], inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, added = jax.lax.associative_scan(_compose, inputs, axis=1)
        states = decay * state[:, None] + added
        return states[:, -1], states

    # The padding after the last position has decay 0 and erases the state, which is not used.
    return scan_chunks(run_chunk, state, (decay, x), chunk)[1]


def _compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Decay and added state over two adjacent spans of positions."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _scan_forward(chunk, x, decay, state):
    y = _scan_plain(chunk, x, decay, state)
    return y, (decay, state, y)


def _scan_backward(chunk, residuals, dy):
    decay, state, y = residuals
    next_decay = jnp.pad(decay[:, :0:-1], ((0, 0), (1, 0), (0, 0)))  # reversed; nothing follows the last position
    dx = _scan(chunk, dy[:, ::-1], next_decay, jnp.zeros_like(state))[:, ::-1]
    previous = jnp.concatenate([state[:, None], y[:, :-1]], axis=1)
    return dx, dx * previous, dx[:, 0] * decay[:, 0]


_scan = with_derivatives(_scan_forward, _scan_backward, _scan_plain)
