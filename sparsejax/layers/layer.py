"""A layer: one residual unit, a mixer and usually an MLP, each with its norm."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.mamba import Mamba, MambaConfig
from sparsejax.layers.mlp import Mlp, MlpConfig
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.stream import Cost, Stream

# A new mixer is one file and one line here. Each has __call__, init_cache, step and cost; its config has `sees`, the
# pattern of what a position takes from the others.
MIXERS = {"attention": (AttentionConfig, Attention), "mamba": (MambaConfig, Mamba)}
MixerConfig = AttentionConfig | MambaConfig


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """`norm_position`: "pre" (x + f(norm(x)), arXiv:2002.04745) or "post" (norm(x + f(x)))."""

    mixer: MixerConfig
    mlp: MlpConfig
    norm: NormConfig
    norm_position: str
    remat: bool  # compute activations again in the backward pass instead of keeping them

    def __post_init__(self):
        if self.norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position must be pre or post, got {self.norm_position!r}")


class Layer(nnx.Module):
    """A residual unit of the stream."""

    def __init__(self, config: LayerConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        mixer = next(module for kind, module in MIXERS.values() if isinstance(config.mixer, kind))
        self.mixer = mixer(config.mixer, stream, rngs)
        self.mixer_norm = Norm(config.norm, stream.width, rngs)
        has_mlp = config.mlp.kind != "none"
        self.mlp = Mlp(config.mlp, stream, rngs) if has_mlp else None
        self.mlp_norm = Norm(config.norm, stream.width, rngs) if has_mlp else None

    def __call__(self, x: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
        """The stream after this layer, for a whole sequence."""
        return jax.checkpoint(self._run)(x) if self.config.remat else self._run(x)

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """The mixer's cache before the first of `length` tokens."""
        return self.mixer.init_cache(batch, length)

    def step(
        self, x: Float[Array, "b m"], cache: dict[str, Array], position: Int[Array, ""], length: int
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """The stream after this layer, for one more token, and the next cache."""
        y, cache = self.mixer.step(self._enter(x, self.mixer_norm), cache, position, length)
        return self._feed(self._leave(x, y, self.mixer_norm)), cache

    def cost(self, length: int) -> Cost:
        """Scored pairs, and forward FLOPs for each token."""
        cost = self.mixer.cost(length)
        return cost if self.mlp is None else dataclasses.replace(cost, flops=cost.flops + self.mlp.flops)

    def _run(self, x: Array) -> Array:
        y = self.mixer(self._enter(x, self.mixer_norm))
        return self._feed(self._leave(x, y, self.mixer_norm))

    def _feed(self, x: Array) -> Array:
        if self.mlp is None:
            return x
        return self._leave(x, self.mlp(self._enter(x, self.mlp_norm)), self.mlp_norm)

    def _enter(self, x: Array, norm: Norm) -> Array:
        return norm(x) if self.config.norm_position == "pre" else x

    def _leave(self, x: Array, y: Array, norm: Norm) -> Array:
        return x + y if self.config.norm_position == "pre" else norm(x + y)
