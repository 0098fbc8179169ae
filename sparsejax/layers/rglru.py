"""Griffin's recurrent block: a real-gated linear recurrent unit behind a convolution (arXiv:2402.19427)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparsejax.errors import InputError, require_at_least
from sparsejax.layers.caching import chunk_positions
from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.conv import ShortConv
from sparsejax.layers.protocols import Cache, Mixer, MixerConfig
from sparsejax.layers.stream import Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import linear_scan

MAX_SLOPE = 1000.0  # bound on the derivative of the square root


@dataclasses.dataclass(frozen=True, kw_only=True)
class RgLruConfig(MixerConfig):
    """A recurrent block with one state element per channel."""

    inner: int  # number of channels
    heads: int  # number of diagonal blocks of the linear maps of the two gates
    conv: int  # taps of the causal depthwise convolution, including that of the current token
    conv_bias: bool = True  # whether the convolution has a bias
    bias: bool = True  # whether the projections from and to the stream have a bias
    decay_min: float = 0.9  # smallest initial decay under an open recurrence gate; decays are initialized uniformly
    decay_max: float = 0.999  # largest initial decay under an open recurrence gate
    power: float = 8.0  # exponent c of the paper

    def __post_init__(self):
        require_at_least(self, 1, "inner", "heads", "conv")
        if self.inner % self.heads:
            raise InputError("inner", f"{self.inner} is not divisible by heads = {self.heads}")
        if not 0 < self.decay_min <= self.decay_max < 1:
            raise InputError(
                "decay_min", f"{self.decay_min} and decay_max = {self.decay_max} do not increase within (0, 1)"
            )
        if self.power <= 0:
            raise InputError("power", f"{self.power} is not positive")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"rglru {self.inner}"

    def exchange(self, length: int, shards: int) -> str:
        """The state, and the last inputs of the convolution."""
        return "state + halo"


class BlockLinear(nnx.Module):
    """y = x w + b in float32, where w is block-diagonal with `blocks` blocks."""

    def __init__(self, channels: int, blocks: int, rngs: nnx.Rngs):
        width = channels // blocks
        init = jax.nn.initializers.normal(width**-0.5)
        self.weight = parameter(rngs, init, (blocks, width, width), ("inner", None, None), decay=True)
        self.bias = parameter(rngs, jax.nn.initializers.zeros, (blocks, width), ("inner", None))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        blocks, width = self.bias.shape
        split = x.reshape(*x.shape[:-1], blocks, width)
        return (jnp.einsum("...hi,hio->...ho", split, self.weight[...]) + self.bias[...]).reshape(x.shape)

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        blocks, width, _ = self.weight.shape
        return 2.0 * blocks * width**2


class RgLru(Mixer):
    """out(gelu(gate(x)) · rg_lru(conv(input(x)))), with gates r and i in (0, 1) that depend on their own token only:

        log a = -power softplus(decay) r(u)
        h[t] = a h[t-1] + sqrt(1 - a^2) i(u) u

    The first token of a document is not scaled by the square root, since there is no state to keep.
    """

    def __init__(self, config: RgLruConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, d, dtype = stream.width, config.inner, stream.dtype
        axes, scale = ("inner", "width"), output_scale(stream)
        self.input = Linear(m, d, axes[::-1], dtype=dtype, rngs=rngs, bias=config.bias)
        self.gate = Linear(m, d, axes[::-1], dtype=dtype, rngs=rngs, bias=config.bias)
        self.conv = ShortConv(d, config.conv, bias=config.conv_bias, dtype=dtype, rngs=rngs)
        self.recurrence_gate = BlockLinear(d, config.heads, rngs)
        self.input_gate = BlockLinear(d, config.heads, rngs)
        self.decay = parameter(rngs, self._init_decay, (d,), ("inner",))
        self.out = Linear(d, m, axes, dtype=dtype, rngs=rngs, bias=config.bias, scale=scale)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        tokens = context.tokens
        x = tokens.zero_padding(x)
        first = first_tokens(tokens, (x.shape[0], x.shape[1]))
        return self._scan(x, self.conv(self.input(x), tokens), first, tokens)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the state before the first token, whose size does not depend on `length`."""
        return {"conv": self.conv.init_cache(batch), "state": jnp.zeros((batch, self.config.inner), jnp.float32)}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens; the token at position 0 is the first of its document."""
        u, conv = self.conv.extend(self.input(x), cache["conv"], context.tokens)
        first = chunk_positions(positions, x.shape[1]) == 0
        y, state = self._scan(x, u, first, context.tokens, cache["state"])
        return y, {"conv": conv, "state": state}

    def cost(self, length: int) -> Cost:
        """Cost of the linear maps and the convolution, and 10 FLOPs per channel.

        The 10 are the two factors of the decay, square, difference, root, the two products of the gated input, the
        two operations of the recurrence and the product of the gate.
        """
        parts = (self.input, self.gate, self.conv, self.recurrence_gate, self.input_gate, self.out)
        return Cost(0, sum(part.flops for part in parts) + 10.0 * self.config.inner)

    def _scan(
        self, x: Array, u: Array, first: Bool[Array, "b t"], tokens: Tokens, state: Array | None = None
    ) -> tuple[Array, Array]:
        """The output and the next state, given the convolved input and where documents begin."""
        inputs = self._gate_input(tokens.zero_padding(u), first)
        y, state = linear_scan(*map(tokens.zero_padding, inputs), state=state, starts=first)
        return self._project_out(x, y), state

    def _gate_input(self, u: Array, first: Bool[Array, "*b"]) -> tuple[Array, Array]:
        """The input of the recurrence and its log decay, in float32."""
        u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        recurrence, gate = jax.nn.sigmoid(self.recurrence_gate(u)), jax.nn.sigmoid(self.input_gate(u))
        log_decay = -self.config.power * jax.nn.softplus(self.decay[...]) * recurrence
        scale = jnp.where(first[..., None], 1.0, bounded_sqrt(-jnp.expm1(2 * log_decay)))
        return scale * gate * u, log_decay

    def _project_out(self, x: Array, y: Array) -> Array:
        return self.out(jax.nn.gelu(self.gate(x)) * y.astype(x.dtype))

    def _init_decay(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Parameters for which exp(-power softplus(decay)) is uniform in [decay_min, decay_max]."""
        kept = jax.random.uniform(key, shape, dtype, self.config.decay_min, self.config.decay_max)
        return jnp.log(jnp.expm1(-jnp.log(kept) / self.config.power))


def first_tokens(tokens: Tokens, shape: tuple[int, int]) -> Bool[Array, "b t"]:
    """True at the first token of each document that is not padding."""
    real = jnp.ones(shape, bool) if tokens.mask is None else tokens.mask
    count = jnp.cumsum(real, axis=1)
    if tokens.starts is None:
        return real & (count == 1)
    earlier = jax.lax.cummax(jnp.where(tokens.starts, count - real, 0), axis=1)  # tokens of earlier documents
    return real & (count - earlier == 1)


@jax.custom_jvp
def bounded_sqrt(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The square root of `x`, with a derivative of at most `MAX_SLOPE`: the exact one is infinite at 0."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / (2 * jnp.maximum(root, 0.5 / MAX_SLOPE))
