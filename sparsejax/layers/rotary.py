"""Rotary positions (RoPE, Su et al. 2021, arXiv:2104.09864), in the half-split layout."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "*b t h d"], positions: Int[Array, " t"], base: float) -> Float[Array, "*b t h d"]:
    """Turns the pair (x[i], x[i + d/2]) of each head by position · base^(-2i/d) radians; d is even."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
