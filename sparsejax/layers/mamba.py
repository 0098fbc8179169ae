"""The Mamba mixer: a selective state space (Gu and Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.stream import NOTHING, Context, Cost, Linear, Stream, output_scale, parameter
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
    def sees(self) -> patterns.Pattern:
        """What a position takes from the others: its whole past, by way of the state."""
        return patterns.Causal()


class Mamba(nnx.Module):
    """Gate · scan(silu(conv(x))): causal by construction, with a state in place of a cache that grows."""

    def __init__(self, config: MambaConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, d, n, dtype = stream.width, config.inner, config.state, stream.dtype
        self.input = Linear(m, d, ("width", "inner"), dtype=dtype, rngs=rngs)
        self.gate = Linear(m, d, ("width", "inner"), dtype=dtype, rngs=rngs)
        taps = jax.nn.initializers.normal(config.conv**-0.5)
        self.conv = parameter(rngs, taps, (config.conv, d), (None, "inner"))
        self.conv_bias = parameter(rngs, jax.nn.initializers.zeros, (d,), ("inner",))
        self.select = Linear(d, config.dt_rank + 2 * n, ("inner", None), dtype=dtype, rngs=rngs)
        self.dt = Linear(config.dt_rank, d, (None, "inner"), dtype=dtype, rngs=rngs)
        self.dt_bias = parameter(rngs, self._start_dt, (d,), ("inner",))
        self.log_decay = parameter(rngs, _start_decay, (d, n), ("inner", None))
        self.skip = parameter(rngs, jax.nn.initializers.ones, (d,), ("inner",))
        self.out = Linear(d, m, ("inner", "width"), dtype=dtype, rngs=rngs, scale=output_scale(stream))

    def __call__(self, x: Float[Array, "b t m"], context: Context = NOTHING) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        taps, t = self.conv[...].astype(x.dtype), x.shape[1]
        padded = jnp.pad(self.input(x), ((0, 0), (len(taps) - 1, 0), (0, 0)))
        u = sum(taps[i] * padded[:, i : i + t] for i in range(len(taps)))
        u = jax.nn.silu(u + self.conv_bias[...].astype(x.dtype))
        y, _ = selective_scan(u, *self._selection(u))
        return self._finish(x, u, y)

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """The state before the first token; its size does not depend on `length`."""
        d = self.config.inner
        return {
            "conv": jnp.zeros((batch, self.config.conv - 1, d), self.input.dtype),
            "state": jnp.zeros((batch, d, self.config.state), jnp.float32),
        }

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = NOTHING,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """Mixes one more token."""
        recent = jnp.concatenate([cache["conv"], self.input(x)[:, None]], axis=1)
        u = (recent * self.conv[...].astype(x.dtype)).sum(axis=1)
        u = jax.nn.silu(u + self.conv_bias[...].astype(x.dtype))
        y, state = selective_step(u.astype(jnp.float32), *self._selection(u), cache["state"])
        return self._finish(x, u, y.astype(x.dtype)), {"conv": recent[:, 1:], "state": state}

    def cost(self, length: int) -> Cost:
        """No pairs; forward FLOPs for each token: the projections, the convolution and 7 for each state number."""
        linear = sum(part.flops for part in (self.input, self.gate, self.select, self.dt, self.out))
        return Cost(0, linear + self.config.inner * (2.0 * self.config.conv + 7.0 * self.config.state))

    def _selection(self, u: Array) -> tuple[Array, Array, Array, Array]:
        """Step sizes, decay, B and C, in float32, from the convolved input."""
        r, n = self.config.dt_rank, self.config.state
        low, B, C = jnp.split(self.select(u), [r, r + n], axis=-1)
        dt = jax.nn.softplus(self.dt(low).astype(jnp.float32) + self.dt_bias[...])
        return dt, -jnp.exp(self.log_decay[...]), B.astype(jnp.float32), C.astype(jnp.float32)

    def _finish(self, x: Array, u: Array, y: Array) -> Array:
        y = y + u * self.skip[...].astype(u.dtype)
        return self.out(y * jax.nn.silu(self.gate(x)))

    def _start_dt(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """Bias whose softplus is log-uniform in [dt_min, dt_max]."""
        low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
        return dt + jnp.log(-jnp.expm1(-dt))


def _start_decay(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """A[d, n] = -(n + 1), stored as a logarithm (S4D-Real, arXiv:2206.11893)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
