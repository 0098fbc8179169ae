"""The residual stream: what all layers of a model share, and the parameters they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Stream:
    """Facts of the residual stream that every layer is built for."""

    width: int  # m
    depth: int  # number of layers; output projections start smaller in deeper models
    dtype: jnp.dtype  # of the computation; parameters are float32


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
