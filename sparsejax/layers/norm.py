"""Normalisation over the last axis, computed in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.layers.stream import parameter

KINDS = ("rms", "layer", "none")
GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """`kind`: "rms" (arXiv:1910.07467), "layer" (arXiv:1607.06450) or "none"; `eps` is added to the variance."""

    kind: str
    eps: float
    offset: bool = False  # the stored scale is what is added to 1 (Gemma)
    bias: bool = True  # of "layer"

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
        start = zeros if config.offset else ones
        self.scale = None if kind == "none" else parameter(rngs, start, shape, (axis,))
        self.bias = parameter(rngs, zeros, shape, (axis,)) if kind == "layer" and config.bias else None

    def __call__(self, x: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        if self.config.kind == "none":
            return x
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.config.kind == "layer":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        y = standardize(wide, self.config.eps) * (self.scale[...] + (1 if self.config.offset else 0))
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class GatedNorm(nnx.Module):
    """RMSNorm over groups of channels, with a gate before it or after it (Mamba-2, arXiv:2405.21060)."""

    def __init__(
        self,
        width: int,
        eps: float,
        rngs: nnx.Rngs,
        *,
        groups: int = 1,
        gate_first: bool = False,
        activation: str = "silu",
        axis: str | None = "inner",
    ):
        self.eps, self.groups, self.gate_first, self.activation = eps, groups, gate_first, activation
        self.scale = parameter(rngs, jax.nn.initializers.ones, (width,), (axis,))

    def __call__(self, x: Float[Array, "*b m"], gate: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        gate = GATES[self.activation](gate.astype(wide.dtype))
        wide = wide * gate if self.gate_first else wide
        grouped = wide.reshape(*wide.shape[:-1], self.groups, -1)
        y = standardize(grouped, self.eps).reshape(wide.shape) * self.scale[...]
        return (y if self.gate_first else y * gate).astype(x.dtype)


def standardize(x: Float[Array, "*b m"], eps: float) -> Float[Array, "*b m"]:
    """`x` over the root of its mean square."""
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)
