"""Lightning attention: linear attention with a fixed decay rate per head (MiniMax-01, arXiv:2501.08313)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.errors import require_at_least
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.norm import GatedNorm
from sparsejax.layers.protocols import Cache, Mixer, MixerConfig
from sparsejax.layers.stream import Cost, Linear, Stream, output_scale
from sparsejax.ops import ssd
from sparsejax.ops.ssd import CHUNK

TINY = 1e-5  # keeps the decay of the last layer above 0, and the rate defined for a single layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningConfig(MixerConfig):
    """Linear attention with fixed decay rates."""

    heads: int  # number of heads of queries, keys and values
    head_width: int  # width of a head, whose state has head_width x head_width elements
    norm_eps: float = 1e-6  # eps of the RMSNorm over all heads
    chunk: int = CHUNK  # tokens per chunk of the scan; affects speed and memory only

    def __post_init__(self):
        require_at_least(self, 1, "heads", "head_width", "chunk")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        return f"lightning attention {self.heads} x {self.head_width}"

    def exchange(self, length: int, shards: int) -> str:
        """The state."""
        return "state"


class Lightning(Mixer):
    """sigmoid(gate(x)) · norm(o), o[t] = sum over s <= t of exp(-rate (t - s)) (q[t] · k[s]) v[s].

    Queries, keys and values pass through silu. The rate of head h of H is 2^(-8 (h + 1) / H), times a factor that
    falls from 1 in the first layer to nearly 0 in the last. `Extras.layer` is the index of the layer; it defaults to
    the first.
    """

    def __init__(self, config: LightningConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.depth = config, stream.depth
        m, inner, dtype = stream.width, config.heads * config.head_width, stream.dtype

        def project() -> Linear:
            return Linear(m, inner, ("width", "heads"), dtype=dtype, rngs=rngs)

        self.query, self.key, self.value, self.gate = project(), project(), project(), project()
        self.norm = GatedNorm(inner, config.norm_eps, rngs, activation="sigmoid", axis="heads")
        self.out = Linear(inner, m, ("heads", "width"), dtype=dtype, rngs=rngs, scale=output_scale(stream))

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        return self._scan(x, context)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the state before the first token, whose size does not depend on `length`."""
        width = self.config.head_width
        return {"state": jnp.zeros((batch, self.config.heads, width, width), jnp.float32)}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens."""
        y, state = self._scan(x, context, cache["state"])
        return y, {"state": state}

    def cost(self, length: int) -> Cost:
        """Cost of the projections, the state, and half a chunk of positions within a chunk."""
        config = self.config
        inner = config.heads * config.head_width
        linear = sum(part.flops for part in (self.query, self.key, self.value, self.gate, self.out))
        states = 4.0 * inner * config.head_width  # written and read
        return Cost(0, linear + states + 2.0 * min(config.chunk, length) * inner)

    def _scan(self, x: Array, context: Context, state: Array | None = None) -> tuple[Array, Array]:
        """The output and the next state."""
        tokens = context.tokens
        x = tokens.zero_padding(x)
        q, k, v = self._project(x)  # zeros at padding: the projections have no bias
        steps = tokens.zero_padding(jnp.ones(v.shape[:3], jnp.float32))
        decay = self._decay(context)
        y, state = ssd(v, steps, decay, k, q, state=state, starts=tokens.starts, chunk=self.config.chunk)
        return self._project_out(x, y), state

    def _decay(self, context: Context) -> Float[Array, " h"]:
        heads = self.config.heads
        layer = 0 if context.extras.layer is None else context.extras.layer
        rates = 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)
        return -rates * (1 - layer / (self.depth - 1 + TINY) + TINY)

    def _project(self, x: Array) -> tuple[Array, ...]:
        """Queries, keys and values of all heads."""
        shape = *x.shape[:-1], self.config.heads, self.config.head_width
        return tuple(jax.nn.silu(linear(x)).reshape(shape) for linear in (self.query, self.key, self.value))

    def _project_out(self, x: Array, y: Array) -> Array:
        return self.out(self.norm(y.reshape(*x.shape[:-1], -1), self.gate(x)))
