"""The residual stream: what all layers of a model share, and the parameters they are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Stream:
    """Facts of the residual stream that every layer is built for."""

    width: int  # m
    depth: int  # number of layers; output projections start smaller in deeper models
    dtype: jnp.dtype  # of the computation; parameters are float32
    reversible: bool = False  # two streams side by side, see `Layer`
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # SharedConfig by name, see `layers.shared`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout (arXiv:1207.0580): with a chance of `rate` a number becomes 0, else it is divided by 1 - `rate`."""

    key: Key[Array, ""]
    rate: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*b m"], *place: int | Int[Array, ""]) -> Float[Array, "*b m"]:
        """`x` with some of its numbers dropped: the same ones whenever key and `place`, some integers, are."""
        kept = jax.random.bernoulli(functools.reduce(jax.random.fold_in, place, self.key), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What layers may know of the tokens beside the stream. None: nothing to know.

    Attributes:
      segments: ids of the documents that were packed into a row; nothing crosses from one to another.
      positions: of tokens in their documents, for learned positions; None: their places in the row.
      mask: False at padding. No token looks at it, and it leaves the state of a recurrence as zero input would.
      globals: positions of tokens that are global in this batch alone, in any order; -1 pads the list.
      embeddings: the stream before the first layer.
      layer: the number of the layer, from 0.
      shared: the blocks that layers share, by name: modules, see `layers.shared`.
      rotations: what LSH attention hashes with, instead of those it draws.
      dropout: what is dropped of the stream in this step of training.
    """

    segments: Int[Array, "b t"] | None = None
    positions: Int[Array, "b t"] | None = None
    mask: Bool[Array, "b t"] | None = None
    globals: Int[Array, "b n"] | None = None
    embeddings: Float[Array, "b t m"] | None = None
    layer: Int[Array, ""] | None = None
    shared: dict[str, Any] | None = None
    rotations: Float[Array, "h d r n"] | None = None
    dropout: Dropout | None = None

    @property
    def attend_segments(self) -> tuple[Int[Array, "b t"], Int[Array, "b t"]] | None:
        """Segment ids of queries and of keys for `attend`: those of padding are equal to no other."""
        if self.mask is None:
            return None if self.segments is None else (self.segments, self.segments)
        ids = jnp.zeros(self.mask.shape, jnp.int32) if self.segments is None else self.segments
        return jnp.where(self.mask, ids, -1), jnp.where(self.mask, ids, -2)

    @property
    def starts(self) -> Bool[Array, "b t"] | None:
        """True where a document begins in the middle of a row: there a recurrence forgets what it holds."""
        if self.segments is None:
            return None
        changed = self.segments[:, 1:] != self.segments[:, :-1]
        return jnp.pad(changed, ((0, 0), (1, 0)))

    def zero_padding(self, x: Float[Array, "b t *rest"]) -> Float[Array, "b t *rest"]:
        """`x` with zeros at padding."""
        return x if self.mask is None else jnp.where(jnp.expand_dims(self.mask, range(2, x.ndim)), x, 0)

    def drop(self, x: Float[Array, "b t m"], branch: int = 0) -> Float[Array, "b t m"]:
        """`x`, if there is dropout, after it. Each branch of each layer has a mask of its own; so has the embedding."""
        if self.dropout is None:
            return x
        return self.dropout(x, 0 if self.layer is None else self.layer + 1, branch)


EMPTY = Context()


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter with a logical name for each axis; `sharding.RULES` maps names to the mesh."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a mixer does with a sequence: `pairs` it scores, forward FLOPs for each token, live tiles and all tiles.

    Pairs and tiles of 128 x 128 are those of all heads together; a mixer that scores nothing has none.
    """

    pairs: int
    flops: float
    tiles: tuple[int, int] = (0, 0)

    def __add__(self, other: Cost) -> Cost:
        tiles = self.tiles[0] + other.tiles[0], self.tiles[1] + other.tiles[1]
        return Cost(self.pairs + other.pairs, self.flops + other.flops, tiles)


class Linear(nnx.Module):
    """y = x w + b, in the stream's dtype. Starts at variance `scale ** 2 / inputs`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        bias: bool = False,
        scale: float = 1.0,
    ):
        init = jax.nn.initializers.normal(scale * inputs**-0.5)
        self.weight = parameter(rngs, init, (inputs, outputs), axes)
        self.bias = parameter(rngs, jax.nn.initializers.zeros, (outputs,), axes[1:]) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = x.astype(self.dtype) @ self.weight[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    @property
    def flops(self) -> float:
        """Multiplications and additions for each token."""
        return 2.0 * self.weight.shape[0] * self.weight.shape[1]


def output_scale(stream: Stream) -> float:
    """Start of projections into the stream: the sum over all residual branches keeps variance ~1 (GPT-2)."""
    return (2 * stream.depth) ** -0.5
