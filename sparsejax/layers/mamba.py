"""The Mamba mixer: a selective state space (Gu and Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.conv import ShortConv
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.stream import EMPTY, Context, Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import selective_scan, selective_step


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """A Mamba mixer of `inner` channels with `state` numbers each."""

    inner: int
    state: int
    conv: int  # taps of the causal depthwise convolution, the current token's included
    dt_rank: int
    dt_min: float  # step sizes start log-uniform in [dt_min, dt_max]
    dt_max: float
    norm_eps: float | None = None  # RMSNorm of the step sizes' low-rank form, B and C (Jamba, arXiv:2403.19887)
    bias: bool = False  # of the projections from and into the stream
    conv_bias: bool = True

    def __post_init__(self):
        if min(self.inner, self.state, self.conv, self.dt_rank) < 1:
            raise ValueError("inner, state, conv and dt_rank must be at least 1")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"needs 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"mamba {self.inner} x {self.state}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position takes from the others: its whole past, by way of the state."""
        return patterns.Causal()


class Mamba(nnx.Module):
    """Gate · scan(silu(conv(x))): causal by construction, with a state in place of a cache that grows."""

    def __init__(self, config: MambaConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, d, n, dtype = stream.width, config.inner, config.state, stream.dtype
        self.input = Linear(m, d, ("width", "inner"), dtype=dtype, rngs=rngs, bias=config.bias)
        self.gate = Linear(m, d, ("width", "inner"), dtype=dtype, rngs=rngs, bias=config.bias)
        self.conv = ShortConv(d, config.conv, bias=config.conv_bias, dtype=dtype, rngs=rngs)
        self.select = Linear(d, config.dt_rank + 2 * n, ("inner", None), dtype=dtype, rngs=rngs)
        self.dt = Linear(config.dt_rank, d, (None, "inner"), dtype=dtype, rngs=rngs)
        self.dt_bias = parameter(rngs, self._start_dt, (d,), ("inner",))
        self.log_decay = parameter(rngs, _start_decay, (d, n), ("inner", None))
        self.skip = parameter(rngs, jax.nn.initializers.ones, (d,), ("inner",))
        axes, start = ("inner", "width"), output_scale(stream)
        self.out = Linear(d, m, axes, dtype=dtype, rngs=rngs, bias=config.bias, scale=start)
        norm = NormConfig("none" if config.norm_eps is None else "rms", config.norm_eps or 1.0)
        self.dt_norm = Norm(norm, config.dt_rank, rngs, axis=None)
        self.B_norm, self.C_norm = Norm(norm, n, rngs, axis=None), Norm(norm, n, rngs, axis=None)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        x = context.zero_padding(x)
        u = context.zero_padding(jax.nn.silu(self.conv(self.input(x), context)))
        y, _ = selective_scan(u, *self._selection(u), starts=context.starts)
        return self._finish(x, u, y)

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """The state before the first token; its size does not depend on `length`."""
        d = self.config.inner
        return {
            "conv": self.conv.init_cache(batch),
            "state": jnp.zeros((batch, d, self.config.state), jnp.float32),
        }

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """Mixes one more token."""
        u, recent = self.conv.step(self.input(x), cache["conv"])
        u = jax.nn.silu(u)
        y, state = selective_step(u.astype(jnp.float32), *self._selection(u), cache["state"])
        return self._finish(x, u, y.astype(x.dtype)), {"conv": recent, "state": state}

    def cost(self, length: int) -> Cost:
        """No pairs; forward FLOPs for each token: the projections, the convolution and 7 for each state number."""
        parts = (self.input, self.gate, self.conv, self.select, self.dt, self.out)
        return Cost(0, sum(part.flops for part in parts) + 7.0 * self.config.inner * self.config.state)

    def _selection(self, u: Array) -> tuple[Array, Array, Array, Array]:
        """Step sizes, decay, B and C, in float32, from the convolved input."""
        r, n = self.config.dt_rank, self.config.state
        low, B, C = jnp.split(self.select(u), [r, r + n], axis=-1)
        low, B, C = self.dt_norm(low), self.B_norm(B), self.C_norm(C)
        dt = jax.nn.softplus(self.dt(low).astype(jnp.float32) + self.dt_bias[...])
        return dt, -jnp.exp(self.log_decay[...]), B.astype(jnp.float32), C.astype(jnp.float32)

    def _finish(self, x: Array, u: Array, y: Array) -> Array:
        y = y + u * self.skip[...].astype(u.dtype)
        return self.out(y * jax.nn.silu(self.gate(x)))

    def _start_dt(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return start_dt(key, shape, dtype, self.config.dt_min, self.config.dt_max)


def start_dt(key: Array, shape: tuple[int, ...], dtype: jnp.dtype, low: float, high: float) -> Array:
    """Biases whose softplus is log-uniform in [low, high]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
    return dt + jnp.log(-jnp.expm1(-dt))


def _start_decay(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """A[d, n] = -(n + 1), stored as a logarithm (S4D-Real, arXiv:2206.11893)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
