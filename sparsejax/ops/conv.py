"""Causal depthwise convolution: each channel sums its last few positions."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def causal_conv(
    x: Float[Array, "b t c"], taps: Float[Array, "w c"], starts: Bool[Array, "b t"] | None = None
) -> Float[Array, "b t c"]:
    """y[t] = sum over i of taps[w - 1 - i] x[t - i], where x is 0 before the sequence.

    Args:
      x: input.
      taps: weights; the last is the current position's.
      starts: True where a document begins; nothing from before it counts there.
    """
    t, most = x.shape[1], len(taps) - 1
    padded = jnp.pad(x, ((0, 0), (most, 0), (0, 0)))
    document = None if starts is None else jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (most, 0)))
    total = 0.0
    for tap in range(most + 1):
        seen = padded[:, tap : tap + t]
        if document is not None:
            seen = jnp.where((document[:, tap : tap + t] == document[:, most:])[..., None], seen, 0)
        total = total + taps[tap] * seen
    return total
