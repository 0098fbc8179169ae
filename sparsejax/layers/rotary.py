"""Rotary positions (RoPE, Su et al. 2021, arXiv:2104.09864), and their extensions to longer sequences."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.errors import InputError, require_choice

SCALINGS = ("linear", "ntk", "yarn", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Changes frequencies so that a model trained on `original_length` tokens reads `factor` times as many.

    "linear": positions are divided by the factor (arXiv:2306.15595). "ntk": the base grows such that only the lowest
    frequency is divided by the whole factor. "yarn" (arXiv:2309.00071): pairs with more than `fast` rotations over the
    original length keep their frequency, pairs with fewer than `slow` rotations are divided by the factor, with a
    linear ramp between; queries and keys are multiplied by `attention_factor`. "llama3" (arXiv:2407.21783): like yarn,
    with a ramp over wavelengths.
    """

    kind: str  # method of scaling
    factor: float  # ratio of the new length to the original length
    original_length: int | None = None  # original length in tokens, required by yarn and llama3
    fast: float = 32.0  # rotations over the original length above which a frequency stays; 4 for llama3
    # rotations over the original length below which a frequency is divided by the factor; 1 for llama3
    slow: float = 1.0
    attention_factor: float | None = None  # factor of yarn on queries and keys; none for 0.1 ln(factor) + 1
    truncate: bool = True  # whether yarn rounds the ends of the ramp to whole pairs

    def __post_init__(self):
        require_choice(self, "kind", SCALINGS)
        if self.factor < 1:
            raise InputError("factor", f"{self.factor} is below 1")
        if self.kind in ("yarn", "llama3") and not self.original_length:
            raise InputError("original_length", f"missing; {self.kind} requires it")
        if self.fast <= self.slow:
            raise InputError("fast", f"{self.fast} is not above slow = {self.slow}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: pair i of the features of a head is rotated by position · base^(-2i/d)."""

    base: float  # ratio of the wavelengths, such as 10,000
    fraction: float = 1.0  # rotated fraction of a head, its first features
    interleaved: bool = False  # rotate the pairs (2i, 2i + 1) instead of (i, i + d/2)
    scaling: RopeScaling | None = None  # change of the frequencies for longer sequences; none for no change

    def __post_init__(self):
        if self.base <= 1:
            raise InputError("base", f"{self.base} is not above 1")
        if not 0 < self.fraction <= 1:
            raise InputError("fraction", f"{self.fraction} is not in (0, 1]")

    def width(self, head_width: int) -> int:
        """Returns the number of rotated features of a head.

        Raises:
          InputError: The features do not form pairs.
        """
        width = int(head_width * self.fraction)
        if width < 2 or width % 2:
            raise InputError(
                "rope.fraction", f"{width} rotated features, {self.fraction:g} of {head_width}, do not form pairs"
            )
        return width

    def frequencies(self, width: int) -> tuple[np.ndarray, float]:
        """Returns radians per position of each pair, float64 [width / 2], and the factor on queries and keys."""
        scaling, pairs = self.scaling, np.arange(0, width, 2, dtype=np.float64)
        plain = self.base ** (-pairs / width)
        if scaling is None:
            return plain, 1.0
        if scaling.kind == "linear":
            return plain / scaling.factor, 1.0
        if scaling.kind == "ntk":
            return (self.base * scaling.factor ** (width / max(width - 2, 1))) ** (-pairs / width), 1.0
        if scaling.kind == "llama3":
            rotations = _original_length(scaling) * plain / (2 * math.pi)
            keep = np.clip((rotations - scaling.slow) / (scaling.fast - scaling.slow), 0, 1)
            return keep * plain + (1 - keep) * plain / scaling.factor, 1.0
        keep = 1 - self._yarn_ramp(scaling, width)
        growth = yarn_growth(scaling.factor) if scaling.attention_factor is None else scaling.attention_factor
        return keep * plain + (1 - keep) * plain / scaling.factor, growth

    def _yarn_ramp(self, scaling: RopeScaling, width: int) -> np.ndarray:
        """Rises from 0 at the pair with `fast` rotations over the original length to 1 at the pair with `slow`."""

        def pair_with(rotations: float) -> float:
            wavelength = _original_length(scaling) / (rotations * 2 * math.pi)
            return width * math.log(wavelength) / (2 * math.log(self.base))

        low, high = pair_with(scaling.fast), pair_with(scaling.slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)


def _original_length(scaling: RopeScaling) -> int:
    assert scaling.original_length is not None  # checked at construction
    return scaling.original_length


def yarn_growth(factor: float, scale: float = 1.0) -> float:
    """Factor on queries and keys for sequences `factor` times as long (YaRN, arXiv:2309.00071)."""
    return 0.1 * scale * math.log(factor) + 1


def rotate(x: Float[Array, "b t h d"], positions: Int[Array, "*b t"], config: RopeConfig) -> Float[Array, "b t h d"]:
    """Rotates the pairs of each head by their frequency times the position."""
    width = config.width(x.shape[-1])
    frequencies, growth = config.frequencies(width)
    angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = growth * jnp.cos(angles), growth * jnp.sin(angles)
    pairs, unrotated = x[..., :width].astype(angles.dtype), x[..., width:]
    if config.interleaved:
        a, b = pairs[..., 0::2], pairs[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(pairs.shape)
    else:
        a, b = jnp.split(pairs, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    return jnp.concatenate([rotated, unrotated], axis=-1) if unrotated.shape[-1] else rotated
