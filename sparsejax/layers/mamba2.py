"""The Mamba-2 mixer: a state space with a scalar decay per head (Dao and Gu 2024, arXiv:2405.21060)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparsejax.errors import InputError, require_at_least
from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.conv import ShortConv
from sparsejax.layers.mamba import init_dt_bias, require_dt_range
from sparsejax.layers.norm import GatedNorm
from sparsejax.layers.protocols import Cache, Mixer, MixerConfig
from sparsejax.layers.stream import Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import ssd
from sparsejax.ops.broadcast import add, multiply
from sparsejax.ops.ssd import CHUNK

MULTIPLIED = ("gate", "x", "B", "C", "dt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """A Mamba-2 mixer."""

    heads: int  # number of heads of the state
    head_width: int  # width of a head, whose state has head_width x state elements
    state: int  # elements of the state per channel
    groups: int  # number of groups of heads that share B and C
    conv: int  # taps of the causal depthwise convolutions, including that of the current token
    dt_min: float  # smallest initial step size; step sizes are initialized log-uniformly
    dt_max: float  # largest initial step size
    norm_eps: float | None  # eps of the gated RMSNorm; none for a gate without a norm
    norm_groups: int = 1  # number of groups in which channels are normalized
    norm_before_gate: bool = False  # normalize before the gate instead of after it
    chunk: int = CHUNK  # tokens per chunk of the scan; affects speed and memory only
    dt_floor: float = 0.0  # lower limit to which step sizes are clipped
    dt_ceiling: float | None = None  # upper limit to which step sizes are clipped; none for no limit
    bias: bool = False  # whether the projections from the stream have a bias
    out_bias: bool = False  # whether the projection to the stream has a bias
    conv_bias: bool = True  # whether the convolutions have a bias
    multipliers: tuple[float, ...] = ()  # factors on gate, x, B, C and dt (Falcon-H1, arXiv:2507.22448); empty for none

    def __post_init__(self):
        require_at_least(self, 1, "heads", "head_width", "state", "groups", "conv", "chunk", "norm_groups")
        if self.heads % self.groups:
            raise InputError("heads", f"{self.heads} is not divisible by groups = {self.groups}")
        if self.inner % self.norm_groups:
            raise InputError("norm_groups", f"{self.norm_groups} does not divide heads * head_width = {self.inner}")
        require_dt_range(self.dt_min, self.dt_max)
        if not 0 <= self.dt_floor <= (math.inf if self.dt_ceiling is None else self.dt_ceiling):
            raise InputError("dt_floor", f"{self.dt_floor} is not in [0, dt_ceiling = {self.dt_ceiling}]")
        if len(self.multipliers) not in (0, len(MULTIPLIED)):
            raise InputError("multipliers", f"{len(self.multipliers)} given, expected one per {', '.join(MULTIPLIED)}")

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_width

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"mamba2 {self.heads} x {self.head_width} x {self.state}"

    def exchange(self, length: int, shards: int) -> str:
        """The state, and the last inputs of the convolutions."""
        return "state + halo"


class Mamba2(Mixer):
    """out(norm(ssd(silu(conv(x)), B, C) · silu(gate)))."""

    def __init__(self, config: Mamba2Config, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, d, h, dtype = stream.width, config.inner, config.heads, stream.dtype
        select = 2 * config.groups * config.state  # B and C

        def project(outputs: int, axis: str | None = "inner") -> Linear:
            return Linear(m, outputs, ("width", axis), dtype=dtype, rngs=rngs, bias=config.bias)

        self.gate, self.input = project(d), project(d)
        self.select, self.dt = project(select, None), project(h, None)
        self.conv = ShortConv(d, config.conv, bias=config.conv_bias, dtype=dtype, rngs=rngs)
        self.conv_select = ShortConv(select, config.conv, bias=config.conv_bias, dtype=dtype, rngs=rngs, axis=None)
        self.dt_bias = parameter(rngs, self._init_dt, (h,), (None,))
        self.log_decay = parameter(rngs, init_log_decay, (h,), (None,))
        self.skip = parameter(rngs, jax.nn.initializers.ones, (h,), (None,))
        self.norm = None if config.norm_eps is None else self._make_norm(config.norm_eps, rngs)
        axes, scale = ("inner", "width"), output_scale(stream)
        self.out = Linear(d, m, axes, dtype=dtype, rngs=rngs, bias=config.out_bias, scale=scale)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        tokens = context.tokens
        gate, u, select, dt = self._project(tokens.zero_padding(x))
        return self._scan(gate, self.conv(u, tokens), self.conv_select(select, tokens), dt, tokens)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the state before the first token, whose size does not depend on `length`."""
        config = self.config
        return {
            "conv": self.conv.init_cache(batch),
            "conv_select": self.conv_select.init_cache(batch),
            "state": jnp.zeros((batch, config.heads, config.head_width, config.state), jnp.float32),
        }

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens."""
        gate, u, select, dt = self._project(x)
        u, conv = self.conv.extend(u, cache["conv"], context.tokens)
        select, conv_select = self.conv_select.extend(select, cache["conv_select"], context.tokens)
        y, state = self._scan(gate, u, select, dt, context.tokens, cache["state"])
        return y, {"conv": conv, "conv_select": conv_select, "state": state}

    def cost(self, length: int) -> Cost:
        """Cost of the projections, the convolutions, the state, and half a chunk of positions within a chunk."""
        config = self.config
        parts = (self.gate, self.input, self.select, self.dt, self.conv, self.conv_select, self.out)
        states = 4.0 * config.inner * config.state  # written and read
        inside = min(config.chunk, length) * (config.groups * config.state + config.inner)
        return Cost(0, sum(part.flops for part in parts) + states + inside)

    @property
    def _decay(self) -> Array:
        return -jnp.exp(self.log_decay[...])

    def _project(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Gate, x, concatenated B and C, and step sizes in float32."""
        config = self.config
        gate, u, select, dt = (linear(x) for linear in (self.gate, self.input, self.select, self.dt))
        if config.multipliers:
            by_gate, by_x, by_B, by_C, by_dt = config.multipliers
            B, C = jnp.split(select, 2, axis=-1)
            gate, u, dt = by_gate * gate, by_x * u, by_dt * dt
            select = jnp.concatenate([by_B * B, by_C * C], axis=-1)
        dt = jax.nn.softplus(add(dt.astype(jnp.promote_types(dt.dtype, jnp.float32)), self.dt_bias[...]))
        return gate, u, select, jnp.clip(dt, config.dt_floor, config.dt_ceiling)

    def _scan(
        self, gate: Array, u: Array, select: Array, dt: Array, tokens: Tokens, state: Array | None = None
    ) -> tuple[Array, Array]:
        """The output and the next state, given the convolved x, and B and C."""
        u, select = (tokens.zero_padding(jax.nn.silu(x)) for x in (u, select))
        u, B, C = self._split(u, select)
        y, state = ssd(
            u, tokens.zero_padding(dt), self._decay, B, C, state=state, starts=tokens.starts, chunk=self.config.chunk
        )
        return self._project_out(y, u, gate), state

    def _split(self, u: Array, select: Array) -> tuple[Array, Array, Array]:
        """Heads of x, and groups of B and C."""
        config = self.config
        B, C = (a.reshape(*a.shape[:-1], config.groups, config.state) for a in jnp.split(select, 2, axis=-1))
        return u.reshape(*u.shape[:-1], config.heads, config.head_width), B, C

    def _project_out(self, y: Array, u: Array, gate: Array) -> Array:
        y = (y + multiply(u, self.skip[...].astype(y.dtype)[:, None])).reshape(gate.shape)
        return self.out(y * jax.nn.silu(gate) if self.norm is None else self.norm(y, gate))

    def _make_norm(self, eps: float, rngs: nnx.Rngs) -> GatedNorm:
        config = self.config
        first = not config.norm_before_gate
        return GatedNorm(config.inner, eps, rngs, groups=config.norm_groups, gate_first=first)

    def _init_dt(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return init_dt_bias(key, shape, dtype, self.config.dt_min, self.config.dt_max)


def init_log_decay(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Logarithm of -A, with -A uniform in [1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
