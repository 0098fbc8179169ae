"""Causal depthwise convolution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.broadcast import multiply
from sparsejax.ops.chunks import vary_alike
from sparsejax.ops.derivatives import with_derivatives
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
    return _convolve(None, *vary_alike((padded, taps, document)))


def _convolve_shard(inputs: tuple[Array, Array | None], taps: Float[Array, "w m"]) -> Float[Array, "b t m"]:
    """The output of a shard, which receives the last inputs of the shard before it."""
    (x, starts), before = inputs, len(taps) - 1
    padded = jnp.concatenate([shift(x[:, -before:], 1), x], axis=1)
    if starts is None:
        return _convolve(None, *vary_alike((padded, taps, None)))
    starts = jnp.concatenate([shift(starts[:, -before:], 1), starts], axis=1)
    return _convolve(None, *vary_alike((padded, taps, jnp.cumsum(starts, axis=1))))


def _convolve_plain(
    _: None, padded: Float[Array, "b s m"], taps: Float[Array, "w m"], document: Int[Array, "b s"] | None
) -> Float[Array, "b t m"]:
    """The output, given the inputs before the first position too, and the document of each input."""
    before = len(taps) - 1
    t = padded.shape[1] - before

    def shifted(tap: int) -> Array:
        values = padded[:, tap : tap + t]
        if document is None:
            return values
        return jnp.where((document[:, tap : tap + t] == document[:, before:])[..., None], values, 0)

    products = (multiply(shifted(tap), taps[tap]) for tap in range(before + 1))
    return functools.reduce(jnp.add, products)


def _convolve_forward(_, padded, taps, document):
    return _convolve_plain(_, padded, taps, document), (padded, taps, document)


def _convolve_backward(_, residuals, dy):
    padded, taps, document = residuals
    pull = jax.vjp(lambda padded, taps: _convolve_plain(_, padded, taps, document), padded, taps)[1]
    return *pull(dy), None


# The backward pass reads the inputs; without a rule it would keep a shifted copy of them per tap.
_convolve = with_derivatives(_convolve_forward, _convolve_backward, _convolve_plain, name=None)
