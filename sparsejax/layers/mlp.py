"""Feed-forward parts: what a layer does with each token alone."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.layers.stream import NOTHING, Context, Linear, Stream, output_scale

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}
KINDS = ("gated", "plain")


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """`kind`: "gated" (GLU, arXiv:2002.05202) or "plain"; `width`: hidden width; `activation`: by name."""

    kind: str
    width: int
    activation: str

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
        m, f, dtype = stream.width, config.width, stream.dtype
        self.up = Linear(m, f, ("width", "ff"), dtype=dtype, rngs=rngs)
        self.gate = Linear(m, f, ("width", "ff"), dtype=dtype, rngs=rngs) if config.kind == "gated" else None
        self.down = Linear(f, m, ("ff", "width"), dtype=dtype, rngs=rngs, scale=output_scale(stream))

    def __call__(
        self, x: Float[Array, "*b m"], context: Context = NOTHING
    ) -> tuple[Float[Array, "*b m"], dict[str, Array]]:
        """The output, and no losses."""
        activate = ACTIVATIONS[self.config.activation]
        return self.down(activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x)), {}

    @property
    def flops(self) -> float:
        """Forward FLOPs for each token."""
        return sum(part.flops for part in (self.up, self.gate, self.down) if part is not None)
