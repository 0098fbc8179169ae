"""Weights that several layers share (Zamba2, arXiv:2411.15242).

A shared block reads the stream beside the embedding that it began with, twice the stream's width: norm, attention,
norm, feed-forward part. A layer that uses it has a linear map of its own behind it, and may adapt the shared weights by
matrices of low rank; what comes out is added to what the layer's mixer reads, and not to the stream.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.mlp import Mlp, MlpConfig
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.stream import EMPTY, Context, Cost, Linear, Stream, parameter


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """A block whose weights several layers use."""

    mixer: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig


@dataclasses.dataclass(frozen=True)
class SideConfig:
    """A layer's use of a shared block, by its name in `model.shared`; ranks of the layer's own adapters, None for none.

    Adapters (LoRA, arXiv:2106.09685) are added to the weights of queries, keys and values, and to those of gate and up.
    """

    shared: str
    mixer_rank: int | None = None
    mlp_rank: int | None = None


class Shared(nnx.Module):
    """The block itself; its layers run it with their adapters."""

    def __init__(self, config: SharedConfig, stream: Stream, rngs: nnx.Rngs):
        self.mixer_norm = Norm(config.norm, 2 * stream.width, rngs)
        self.mixer = Attention(config.mixer, stream, rngs, inputs=2 * stream.width)
        self.mlp_norm = Norm(config.norm, stream.width, rngs)
        self.mlp = Mlp(config.mlp, stream, rngs)

    def __call__(self, x: Float[Array, "b t n"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """What the block makes of stream and embedding side by side, n = 2 m."""
        return self._feed(self.mixer(self.mixer_norm(x), context))

    def step(
        self, x: Float[Array, "b n"], cache: dict[str, Array], position: Int[Array, ""], length: int
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """The same for one more token."""
        y, cache = self.mixer.step(self.mixer_norm(x), cache, position, length)
        return self._feed(y), cache

    def _feed(self, x: Array) -> Array:
        return self.mlp(self.mlp_norm(x))[0]


class Side(nnx.Module):
    """A layer's way to a shared block: adapters to its weights, and a linear map behind it."""

    def __init__(self, config: SideConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        if config.shared not in stream.shared:
            raise ValueError(f"side.shared: no block {config.shared!r}; there are {', '.join(stream.shared) or 'none'}")
        self._stream, self._block = stream, stream.shared[config.shared]
        shared = self._shared
        adapted = {name: (config.mixer_rank, [getattr(shared.mixer, name)]) for name in ("query", "key", "value")}
        adapted["mlp"] = config.mlp_rank, [part for part in (shared.mlp.gate, shared.mlp.up) if part is not None]
        self.adapters = nnx.Dict(
            {name: Adapter(parts, rank, rngs) for name, (rank, parts) in adapted.items() if rank is not None}
        )
        self.out = Linear(stream.width, stream.width, ("width", None), dtype=stream.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t m"], context: Context) -> Float[Array, "b t m"]:
        """What the layer's mixer reads besides the stream."""
        both = jnp.concatenate([x, context.embeddings], axis=-1)
        return self.out(self._adapt(context)(both, context))

    def step(
        self, x: Float[Array, "b m"], cache: dict[str, Array], position: Int[Array, ""], length: int, context: Context
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """The same for one more token."""
        both = jnp.concatenate([x, context.embeddings], axis=-1)
        y, cache = self._adapt(context).step(both, cache, position, length)
        return self.out(y), cache

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """The cache of the shared block's attention: every layer has one of its own."""
        return self._shared.mixer.init_cache(batch, length)

    def cost(self, length: int) -> Cost:
        """The shared block's pairs and FLOPs, and those of the linear map; adapters cost nothing for each token."""
        shared = self._shared
        return shared.mixer.cost(length) + Cost(0, shared.mlp.flops + self.out.flops)

    @property
    def _shared(self) -> Shared:
        """The block's shapes; its weights come with the context."""
        return nnx.eval_shape(lambda: Shared(self._block, self._stream, nnx.Rngs(0)))

    def _adapt(self, context: Context) -> Shared:
        """The shared block with this layer's adapters in its weights; the block itself stays as it is."""
        shared = jax.tree.map(lambda leaf: leaf, context.shared[self.config.shared])
        for name, adapter in self.adapters.items():
            parts = (shared.mlp.gate, shared.mlp.up) if name == "mlp" else (getattr(shared.mixer, name),)
            adapter.add_to([part for part in parts if part is not None])
        return shared


class Adapter(nnx.Module):
    """Matrices of low rank to add to the weights of linear maps that read the same (LoRA, arXiv:2106.09685)."""

    def __init__(self, parts: list[Linear], rank: int, rngs: nnx.Rngs):
        inputs = parts[0].weight.shape[0]
        init = jax.nn.initializers.normal(inputs**-0.5)
        self.down = parameter(rngs, init, (inputs, rank), ("width", None))
        zeros = jax.nn.initializers.zeros
        self.up = nnx.List([parameter(rngs, zeros, (rank, part.weight.shape[1]), (None, None)) for part in parts])

    def add_to(self, parts: list[Linear]) -> None:
        """Replaces the weights of `parts` by adapted ones."""
        for part, up in zip(parts, self.up, strict=True):
            part.weight = nnx.Param(part.weight[...] + self.down[...] @ up[...])
