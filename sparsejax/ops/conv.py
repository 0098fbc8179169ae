"""Causal depthwise convolution."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.sequence import divides, map_shards, shard_count, shift


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
    if divides(t) and 0 < before <= t // shard_count():
        return map_shards(_convolve_shard, (x, starts), taps)
    padded = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
    document = None if starts is None else jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (before, 0)))
    return _convolve(padded, taps, document)


def _convolve_shard(inputs: tuple[Array, Array | None], taps: Float[Array, "w m"]) -> Float[Array, "b t m"]:
    """The output of a shard, which receives the last inputs of the shard before it."""
    (x, starts), before = inputs, len(taps) - 1
    padded = jnp.concatenate([shift(x[:, -before:], 1), x], axis=1)
    if starts is None:
        return _convolve(padded, taps, None)
    starts = jnp.concatenate([shift(starts[:, -before:], 1), starts], axis=1)
    return _convolve(padded, taps, jnp.cumsum(starts, axis=1))


def _convolve(
    padded: Float[Array, "b s m"], taps: Float[Array, "w m"], document: Int[Array, "b s"] | None
) -> Float[Array, "b t m"]:
    """The output, given the inputs before the first position too, and the document of each input."""
    before = len(taps) - 1
    t = padded.shape[1] - before

    def shifted(tap: int) -> Array:
        values = padded[:, tap : tap + t]
        if document is None:
            return values
        return jnp.where((document[:, tap : tap + t] == document[:, before:])[..., None], values, 0)

    return sum((taps[tap] * shifted(tap) for tap in range(before + 1)), start=0.0)
