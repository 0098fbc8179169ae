"""Feed-forward parts: transformations of every token by itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.protocols import Auxiliary
from sparsejax.layers.stream import Linear, Stream, output_scale

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,  # Primer (arXiv:2109.08668)
}
KINDS = ("gated", "plain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """A feed-forward network with one hidden layer."""

    kind: str  # "gated" (GLU, arXiv:2002.05202) or "plain"
    width: int  # width of the hidden layer
    activation: str  # activation of the hidden layer
    bias: bool = False  # whether the linear maps have a bias
    gate_scale: float = 1.0  # factor on the gate, before the activation (Falcon-H1, arXiv:2507.22448)
    out_scale: float = 1.0  # factor on the output
    limit: float | None = None  # bound of gate and values before the activation (gpt-oss); none for no bound
    limit_offset: float = 1.0  # added to bounded values; 1 in gpt-oss, 0 in DeepSeek-V4
    alpha: float = 1.0  # slope of "silu": x · sigmoid(alpha · x)

    def __post_init__(self):
        require_choice(self, "kind", KINDS)
        require_choice(self, "activation", ACTIVATIONS)
        require_at_least(self, 1, "width")
        if self.limit is not None and self.limit <= 0:
            raise InputError("limit", f"{self.limit} is not positive")
        if self.limit is not None and self.kind != "gated":
            raise InputError("limit", f"{self.limit} bounds the gate, but kind = {self.kind!r}")
        if self.alpha != 1 and self.activation != "silu":
            raise InputError("alpha", f"{self.alpha} applies to silu, but activation = {self.activation!r}")


def activate(name: str, alpha: float, x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Applies an activation; `alpha` is the slope of "silu", x · sigmoid(alpha · x)."""
    return ACTIVATIONS[name](x) if alpha == 1 else x * jax.nn.sigmoid(alpha * x)


def bound(
    gate: Float[Array, "*b f"], up: Float[Array, "*b f"], limit: float | None, offset: float
) -> tuple[Float[Array, "*b f"], Float[Array, "*b f"]]:
    """Bounds the gate from above and the values on both sides, and adds `offset` to the values."""
    if limit is None:
        return gate, up
    return jnp.minimum(gate, limit), jnp.clip(up, -limit, limit) + offset


class Mlp(nnx.Module):
    """down(act(up(x))) or, gated, down(act(gate(x)) · up(x))."""

    def __init__(self, config: MlpConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, f, scale = stream.width, config.width, output_scale(stream)

        def project(inputs: int, outputs: int, axes: tuple[str, str], scale: float = 1.0) -> Linear:
            return Linear(inputs, outputs, axes, dtype=stream.dtype, rngs=rngs, bias=config.bias, scale=scale)

        self.up = project(m, f, ("width", "ff"))
        self.gate = project(m, f, ("width", "ff")) if config.kind == "gated" else None
        self.down = project(f, m, ("ff", "width"), scale)

    def __call__(self, x: Float[Array, "*b m"], context: Context = EMPTY) -> tuple[Float[Array, "*b m"], Auxiliary]:
        """Returns the output and no losses."""
        config = self.config
        if self.gate is None:
            hidden = activate(config.activation, config.alpha, self.up(x))
        else:
            gate = self.gate(x)
            gate = gate if config.gate_scale == 1 else gate * config.gate_scale
            gate, up = bound(gate, self.up(x), config.limit, config.limit_offset)
            hidden = activate(config.activation, config.alpha, gate) * up
        y = self.down(hidden)
        return (y if config.out_scale == 1 else y * config.out_scale), Auxiliary({})

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        return sum(linear.flops for linear in (self.up, self.gate, self.down) if linear is not None)
