"""The residual stream, and the building blocks that all layers share: parameters, linear maps, costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparsejax.ops import attention_flops
from sparsejax.ops.broadcast import add
from sparsejax.ops.sequence import shard_count
from sparsejax.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Stream:
    """Properties of the residual stream that every layer is built for."""

    width: int  # m
    depth: int  # number of layers; output projections are initialized smaller in deeper models
    dtype: DTypeLike  # of the computation; parameters are float32
    reversible: bool = False  # two streams side by side, see `Layer`
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # SharedConfig by name, see `layers.shared`
    hyper: Any = None  # HyperConfig of several streams side by side, see `layers.hyper`
    vocab: int = 0  # number of token ids, for experts by token id


def parameter(
    rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...], *, decay: bool = False
) -> nnx.Param:
    """Creates a float32 parameter with the metadata that sharding and the optimizer read.

    Args:
      rngs: Source of the key.
      init: Initializer, as in `jax.nn.initializers`.
      shape: Shape.
      axes: Logical name per axis; `sharding.RULES` maps names to mesh axes.
      decay: Whether weight decay applies. True for the matrices of linear maps, false for everything else: norms,
        biases, embeddings, position tables, convolution taps and the rates of recurrences.
    """
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, decay=decay)


def logical_axes(variable: nnx.Variable, stacked: int = 0) -> tuple[str | None, ...]:
    """Logical name per axis; None for the leading `stacked` axes, and for a parameter of `flax.nnx`."""
    axes = variable.get_metadata().get("axes", (None,) * (len(variable.shape) - stacked))
    return (None,) * stacked + tuple(axes)


def decays(variable: nnx.Variable, stacked: int = 0) -> bool:
    """Whether weight decay applies; for a parameter of `flax.nnx`, if it has two axes apart from `stacked` ones."""
    return variable.get_metadata().get("decay", len(variable.shape) - stacked >= 2)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a module over a sequence; costs add up.

    Attributes:
      pairs: (query, key) pairs that all heads attend to; 0 for a mixer without attention.
      flops: Forward FLOPs per token, averaged over the sequence.
      tiles: Tiles of 128 x 128 that hold a pair, and all tiles, of all heads.
      loss_flops: FLOPs per token of the losses of the module, forward and backward.
      index_pairs: (query, group) pairs that are scored to choose the keys, of all index heads.
      index_flops: FLOPs of the choice, which are part of `flops`.
    """

    pairs: int
    flops: float
    tiles: tuple[int, int] = (0, 0)
    loss_flops: float = 0.0
    index_pairs: int = 0
    index_flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        tiles = self.tiles[0] + other.tiles[0], self.tiles[1] + other.tiles[1]
        names = "pairs", "flops", "loss_flops", "index_pairs", "index_flops"
        return Cost(tiles=tiles, **{name: getattr(self, name) + getattr(other, name) for name in names})


def attention_cost(pattern: Pattern, length: int, *, heads: int, score_width: int, value_width: int) -> Cost:
    """Cost of softmax attention without projections, over `length` tokens."""
    copies = heads if pattern.heads is None else 1
    pairs, (live, tiles) = copies * pattern.pairs(length), pattern.tiles(length)
    flops = attention_flops(pairs, score_width, value_width) / max(length, 1)
    return Cost(pairs, flops, (copies * live, copies * tiles))


class Linear(nnx.Module):
    """y = x w + b in the dtype of the stream, initialized with variance `scale ** 2 / inputs`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        bias: bool = False,
        scale: float = 1.0,
    ):
        init = jax.nn.initializers.normal(scale * inputs**-0.5)
        self.weight = parameter(rngs, init, (inputs, outputs), axes, decay=True)
        self.bias = parameter(rngs, jax.nn.initializers.zeros, (outputs,), axes[1:]) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        weight = self.weight[...].astype(self.dtype)
        # Rows on a single axis: a gradient that contracts two axes is slow on CPU. Sharded tokens keep their axis.
        rows = x.reshape(-1, x.shape[-1]) if shard_count() == 1 else x
        y = (rows.astype(self.dtype) @ weight).reshape(*x.shape[:-1], weight.shape[1])
        return y if self.bias is None else add(y, self.bias[...].astype(self.dtype))

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2.0 * self.weight.shape[0] * self.weight.shape[1]


def output_scale(stream: Stream) -> float:
    """Initial scale of projections into the stream: the sum over all residual branches keeps variance ~1 (GPT-2)."""
    return (2 * stream.depth) ** -0.5
