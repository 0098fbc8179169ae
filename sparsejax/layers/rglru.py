"""Griffin's recurrent block: a real-gated linear recurrent unit behind a convolution (arXiv:2402.19427)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsejax import patterns
from sparsejax.layers.conv import ShortConv
from sparsejax.layers.stream import EMPTY, Context, Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import linear_scan, linear_step

STEEPEST = 1000.0  # bound on the slope of a root


@dataclasses.dataclass(frozen=True)
class RgLruConfig:
    """A recurrent block of `inner` channels with one number of state each."""

    inner: int
    heads: int  # blocks of the two gates, which are linear in the channels of their own block
    conv: int  # taps of the causal depthwise convolution, the current token's included
    conv_bias: bool = True
    bias: bool = True  # of the projections from and into the stream
    decay_min: float = 0.9  # what an open recurrence gate keeps starts uniform in [decay_min, decay_max]
    decay_max: float = 0.999
    power: float = 8.0  # c of the paper

    def __post_init__(self):
        if min(self.inner, self.heads, self.conv) < 1:
            raise ValueError("inner, heads and conv must be at least 1")
        if self.inner % self.heads:
            raise ValueError(f"inner = {self.inner} is not divisible by heads = {self.heads}")
        if not 0 < self.decay_min <= self.decay_max < 1:
            raise ValueError(f"needs 0 < decay_min <= decay_max < 1, got {self.decay_min} and {self.decay_max}")
        if self.power <= 0:
            raise ValueError(f"power must be above 0, got {self.power}")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"rglru {self.inner}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position takes from the others: its whole past, by way of the state."""
        return patterns.Causal()


class BlockLinear(nnx.Module):
    """y = x w + b in float32, with a block-diagonal w: each of `blocks` parts of the channels alone."""

    def __init__(self, channels: int, blocks: int, rngs: nnx.Rngs):
        width = channels // blocks
        init = jax.nn.initializers.normal(width**-0.5)
        self.weight = parameter(rngs, init, (blocks, width, width), ("inner", None, None))
        self.bias = parameter(rngs, jax.nn.initializers.zeros, (blocks, width), ("inner", None))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        blocks, width = self.bias.shape
        parts = x.reshape(*x.shape[:-1], blocks, width)
        return (jnp.einsum("...hi,hio->...ho", parts, self.weight[...]) + self.bias[...]).reshape(x.shape)

    @property
    def flops(self) -> float:
        """Multiplications and additions for each token."""
        blocks, width, _ = self.weight.shape
        return 2.0 * blocks * width**2


class RgLru(nnx.Module):
    """out(gelu(gate(x)) · rg_lru(conv(input(x)))): with gates r and i between 0 and 1 that see their own token alone,

        log a = -power softplus(decay) r(u)
        h[t] = a h[t-1] + sqrt(1 - a^2) i(u) u

    The first token of a document is not scaled by the root, since nothing was kept.
    """

    def __init__(self, config: RgLruConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, d, dtype = stream.width, config.inner, stream.dtype
        axes, start = ("inner", "width"), output_scale(stream)
        self.input = Linear(m, d, axes[::-1], dtype=dtype, rngs=rngs, bias=config.bias)
        self.gate = Linear(m, d, axes[::-1], dtype=dtype, rngs=rngs, bias=config.bias)
        self.conv = ShortConv(d, config.conv, bias=config.conv_bias, dtype=dtype, rngs=rngs)
        self.recurrence_gate = BlockLinear(d, config.heads, rngs)
        self.input_gate = BlockLinear(d, config.heads, rngs)
        self.decay = parameter(rngs, self._start_decay, (d,), ("inner",))
        self.out = Linear(d, m, axes, dtype=dtype, rngs=rngs, bias=config.bias, scale=start)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        x = context.zero_padding(x)
        u = context.zero_padding(self.conv(context.zero_padding(self.input(x)), context))
        first = first_tokens(context, x.shape[:2])
        y, _ = linear_scan(*self._gate_input(u, first), starts=first)
        return self._finish(x, y)

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """The state before the first token; its size does not depend on `length`."""
        return {"conv": self.conv.init_cache(batch), "state": jnp.zeros((batch, self.config.inner), jnp.float32)}

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """Mixes one more token; the token at position 0 is the first of its document."""
        u, recent = self.conv.step(self.input(x), cache["conv"])
        first = jnp.broadcast_to(position == 0, x.shape[:1])
        y, state = linear_step(*self._gate_input(u, first), cache["state"])
        return self._finish(x, y), {"conv": recent, "state": state}

    def cost(self, length: int) -> Cost:
        """No pairs; forward FLOPs for each token: the maps, the convolution and 10 for each channel.

        The 10 are the decay's two factors, square, difference, root and the gated input's two products, the two of
        the recurrence and the gate's product.
        """
        parts = (self.input, self.gate, self.conv, self.recurrence_gate, self.input_gate, self.out)
        return Cost(0, sum(part.flops for part in parts) + 10.0 * self.config.inner)

    def _gate_input(self, u: Array, first: Bool[Array, "*b"]) -> tuple[Array, Array]:
        """What is added to the state, and the logarithm of what is kept of it, in float32."""
        u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        recurrence, gate = jax.nn.sigmoid(self.recurrence_gate(u)), jax.nn.sigmoid(self.input_gate(u))
        log_decay = -self.config.power * jax.nn.softplus(self.decay[...]) * recurrence
        scale = jnp.where(first[..., None], 1.0, bounded_sqrt(-jnp.expm1(2 * log_decay)))
        return scale * gate * u, log_decay

    def _finish(self, x: Array, y: Array) -> Array:
        return self.out(jax.nn.gelu(self.gate(x)) * y.astype(x.dtype))

    def _start_decay(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """exp(-power softplus(decay)) uniform in [decay_min, decay_max]."""
        kept = jax.random.uniform(key, shape, dtype, self.config.decay_min, self.config.decay_max)
        return jnp.log(jnp.expm1(-jnp.log(kept) / self.config.power))


def first_tokens(context: Context, shape: tuple[int, int]) -> Bool[Array, "b t"]:
    """True at the first token of each document that is not padding."""
    real = jnp.ones(shape, bool) if context.mask is None else context.mask
    count = jnp.cumsum(real, axis=1)
    if context.starts is None:
        return real & (count == 1)
    earlier = jax.lax.cummax(jnp.where(context.starts, count - real, 0), axis=1)  # tokens of earlier documents
    return real & (count - earlier == 1)


@jax.custom_jvp
def bounded_sqrt(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The root of `x`, with a slope of at most `STEEPEST`: at 0, where all is kept, the true one is infinite."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / (2 * jnp.maximum(root, 0.5 / STEEPEST))
