"""The Mamba mixer: a selective state space (Gu and Dao 2023, arXiv:2312.00752)."""

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
from sparsejax.layers.norm import NormConfig, make_norm, normalize
from sparsejax.layers.protocols import Cache, Mixer, MixerConfig
from sparsejax.layers.stream import Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import selective_scan
from sparsejax.ops.broadcast import add, multiply


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """A Mamba mixer."""

    inner: int  # number of channels
    state: int  # elements of the state per channel
    conv: int  # taps of the causal depthwise convolution, including that of the current token
    dt_rank: int  # rank of the map to the step sizes
    dt_min: float  # smallest initial step size; step sizes are initialized log-uniformly
    dt_max: float  # largest initial step size
    # eps of RMSNorms on low-rank step sizes, B and C (Jamba, arXiv:2403.19887); none for no norms
    norm_eps: float | None = None
    bias: bool = False  # whether the projections from and to the stream have a bias
    conv_bias: bool = True  # whether the convolution has a bias

    def __post_init__(self):
        require_at_least(self, 1, "inner", "state", "conv", "dt_rank")
        require_dt_range(self.dt_min, self.dt_max)

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"mamba {self.inner} x {self.state}"

    def exchange(self, length: int, shards: int) -> str:
        """The state, and the last inputs of the convolution."""
        return "state + halo"


class Mamba(Mixer):
    """out(silu(gate(x)) · scan(silu(conv(input(x))))). The cache is a state of constant size."""

    def __init__(self, config: MambaConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, d, n, dtype = stream.width, config.inner, config.state, stream.dtype
        self.input = Linear(m, d, ("width", "inner"), dtype=dtype, rngs=rngs, bias=config.bias)
        self.gate = Linear(m, d, ("width", "inner"), dtype=dtype, rngs=rngs, bias=config.bias)
        self.conv = ShortConv(d, config.conv, bias=config.conv_bias, dtype=dtype, rngs=rngs)
        self.select = Linear(d, config.dt_rank + 2 * n, ("inner", None), dtype=dtype, rngs=rngs)
        self.dt = Linear(config.dt_rank, d, (None, "inner"), dtype=dtype, rngs=rngs)
        self.dt_bias = parameter(rngs, self._init_dt, (d,), ("inner",))
        self.log_decay = parameter(rngs, _init_s4d_decay, (d, n), ("inner", None))
        self.skip = parameter(rngs, jax.nn.initializers.ones, (d,), ("inner",))
        axes, scale = ("inner", "width"), output_scale(stream)
        self.out = Linear(d, m, axes, dtype=dtype, rngs=rngs, bias=config.bias, scale=scale)
        norm = None if config.norm_eps is None else NormConfig(kind="rms", eps=config.norm_eps)
        self.dt_norm = make_norm(norm, config.dt_rank, rngs, axis=None)
        self.B_norm, self.C_norm = make_norm(norm, n, rngs, axis=None), make_norm(norm, n, rngs, axis=None)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        x = context.tokens.zero_padding(x)
        u = self.conv(self.input(x), context.tokens)
        return self._scan(x, u, context.tokens)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the state before the first token, whose size does not depend on `length`."""
        d = self.config.inner
        return {
            "conv": self.conv.init_cache(batch),
            "state": jnp.zeros((batch, d, self.config.state), jnp.float32),
        }

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens."""
        u, conv = self.conv.extend(self.input(x), cache["conv"], context.tokens)
        y, state = self._scan(x, u, context.tokens, cache["state"])
        return y, {"conv": conv, "state": state}

    def cost(self, length: int) -> Cost:
        """Cost of the projections and the convolution, and 7 FLOPs per element of the state."""
        parts = (self.input, self.gate, self.conv, self.select, self.dt, self.out)
        return Cost(0, sum(part.flops for part in parts) + 7.0 * self.config.inner * self.config.state)

    def _scan(self, x: Array, u: Array, tokens: Tokens, state: Array | None = None) -> tuple[Array, Array]:
        """The output and the next state, given the stream and the convolved input."""
        u = tokens.zero_padding(jax.nn.silu(u))
        dt, *rates = self._selection(u)
        y, state = selective_scan(u, tokens.zero_padding(dt), *rates, state=state, starts=tokens.starts)
        return self._project_out(x, u, y), state

    def _selection(self, u: Array) -> tuple[Array, Array, Array, Array]:
        """Step sizes, A, B and C from the convolved input, in float32."""
        r, n = self.config.dt_rank, self.config.state
        low, B, C = jnp.split(self.select(u), [r, r + n], axis=-1)
        low, B, C = normalize(self.dt_norm, low), normalize(self.B_norm, B), normalize(self.C_norm, C)
        low, dtype = self.dt(low), jnp.promote_types(u.dtype, jnp.float32)
        dt = jax.nn.softplus(add(low.astype(dtype), self.dt_bias[...]))
        return dt, -jnp.exp(self.log_decay[...]), B.astype(dtype), C.astype(dtype)

    def _project_out(self, x: Array, u: Array, y: Array) -> Array:
        y = y + multiply(u, self.skip[...].astype(u.dtype))
        return self.out(y * jax.nn.silu(self.gate(x)))

    def _init_dt(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return init_dt_bias(key, shape, dtype, self.config.dt_min, self.config.dt_max)


def require_dt_range(low: float, high: float) -> None:
    """Raises InputError unless 0 < `low` <= `high`."""
    if not 0 < low <= high:
        raise InputError("dt_min", f"{low} is not in (0, {high}], where dt_max = {high}")


def init_dt_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike, low: float, high: float) -> Array:
    """Biases whose softplus is log-uniform in [`low`, `high`]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
    return dt + jnp.log(-jnp.expm1(-dt))


def _init_s4d_decay(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Logarithm of -A, with A[d, n] = -(n + 1) (S4D-Real, arXiv:2206.11893)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
