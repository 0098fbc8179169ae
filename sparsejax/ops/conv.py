"""Causal depthwise convolution."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def causal_conv(
    x: Float[Array, "b t m"], taps: Float[Array, "w m"], starts: Bool[Array, "b t"] | None = None
) -> Float[Array, "b t m"]:
    """y[t] = sum over i of taps[w - 1 - i] x[t - i] per channel, where x is 0 before the sequence.

    Args:
      x: Input.
      taps: Weights; the last is that of the current position.
      starts: True where a document begins; earlier documents count as zeros.
    """
    t, before = x.shape[1], len(taps) - 1
    padded = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
    document = None if starts is None else jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (before, 0)))

    def shifted(tap: int) -> Array:
        values = padded[:, tap : tap + t]
        if document is None:
            return values
        return jnp.where((document[:, tap : tap + t] == document[:, before:])[..., None], values, 0)

    return sum((taps[tap] * shifted(tap) for tap in range(before + 1)), start=0.0)
