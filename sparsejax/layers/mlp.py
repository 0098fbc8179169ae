"""Feed-forward parts: what a layer does with each token alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.layers.stream import EMPTY, Context, Linear, Stream, output_scale

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,  # Primer (arXiv:2109.08668)
}
KINDS = ("gated", "plain")


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """`kind`: "gated" (GLU, arXiv:2002.05202) or "plain"; `width`: hidden width; `activation`: by name."""

    kind: str
    width: int
    activation: str
    bias: bool = False  # on every linear map
    gate_scale: float = 1.0  # factor on the gate, before the activation (Falcon-H1, arXiv:2507.22448)
    out_scale: float = 1.0  # factor on the output

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


class Mlp(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) · up(x))."""

    def __init__(self, config: MlpConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        m, f, start = stream.width, config.width, output_scale(stream)

        def project(inputs: int, outputs: int, axes: tuple[str, str], scale: float = 1.0) -> Linear:
            return Linear(inputs, outputs, axes, dtype=stream.dtype, rngs=rngs, bias=config.bias, scale=scale)

        self.up = project(m, f, ("width", "ff"))
        self.gate = project(m, f, ("width", "ff")) if config.kind == "gated" else None
        self.down = project(f, m, ("ff", "width"), start)

    def __call__(
        self, x: Float[Array, "*b m"], context: Context = EMPTY
    ) -> tuple[Float[Array, "*b m"], dict[str, Array]]:
        """The output, and no losses."""
        activate = ACTIVATIONS[self.config.activation]
        hidden = activate(self.up(x)) if self.gate is None else activate(self._open(x)) * self.up(x)
        y = self.down(hidden)
        return (y if self.config.out_scale == 1 else y * self.config.out_scale), {}

    def _open(self, x: Array) -> Array:
        gate = self.gate(x)
        return gate if self.config.gate_scale == 1 else gate * self.config.gate_scale

    @property
    def flops(self) -> float:
        """Forward FLOPs for each token."""
        return sum(part.flops for part in (self.up, self.gate, self.down) if part is not None)
