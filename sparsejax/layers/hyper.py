"""Hyper-connections (arXiv:2409.19606): several residual streams, which the branches of a layer read and write."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.norm import standardize
from sparsejax.layers.stream import Linear, parameter

APART = 8.0  # initial logit of a stream with itself, above that with another one
SCALE = 0.01  # initial factor on what the streams add to the initial weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperConfig:
    """Residual streams side by side, which start as copies of the embedding.

    | kind | a branch reads | its output is added | the streams before |
    |---|---|---|---|
    | `sinkhorn` | their weighted sum | by a weight per stream | are mixed by a doubly stochastic matrix |
    | `gated` | the mean of their norms, gated per channel | by a weight per stream | stay as they are |

    All weights are functions of the streams. After the last layer the streams are read once more, without output.
    `sinkhorn` is mHC (arXiv:2512.24880) as in DeepSeek-V4; `gated` is that of Qwen4-Exp, and norms the input itself, so
    that `norm` of the layers and of the model can be none.
    """

    kind: str  # sinkhorn or gated
    streams: int  # number of streams
    eps: float  # number added to the mean square in the norms of the streams
    steps: int = 20  # normalizations of the columns by sinkhorn
    floor: float = 1e-6  # added to the weights of sinkhorn, and to the sums by which it divides
    rank: int | None = None  # width of the hidden layer of the gates, required by gated

    def __post_init__(self):
        require_choice(self, "kind", KINDS)
        require_at_least(self, 2, "streams")
        require_at_least(self, 1, "steps", "rank")
        if self.eps <= 0:
            raise InputError("eps", f"{self.eps} is not positive")
        if (self.kind == "gated") != (self.rank is not None):
            raise InputError("rank", "gated requires it" if self.rank is None else "applies to kind = 'gated' only")


class Sinkhorn(nnx.Module):
    """The connection of `sinkhorn`; `reads_only` leaves out what writes."""

    def __init__(self, config: HyperConfig, width: int, dtype: DTypeLike, rngs: nnx.Rngs, reads_only: bool = False):
        n, self.config = config.streams, config
        outputs = n if reads_only else n * (n + 2)
        dtype = jnp.promote_types(dtype, jnp.float32)
        self.weights = Linear(n * width, outputs, ("width", None), dtype=dtype, rngs=rngs)
        base = np.concatenate([np.full(n, -np.log(n - 1)), np.zeros(n), APART * np.eye(n).ravel()])
        self.base = parameter(rngs, lambda key, shape, dtype: jnp.asarray(base[:outputs], dtype), (outputs,), (None,))
        factors = (1 if reads_only else 3,)
        self.scale = parameter(rngs, jax.nn.initializers.constant(SCALE), factors, (None,))

    def read(self, x: Float[Array, "*b nm"]) -> tuple[Float[Array, "*b m"], tuple[Array, Array] | None]:
        """Returns the input of a branch, and the weights for `write`."""
        n, floor, streams = self.config.streams, self.config.floor, self._split(x)
        flat = streams.reshape(x.shape)
        logits, base = self.weights(standardize(flat, self.config.eps)), self.base[...]
        ends = (n, 2 * n, n * (n + 2))[: self.scale.shape[0]]
        slices = [slice(first, end) for first, end in zip((0, *ends), ends, strict=False)]
        parts = [logits[..., at] * scale + base[at] for at, scale in zip(slices, self.scale[...], strict=True)]
        y = jnp.einsum("...n,...nm->...m", jax.nn.sigmoid(parts[0]) + floor, streams).astype(x.dtype)
        if len(parts) == 1:
            return y, None
        return y, (2 * jax.nn.sigmoid(parts[1]), self._balance(parts[2].reshape(*x.shape[:-1], n, n)))

    def write(
        self, x: Float[Array, "*b nm"], y: Float[Array, "*b m"], weights: tuple[Array, Array]
    ) -> Float[Array, "*b nm"]:
        """Returns the mixed streams plus the output of a branch."""
        added, mixed = weights
        streams = jnp.einsum("...ij,...im->...jm", mixed, self._split(x))
        return (streams + added[..., None] * y[..., None, :]).astype(x.dtype).reshape(x.shape)

    def _balance(self, logits: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
        """A nearly doubly stochastic matrix, by the algorithm of Sinkhorn and Knopp."""

        def normalize(x: Array, axis: int) -> Array:
            return x / (x.sum(axis=axis, keepdims=True) + self.config.floor)

        x = normalize(jax.nn.softmax(logits, axis=-1) + self.config.floor, -2)
        return jax.lax.fori_loop(0, self.config.steps - 1, lambda _, x: normalize(normalize(x, -1), -2), x)

    def _split(self, x: Float[Array, "*b nm"]) -> Float[Array, "*b n m"]:
        return _split_wide(x, self.config.streams)

    @property
    def flops(self) -> float:
        """Forward FLOPs per token: the weights, and the products of the streams with them."""
        n, outputs = self.config.streams, self.base.shape[0]
        return self.weights.flops + 2.0 * outputs * (self.weights.weight.shape[0] // n)


class Gated(nnx.Module):
    """The connection of `gated`; `reads_only` leaves out what writes."""

    def __init__(self, config: HyperConfig, width: int, dtype: DTypeLike, rngs: nnx.Rngs, reads_only: bool = False):
        assert config.rank is not None  # checked at construction
        n, self.config = config.streams, config

        def linear(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Linear:
            return Linear(inputs, outputs, axes, dtype=dtype, rngs=rngs)

        self.scale = parameter(rngs, jax.nn.initializers.zeros, (n * width,), (None,))  # 1 is added
        self.down = linear(n * width, config.rank, ("width", None))
        self.up = linear(config.rank, n * width, (None, "width"))
        self.weights = None if reads_only else linear(n * width, n, ("width", None))

    def read(self, x: Float[Array, "*b nm"]) -> tuple[Float[Array, "*b m"], Float[Array, "*b n"] | None]:
        """Returns the input of a branch, and the weights for `write`."""
        n = self.config.streams
        normed = standardize(_split_wide(x, n), self.config.eps).reshape(x.shape) * (1 + self.scale[...])
        normed = normed.astype(x.dtype)
        gates = jax.nn.sigmoid(self.up(jax.nn.silu(self.down(normed) / n)))
        y = (gates * normed).reshape(*x.shape[:-1], n, -1).mean(axis=-2)
        return y, None if self.weights is None else 2 * jax.nn.sigmoid(self.weights(normed) / n)

    def write(self, x: Float[Array, "*b nm"], y: Float[Array, "*b m"], weights: Array) -> Float[Array, "*b nm"]:
        """Returns the streams plus the output of a branch."""
        return x + (weights[..., None] * y[..., None, :]).reshape(x.shape)

    @property
    def flops(self) -> float:
        """Forward FLOPs per token of the linear maps."""
        return sum(part.flops for part in (self.down, self.up, self.weights) if part is not None)


KINDS: dict[str, type[Sinkhorn] | type[Gated]] = {"sinkhorn": Sinkhorn, "gated": Gated}


def make_connection(
    config: HyperConfig | None, width: int, dtype: DTypeLike, rngs: nnx.Rngs, reads_only: bool = False
) -> Sinkhorn | Gated | None:
    """Builds the connection that `config` describes, if any, of a branch or, if it `reads_only`, before the head."""
    return None if config is None else KINDS[config.kind](config, width, dtype, rngs, reads_only)


def _split_wide(x: Float[Array, "*b nm"], streams: int) -> Float[Array, "*b n m"]:
    """The streams, in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*x.shape[:-1], streams, -1)
