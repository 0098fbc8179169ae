"""The gated delta rule: Gated DeltaNet (arXiv:2412.06464) and Kimi Delta Attention (arXiv:2510.26692)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.conv import ShortConv
from sparsejax.layers.mamba import init_dt_bias, require_dt_range
from sparsejax.layers.mamba2 import init_log_decay
from sparsejax.layers.norm import GATES, GatedNorm
from sparsejax.layers.protocols import Cache, Mixer, MixerConfig
from sparsejax.layers.stream import Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import delta_rule
from sparsejax.ops.broadcast import add, multiply
from sparsejax.ops.delta import CHUNK

UNIT_EPS = 1e-6  # added to the squared norm of queries and keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig(MixerConfig):
    """A mixer of the gated delta rule."""

    heads: int  # number of value heads
    key_heads: int  # number of query and key heads, each of which serves heads / key_heads value heads
    key_width: int  # width of a query or key; the state of a head has key_width x value_width elements
    value_width: int  # width of a value
    conv: int  # taps of the causal depthwise convolutions, including that of the current token
    norm_eps: float  # eps of the RMSNorm over the values of a head, before the gate
    channel_decay: bool = False  # use a decay per channel of a key (Kimi) instead of per head
    rank: int | None = None  # rank of the maps to decay and gate; none for full rank
    gate: str = "silu"  # activation of the output gate
    negative: bool = False  # double beta, so that eigenvalues of the transition reach -1 (arXiv:2411.12537)
    dt_min: float = 1e-3  # smallest initial step size; step sizes, which scale the decay, are initialized log-uniformly
    dt_max: float = 0.1  # largest initial step size
    chunk: int = CHUNK  # tokens per chunk of the scan; affects speed and memory only

    def __post_init__(self):
        require_at_least(self, 1, "heads", "key_heads", "key_width", "value_width", "conv", "chunk", "rank")
        if self.heads % self.key_heads:
            raise InputError("heads", f"{self.heads} is not divisible by key_heads = {self.key_heads}")
        if self.norm_eps <= 0:
            raise InputError("norm_eps", f"{self.norm_eps} is not positive")
        require_choice(self, "gate", GATES)
        require_dt_range(self.dt_min, self.dt_max)

    @property
    def decays(self) -> tuple[int, ...]:
        """Shape of the decays of a position."""
        return (self.heads, self.key_width) if self.channel_decay else (self.heads,)

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"delta {self.heads} x {self.key_width} x {self.value_width}"

    def exchange(self, length: int, shards: int) -> str:
        """The state, and the last inputs of the convolutions."""
        return "state + halo"


class Delta(Mixer):
    """out(gate · norm(delta_rule(unit(q), unit(k), v))), where q, k and v are silu(conv(linear(x)))."""

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
        self.dt_bias = parameter(rngs, self._init_dt, (decays,), (decay_axis,))
        self.log_decay = parameter(rngs, init_log_decay, (h,), (None,))
        self.norm = GatedNorm(config.value_width, config.norm_eps, rngs, activation=config.gate, axis=None)
        axes, scale = ("inner", "width"), output_scale(stream)
        self.out = Linear(values, m, axes, dtype=dtype, rngs=rngs, scale=scale)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        tokens = context.tokens
        x = tokens.zero_padding(x)
        return self._scan(x, [conv(linear(x), tokens) for linear, conv in self._inputs.values()], tokens)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the state before the first token, whose size does not depend on `length`."""
        config = self.config
        convs = {name: conv.init_cache(batch) for name, (_, conv) in self._inputs.items()}
        shape = (batch, config.heads, config.key_width, config.value_width)
        return convs | {"state": jnp.zeros(shape, jnp.float32)}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens."""
        inputs, after = [], {}
        for name, (linear, conv) in self._inputs.items():
            y, after[name] = conv.extend(linear(x), cache[name], context.tokens)
            inputs.append(y)
        y, after["state"] = self._scan(x, inputs, context.tokens, cache["state"])
        return y, after

    def cost(self, length: int) -> Cost:
        """Cost of the projections, the convolutions, the state, and half a chunk of positions within a chunk.

        The state is read by key and by query, and written: 6 FLOPs per element. A position within a chunk takes a
        product of keys, a product of query and key, and two sums of values. The inversion of a chunk's system is not
        counted.
        """
        config = self.config
        parts = [part for pair in self._inputs.values() for part in pair]
        parts += [self.decay, self.gate, self.beta, self.out]
        parts += [low for low in (self.decay_low, self.gate_low) if low is not None]
        state = 6.0 * config.heads * config.key_width * config.value_width
        keys = (config.heads if config.channel_decay else config.key_heads) * config.key_width
        inside = 2.0 * min(config.chunk, length) * (keys + config.heads * config.value_width)
        return Cost(0, sum(part.flops for part in parts) + state + inside)

    @property
    def _inputs(self) -> dict[str, tuple[Linear, ShortConv]]:
        """Maps of queries, keys and values, by the name of the convolution's cache."""
        return {
            "conv_query": (self.query, self.conv_query),
            "conv_key": (self.key, self.conv_key),
            "conv_value": (self.value, self.conv_value),
        }

    def _scan(self, x: Array, inputs: list[Array], tokens: Tokens, state: Array | None = None) -> tuple[Array, Array]:
        """The output and the next state, given the convolved queries, keys and values."""
        q, k, v = self._split(*(tokens.zero_padding(jax.nn.silu(y)) for y in inputs))
        decay, beta = self._rates(x)
        y, state = delta_rule(
            q, k, v, tokens.zero_padding(decay), beta, state=state, starts=tokens.starts, chunk=self.config.chunk
        )
        return self._project_out(x, y), state

    def _split(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Heads. Queries and keys are unit vectors in float32, and queries are divided by the root of their width."""
        config = self.config
        q, k = (x.reshape(*x.shape[:-1], config.key_heads, config.key_width) for x in (q, k))
        v = v.reshape(*v.shape[:-1], config.heads, config.value_width)
        return _unit(q) * config.key_width**-0.5, _unit(k), v

    def _rates(self, x: Array) -> tuple[Array, Array]:
        """Log decay and beta, in float32."""
        decay, beta = self.decay(x if self.decay_low is None else self.decay_low(x)), self.beta(x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        dt = jax.nn.softplus(add(decay.astype(wide), self.dt_bias[...])).reshape(*x.shape[:-1], *self.config.decays)
        rate, beta = jnp.exp(self.log_decay[...]), jax.nn.sigmoid(beta.astype(wide))
        decay = -multiply(dt, rate[:, None] if self.config.channel_decay else rate)
        return decay, 2 * beta if self.config.negative else beta

    def _project_out(self, x: Array, y: Array) -> Array:
        gate = self.gate(x if self.gate_low is None else self.gate_low(x))
        return self.out(self.norm(y, gate.reshape(y.shape)).reshape(gate.shape))

    def _init_dt(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return init_dt_bias(key, shape, dtype, self.config.dt_min, self.config.dt_max)


def _unit(x: Array) -> Array:
    """Divides `x` by its norm, in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + UNIT_EPS)
