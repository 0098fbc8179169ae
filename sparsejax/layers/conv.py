"""Short causal convolutions: a part of several mixers, and a mixer by themselves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import require_at_least
from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.protocols import Cache, Mixer, MixerConfig
from sparsejax.layers.stream import Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import causal_conv
from sparsejax.ops.broadcast import add


class ShortConv(nnx.Module):
    """A causal depthwise convolution of a few taps, without activation.

    It reads zeros at padding, as before the first token, and does not cross document boundaries.
    """

    def __init__(
        self, channels: int, taps: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs, axis: str | None = "inner"
    ):
        init = jax.nn.initializers.normal(taps**-0.5)
        self.weight = parameter(rngs, init, (taps, channels), (None, axis))
        self.bias = parameter(rngs, jax.nn.initializers.zeros, (channels,), (axis,)) if bias else None
        self.dtype, self.shape = dtype, (taps, channels)  # of one layer, where several are stacked

    def __call__(self, x: Float[Array, "b t c"], tokens: Tokens = EMPTY.tokens) -> Float[Array, "b t c"]:
        """Convolves a whole sequence."""
        return self._add_bias(causal_conv(tokens.zero_padding(x), self.weight[...].astype(x.dtype), tokens.starts))

    def init_cache(self, batch: int) -> Float[Array, "b w c"]:
        """Returns the inputs before the first token: zeros, one fewer than taps."""
        taps, channels = self.shape
        return jnp.zeros((batch, taps - 1, channels), self.dtype)

    def extend(
        self, x: Float[Array, "b t c"], cache: Float[Array, "b w c"], tokens: Tokens = EMPTY.tokens
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b w c"]]:
        """Convolves the next tokens; returns their outputs, and the latest inputs."""
        past = cache.shape[1]
        inputs = jnp.concatenate([cache, x.astype(cache.dtype)], axis=1)
        y = self._add_bias(causal_conv(inputs, self.weight[...].astype(x.dtype))[:, past:])
        latest = tokens.count(x.shape)[:, None] + jnp.arange(past)
        return y, inputs[:, x.shape[1] :] if tokens.mask is None else jnp.take_along_axis(
            inputs, latest[..., None], axis=1
        )

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2.0 * self.shape[0] * self.shape[1]

    def _add_bias(self, y: Array) -> Array:
        return y if self.bias is None else add(y, self.bias[...].astype(y.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig(MixerConfig):
    """A gated short convolution (LFM2, arXiv:2511.23404)."""

    conv: int  # taps, including that of the current token
    bias: bool = False  # whether the projections and the convolution have a bias

    def __post_init__(self):
        require_at_least(self, 1, "conv")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"conv {self.conv}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """The positions under the taps."""
        return patterns.parse(f"causal & window({self.conv - 1})")

    def exchange(self, length: int, shards: int) -> str:
        """The last inputs of the convolution."""
        return "halo"


class Conv(Mixer):
    """out(C · conv(B · x)), where B, C and x are linear in the stream (LFM2, arXiv:2511.23404)."""

    def __init__(self, config: ConvConfig, stream: Stream, rngs: nnx.Rngs):
        m, dtype, scale = stream.width, stream.dtype, output_scale(stream)

        def project() -> Linear:
            return Linear(m, m, ("width", "inner"), dtype=dtype, rngs=rngs, bias=config.bias)

        self.input, self.gate_in, self.gate_out = project(), project(), project()
        self.conv = ShortConv(m, config.conv, bias=config.bias, dtype=dtype, rngs=rngs)
        self.out = Linear(m, m, ("inner", "width"), dtype=dtype, rngs=rngs, bias=config.bias, scale=scale)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        tokens = context.tokens
        x = tokens.zero_padding(x)
        y = self.conv(self.gate_in(x) * self.input(x), tokens)
        return self.out(self.gate_out(x) * y)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the latest inputs of the convolution, whose number does not depend on `length`."""
        return {"conv": self.conv.init_cache(batch)}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens."""
        y, conv = self.conv.extend(self.gate_in(x) * self.input(x), cache["conv"], context.tokens)
        return self.out(self.gate_out(x) * y), {"conv": conv}

    def cost(self, length: int) -> Cost:
        """Cost of the projections, the taps and the two gates."""
        linear = sum(part.flops for part in (self.input, self.gate_in, self.gate_out, self.conv, self.out))
        return Cost(0, linear + 2.0 * self.input.weight.shape[0])
