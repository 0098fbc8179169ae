"""Short causal convolutions: a part of several mixers, and a mixer of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.stream import EMPTY, Context, Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import causal_conv


class ShortConv(nnx.Module):
    """A causal depthwise convolution of a few taps; no activation. Taps stop at the borders of documents."""

    def __init__(
        self, channels: int, taps: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs, axis: str | None = "inner"
    ):
        init = jax.nn.initializers.normal(taps**-0.5)
        self.weight = parameter(rngs, init, (taps, channels), (None, axis))
        self.bias = parameter(rngs, jax.nn.initializers.zeros, (channels,), (axis,)) if bias else None
        self.dtype, self.shape = dtype, (taps, channels)  # of one layer, where several are stacked

    def __call__(self, x: Float[Array, "b t c"], context: Context = EMPTY) -> Float[Array, "b t c"]:
        """A whole sequence."""
        return self._shift(causal_conv(x, self.weight[...].astype(x.dtype), context.starts))

    def init_cache(self, batch: int) -> Float[Array, "b w c"]:
        """The inputs before the first token: zeros, one less than there are taps."""
        taps, channels = self.shape
        return jnp.zeros((batch, taps - 1, channels), self.dtype)

    def step(
        self, x: Float[Array, "b c"], cache: Float[Array, "b w c"]
    ) -> tuple[Float[Array, "b c"], Float[Array, "b w c"]]:
        """One more token."""
        recent = jnp.concatenate([cache, x[:, None].astype(cache.dtype)], axis=1)
        return self._shift((recent * self.weight[...].astype(x.dtype)).sum(axis=1)), recent[:, 1:]

    @property
    def flops(self) -> float:
        """Forward FLOPs for each token."""
        return 2.0 * self.shape[0] * self.shape[1]

    def _shift(self, y: Array) -> Array:
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """A gated short convolution of `conv` taps."""

    conv: int
    bias: bool = False

    def __post_init__(self):
        if self.conv < 1:
            raise ValueError(f"conv must be at least 1, got {self.conv}")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"conv {self.conv}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position takes from the others: the last few."""
        return patterns.parse(f"causal & window({self.conv - 1})")


class Conv(nnx.Module):
    """out(C · conv(B · x)) with B, C and x linear in the stream (LFM2, arXiv:2511.23404)."""

    def __init__(self, config: ConvConfig, stream: Stream, rngs: nnx.Rngs):
        m, dtype, start = stream.width, stream.dtype, output_scale(stream)

        def project() -> Linear:
            return Linear(m, m, ("width", "inner"), dtype=dtype, rngs=rngs, bias=config.bias)

        self.input, self.gate_in, self.gate_out = project(), project(), project()
        self.conv = ShortConv(m, config.conv, bias=config.bias, dtype=dtype, rngs=rngs)
        self.out = Linear(m, m, ("inner", "width"), dtype=dtype, rngs=rngs, bias=config.bias, scale=start)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        x = context.zero_padding(x)
        y = self.conv(context.zero_padding(self.gate_in(x) * self.input(x)), context)
        return self.out(self.gate_out(x) * y)

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """The last few inputs of the convolution; their number does not depend on `length`."""
        return {"conv": self.conv.init_cache(batch)}

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """Mixes one more token."""
        y, held = self.conv.step(self.gate_in(x) * self.input(x), cache["conv"])
        return self.out(self.gate_out(x) * y), {"conv": held}

    def cost(self, length: int) -> Cost:
        """No pairs; forward FLOPs for each token: the projections, the taps and the two gates."""
        linear = sum(part.flops for part in (self.input, self.gate_in, self.gate_out, self.conv, self.out))
        return Cost(0, linear + 2.0 * self.input.weight.shape[0])
