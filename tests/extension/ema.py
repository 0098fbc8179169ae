"""A mixer of a user, in a file outside the package."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax import layers
from sparsejax.errors import require_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateConfig:
    """How fast the average forgets."""

    spread: float = 1.0  # standard deviation of the initial logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig(layers.MixerConfig):
    """A gated moving average."""

    inner: int  # channels
    rate: RateConfig = RateConfig()

    def __post_init__(self):
        require_at_least(self, 1, "inner")


@layers.register("ema", EmaConfig)
class Ema(layers.Mixer):
    """out(silu(gate(x)) · average(input(x)))."""

    def __init__(self, config, stream, rngs):
        super().__init__(config, stream, rngs)
        self.input = layers.Linear(stream.width, config.inner, ("width", "inner"), dtype=stream.dtype, rngs=rngs)
        self.gate = nnx.Linear(stream.width, config.inner, rngs=rngs)
        init = jax.nn.initializers.normal(config.rate.spread)
        self.rate = layers.parameter(rngs, init, (config.inner,), ("inner",))
        self.out = layers.Linear(config.inner, stream.width, ("inner", "width"), dtype=stream.dtype, rngs=rngs)

    def __call__(self, x, context=layers.EMPTY):
        return self.run(x, context.tokens, 0.0)[0]

    def init_cache(self, batch, length):
        return {"average": jnp.zeros((batch, self.config.inner), self.dtype)}

    def extend(self, x, cache, positions, length, context=layers.EMPTY):
        y, average = self.run(x, context.tokens, cache["average"])
        return y, {"average": average}

    def run(self, x, tokens, past):
        inputs, starts = tokens.zero_padding(self.input(x)), tokens.starts
        keep = jnp.broadcast_to(self.keep, inputs.shape)
        if starts is not None:
            keep = jnp.where(starts[..., None], 0, keep)
        if tokens.mask is not None:
            keep = jnp.where(tokens.mask[..., None], keep, 1)
        inputs = inputs.at[:, 0].add(keep[:, 0] * past)
        _, average = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (keep, inputs), axis=1)
        return self.out(jax.nn.silu(self.gate(x)) * average), average[:, -1]

    @property
    def keep(self):
        return jax.nn.sigmoid(self.rate[...]).astype(self.dtype)
