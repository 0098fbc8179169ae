"""The gated delta rule as a mixer: Gated DeltaNet (arXiv:2412.06464) and Kimi Delta Attention (arXiv:2510.26692)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.conv import ShortConv
from sparsejax.layers.mamba import start_dt
from sparsejax.layers.mamba2 import start_decay
from sparsejax.layers.norm import GATES, GatedNorm
from sparsejax.layers.stream import EMPTY, Context, Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import delta_rule, delta_step

UNIT_EPS = 1e-6  # added to the squared length of queries and keys


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """A mixer of the gated delta rule; each head has a state of `key_width` x `value_width` numbers."""

    heads: int  # of values
    key_heads: int  # of queries and keys; each serves heads / key_heads heads of values
    key_width: int
    value_width: int
    conv: int  # taps of the causal depthwise convolutions, the current token's included
    norm_eps: float  # of the RMSNorm over each head's values, before the gate
    channel_decay: bool = False  # a decay for each channel of a key (Kimi), not one for the head
    rank: int | None = None  # of the maps that make decay and gate; None: of full rank
    gate: str = "silu"  # activation of the output gate
    dt_min: float = 1e-3  # step sizes, by which decay is multiplied, start log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1
    chunk: int = 64  # of the scan; the result does not depend on it

    def __post_init__(self):
        if min(self.heads, self.key_heads, self.key_width, self.value_width, self.conv, self.chunk) < 1:
            raise ValueError("heads, key_heads, key_width, value_width, conv and chunk must be at least 1")
        if self.heads % self.key_heads:
            raise ValueError(f"heads = {self.heads} is not divisible by key_heads = {self.key_heads}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"needs 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")

    @property
    def decays(self) -> tuple[int, ...]:
        """Shape of the decays of one position."""
        return (self.heads, self.key_width) if self.channel_decay else (self.heads,)

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"delta {self.heads} x {self.key_width} x {self.value_width}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position takes from the others: its whole past, by way of the state."""
        return patterns.Causal()


class Delta(nnx.Module):
    """Gate · norm(delta_rule(unit(q), unit(k), v)), with q, k and v = silu(conv(linear(x)))."""

    def __init__(self, config: DeltaConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, h, dtype = stream.width, config.heads, stream.dtype
        keys, values = config.key_heads * config.key_width, h * config.value_width
        decays = math.prod(config.decays)

        def project(inputs: int, outputs: int, axes: tuple[str | None, str | None] = ("width", "inner")) -> Linear:
            return Linear(inputs, outputs, axes, dtype=dtype, rngs=rngs)

        def convolve(channels: int) -> ShortConv:
            return ShortConv(channels, config.conv, bias=False, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = project(m, keys), project(m, keys), project(m, values)
        self.conv_query, self.conv_key, self.conv_value = convolve(keys), convolve(keys), convolve(values)
        self.beta = project(m, h, ("width", None))
        low, axis = (m, "width") if config.rank is None else (config.rank, None)
        self.decay_low = None if config.rank is None else project(m, low, ("width", None))
        self.gate_low = None if config.rank is None else project(m, low, ("width", None))
        decay_axis = "inner" if config.channel_decay else None
        self.decay, self.gate = project(low, decays, (axis, decay_axis)), project(low, values, (axis, "inner"))
        self.dt_bias = parameter(rngs, self._start_dt, (decays,), (decay_axis,))
        self.log_decay = parameter(rngs, start_decay, (h,), (None,))
        self.norm = GatedNorm(config.value_width, config.norm_eps, rngs, activation=config.gate, axis=None)
        axes, start = ("inner", "width"), output_scale(stream)
        self.out = Linear(values, m, axes, dtype=dtype, rngs=rngs, scale=start)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        x = context.zero_padding(x)
        # Where keys and values are 0 the state decays and nothing else, whatever beta is: so it is at padding.
        q, k, v = (context.zero_padding(jax.nn.silu(conv(linear(x), context))) for linear, conv in self._inputs.values())
        y, _ = delta_rule(*self._split(q, k, v), *self._rates(x), starts=context.starts, chunk=self.config.chunk)
        return self._finish(x, y)

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """The state before the first token; its size does not depend on `length`."""
        config = self.config
        convs = {name: conv.init_cache(batch) for name, (_, conv) in self._inputs.items()}
        shape = (batch, config.heads, config.key_width, config.value_width)
        return convs | {"state": jnp.zeros(shape, jnp.float32)}

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """Mixes one more token."""
        inputs, after = [], {}
        for name, (linear, conv) in self._inputs.items():
            y, after[name] = conv.step(linear(x), cache[name])
            inputs.append(jax.nn.silu(y))
        y, after["state"] = delta_step(*self._split(*inputs), *self._rates(x), cache["state"])
        return self._finish(x, y), after

    def cost(self, length: int) -> Cost:
        """No pairs of attention; forward FLOPs for each token, with half a chunk of positions seen inside it.

        The state is read by key and by query, and written: 6 for each of its numbers. A position seen inside of a
        chunk is a product of keys, one of query and key, and two sums of values. Inverting a chunk's system is not
        counted.
        """
        config = self.config
        parts = [part for pair in self._inputs.values() for part in pair]
        parts += [self.decay, self.gate, self.beta, self.out]
        parts += [] if config.rank is None else [self.decay_low, self.gate_low]
        state = 6.0 * config.heads * config.key_width * config.value_width
        keys = (config.heads if config.channel_decay else config.key_heads) * config.key_width
        inside = 2.0 * min(config.chunk, length) * (keys + config.heads * config.value_width)
        return Cost(0, sum(part.flops for part in parts) + state + inside)

    @property
    def _inputs(self) -> dict[str, tuple[Linear, ShortConv]]:
        """What makes queries, keys and values, by the name of the convolution's cache."""
        return {
            "conv_query": (self.query, self.conv_query),
            "conv_key": (self.key, self.conv_key),
            "conv_value": (self.value, self.conv_value),
        }

    def _split(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Heads; queries and keys of length 1 in float32, queries over the root of their width."""
        config = self.config
        q, k = (x.reshape(*x.shape[:-1], config.key_heads, config.key_width) for x in (q, k))
        v = v.reshape(*v.shape[:-1], config.heads, config.value_width)
        return _unit(q) * config.key_width**-0.5, _unit(k), v

    def _rates(self, x: Array) -> tuple[Array, Array]:
        """Log decay and beta, in float32."""
        decay, beta = self.decay(x if self.decay_low is None else self.decay_low(x)), self.beta(x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        dt = jax.nn.softplus(decay.astype(wide) + self.dt_bias[...]).reshape(*x.shape[:-1], *self.config.decays)
        rate = jnp.exp(self.log_decay[...])
        return -(rate[:, None] if self.config.channel_decay else rate) * dt, jax.nn.sigmoid(beta.astype(wide))

    def _finish(self, x: Array, y: Array) -> Array:
        gate = self.gate(x if self.gate_low is None else self.gate_low(x))
        return self.out(self.norm(y, gate.reshape(y.shape)).reshape(gate.shape))

    def _start_dt(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return start_dt(key, shape, dtype, self.config.dt_min, self.config.dt_max)


def _unit(x: Array) -> Array:
    """`x` over its length, in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + UNIT_EPS)
