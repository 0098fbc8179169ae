"""Blocks whose weights several layers share (Zamba2, arXiv:2411.15242).

A shared block reads the residual stream concatenated with the stream before the first layer, twice the width of the
stream: norm, attention, norm, feed-forward part. A layer that uses the block applies its own linear map to the output,
and may adapt the shared weights by low-rank matrices. The result is added to the input of the layer's mixer, and not
to the stream.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.errors import InputError, argument_path, require_at_least
from sparsejax.layers.attention import Attention, AttentionConfig
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.mlp import Mlp, MlpConfig
from sparsejax.layers.norm import NormConfig, make_norm, normalize
from sparsejax.layers.protocols import Cache
from sparsejax.layers.stream import Cost, Linear, Stream, parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """A block whose weights several layers share."""

    mixer: AttentionConfig  # attention of the block
    mlp: MlpConfig  # feed-forward part of the block
    norm: NormConfig | None  # norm before attention and before the feed-forward part; none for no norm

    def check(self, length: int) -> None:
        """Raises InputError if the mixer cannot run on `length` tokens."""
        with argument_path("mixer"):
            self.mixer.check(length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideConfig:
    """The use of a shared block by a layer.

    Adapters (LoRA, arXiv:2106.09685) are added to the weights of queries, keys and values, and of gate and up.
    """

    shared: str  # key of the block in `model.shared`
    mixer_rank: int | None = None  # rank of the adapters of attention; none for no adapters
    mlp_rank: int | None = None  # rank of the adapters of the feed-forward part; none for no adapters

    def __post_init__(self):
        require_at_least(self, 1, "mixer_rank", "mlp_rank")


class Shared(nnx.Module):
    """A shared block. Layers run it with their adapters."""

    def __init__(self, config: SharedConfig, stream: Stream, rngs: nnx.Rngs):
        self.mixer_norm = make_norm(config.norm, 2 * stream.width, rngs)
        self.mixer = Attention(config.mixer, stream, rngs, inputs=2 * stream.width)
        self.mlp_norm = make_norm(config.norm, stream.width, rngs)
        self.mlp = Mlp(config.mlp, stream, rngs)

    def __call__(self, x: Float[Array, "b t w"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Maps the concatenated stream and embedding, w = 2 m, to the width of the stream."""
        return self._feed_forward(self.mixer(normalize(self.mixer_norm, x), context))

    def extend(
        self, x: Float[Array, "b c w"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Maps the next tokens."""
        y, cache = self.mixer.extend(normalize(self.mixer_norm, x), cache, positions, length, context)
        return self._feed_forward(y), cache

    def _feed_forward(self, x: Array) -> Array:
        return self.mlp(normalize(self.mlp_norm, x))[0]


class Side(nnx.Module):
    """A layer's use of a shared block: adapters of its weights, and a linear map of its output."""

    def __init__(self, config: SideConfig, stream: Stream, rngs: nnx.Rngs):
        self.config = config
        if config.shared not in stream.shared:
            blocks = ", ".join(stream.shared) or "none"
            raise InputError("side.shared", f"there is no block {config.shared!r}; the blocks are {blocks}")
        self._stream, self._block = stream, stream.shared[config.shared]
        ranks = dict.fromkeys(("query", "key", "value"), config.mixer_rank) | {"mlp": config.mlp_rank}
        self.adapters = nnx.Dict(
            {
                name: Adapter(_adapted(self._shapes, name), rank, rngs)
                for name, rank in ranks.items()
                if rank is not None
            }
        )
        self.out = Linear(stream.width, stream.width, ("width", None), dtype=stream.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t m"], context: Context) -> Float[Array, "b t m"]:
        """Returns what is added to the input of the layer's mixer."""
        return self.out(self._adapt(context)(self._inputs(x, context), context))

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Returns what is added for the next tokens, and the next cache."""
        y, cache = self._adapt(context).extend(self._inputs(x, context), cache, positions, length, context)
        return self.out(y), cache

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the cache of the shared block's attention, of which every layer has its own."""
        return self._shapes.mixer.init_cache(batch, length)

    def ask_mixer(self, method: str, x: Float[Array, "b t m"], context: Context) -> dict[str, Any]:
        """Returns what `attention_calls` or `selections` of the shared block's attention returns."""
        shared = self._adapt(context)
        return getattr(shared.mixer, method)(normalize(shared.mixer_norm, self._inputs(x, context)), context)

    def cost(self, length: int) -> Cost:
        """Cost of the shared block and the linear map; the adapters are merged into the weights."""
        shared = self._shapes
        return shared.mixer.cost(length) + Cost(0, shared.mlp.flops + self.out.flops)

    @property
    def _shapes(self) -> Shared:
        """The block as shapes; its weights come with the context."""
        return nnx.eval_shape(lambda: Shared(self._block, self._stream, nnx.Rngs(0)))

    def _inputs(self, x: Array, context: Context) -> Array:
        assert context.extras.embeddings is not None  # set by Model
        return jnp.concatenate([x, context.extras.embeddings], axis=-1)

    def _adapt(self, context: Context) -> Shared:
        """A copy of the shared block whose weights include the adapters of this layer."""
        shared = jax.tree.map(lambda leaf: leaf, (context.extras.shared or {})[self.config.shared])
        for name, adapter in self.adapters.items():
            adapter.add_to(_adapted(shared, name))
        return shared


def _adapted(shared: Shared, name: str) -> list[Linear]:
    """The linear maps to which the adapter `name` belongs; they read the same input."""
    if name == "mlp":
        return [linear for linear in (shared.mlp.gate, shared.mlp.up) if linear is not None]
    return [getattr(shared.mixer, name)]


class Adapter(nnx.Module):
    """Low-rank matrices that are added to the weights of linear maps of the same input (LoRA, arXiv:2106.09685)."""

    def __init__(self, linears: list[Linear], rank: int, rngs: nnx.Rngs):
        inputs = linears[0].weight.shape[0]
        init, zeros = jax.nn.initializers.normal(inputs**-0.5), jax.nn.initializers.zeros
        self.down = parameter(rngs, init, (inputs, rank), ("width", None), decay=True)
        outputs = [linear.weight.shape[1] for linear in linears]
        self.up = nnx.List([parameter(rngs, zeros, (rank, size), (None, None), decay=True) for size in outputs])

    def add_to(self, linears: list[Linear]) -> None:
        """Replaces the weights of `linears` by adapted ones."""
        for linear, up in zip(linears, self.up, strict=True):
            linear.weight = nnx.Param(linear.weight[...] + self.down[...] @ up[...])
