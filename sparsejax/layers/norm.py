"""Normalization over the last axis, computed in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.errors import InputError, require_choice
from sparsejax.layers.stream import parameter
from sparsejax.ops.broadcast import add, multiply

KINDS = ("rms", "layer")
GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A normalization layer; a config that allows None for it then has no normalization there."""

    kind: str  # "rms" (arXiv:1910.07467) or "layer" (arXiv:1607.06450)
    eps: float  # number added to the variance
    offset: bool = False  # add 1 to the stored scale (Gemma)
    bias: bool = True  # whether "layer" has a bias
    scale: bool = True  # whether there is a learned scale; false for the queries and keys of Llama 4

    def __post_init__(self):
        require_choice(self, "kind", KINDS)
        if self.eps <= 0:
            raise InputError("eps", f"{self.eps} is not positive")


class Norm(nnx.Module):
    """RMSNorm or LayerNorm, by `NormConfig.kind`."""

    def __init__(self, config: NormConfig, width: int, rngs: nnx.Rngs, axis: str | None = "width"):
        self.config = config
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        init = zeros if config.offset else ones
        self.scale = parameter(rngs, init, (width,), (axis,)) if config.scale else None
        self.bias = parameter(rngs, zeros, (width,), (axis,)) if config.kind == "layer" and config.bias else None

    def __call__(self, x: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.config.kind == "layer":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        y = standardize(wide, self.config.eps)
        y = y if self.scale is None else multiply(y, self.scale[...] + (1 if self.config.offset else 0))
        return (y if self.bias is None else add(y, self.bias[...])).astype(x.dtype)


def make_norm(config: NormConfig | None, width: int, rngs: nnx.Rngs, axis: str | None = "width") -> Norm | None:
    """Builds the norm that `config` describes, if any."""
    return None if config is None else Norm(config, width, rngs, axis)


def normalize(norm: Norm | None, x: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
    """Applies `norm`, if any."""
    return x if norm is None else norm(x)


class GatedNorm(nnx.Module):
    """RMSNorm over groups of channels, with a gate before or after it (Mamba-2, arXiv:2405.21060)."""

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
        y = multiply(standardize(grouped, self.eps).reshape(wide.shape), self.scale[...])
        return (y if self.gate_first else y * gate).astype(x.dtype)


def standardize(x: Float[Array, "*b m"], eps: float) -> Float[Array, "*b m"]:
    """Divides `x` by its root mean square over the last axis."""
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)
