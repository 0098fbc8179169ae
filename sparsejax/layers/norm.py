"""Normalisation over the last axis, computed in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.layers.stream import parameter

KINDS = ("rms", "layer", "none")


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """`kind`: "rms" (arXiv:1910.07467), "layer" (arXiv:1607.06450) or "none"; `eps` is added to the variance."""

    kind: str
    eps: float

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.eps <= 0:
            raise ValueError(f"eps must be above 0, got {self.eps}")


class Norm(nnx.Module):
    """RMSNorm, LayerNorm or nothing, by `NormConfig.kind`."""

    def __init__(self, config: NormConfig, width: int, rngs: nnx.Rngs, axis: str | None = "width"):
        self.config = config
        kind, shape = config.kind, (width,)
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        self.scale = None if kind == "none" else parameter(rngs, ones, shape, (axis,))
        self.bias = parameter(rngs, zeros, shape, (axis,)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        if self.config.kind == "none":
            return x
        wide = x.astype(jnp.float32)
        if self.config.kind == "layer":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.config.eps) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)
