"""Rotary positions (RoPE, Su et al. 2021, arXiv:2104.09864), and ways to stretch them over longer sequences."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCALINGS = ("linear", "ntk", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies change so that a model trained on `original_length` tokens reads `factor` times as many.

    "linear": positions are divided by the factor (arXiv:2306.15595). "ntk": the base grows, so that only the lowest
    frequency is divided by the whole factor. "yarn" (arXiv:2309.00071): dimensions that turn more than `fast` times
    over the original length stay, those that turn less than `slow` times are divided, with a ramp between; queries and
    keys grow by `attention_factor`. "llama3" (arXiv:2407.21783): the same idea with a ramp over wavelengths.
    """

    kind: str
    factor: float
    original_length: int | None = None  # yarn, llama3
    fast: float = 32.0  # yarn; llama3 has 4
    slow: float = 1.0
    attention_factor: float | None = None  # yarn; 0.1 ln(factor) + 1 if None
    truncate: bool = True  # yarn: the ramp begins and ends at whole dimensions

    def __post_init__(self):
        if self.kind not in SCALINGS:
            raise ValueError(f"kind must be one of {', '.join(SCALINGS)}, got {self.kind!r}")
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if self.kind in ("yarn", "llama3") and not self.original_length:
            raise ValueError(f"{self.kind} needs original_length")
        if self.fast <= self.slow:
            raise ValueError(f"fast must be above slow, got {self.fast} and {self.slow}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions; pairs of a head's numbers turn by position · base^(-2i/d)."""

    base: float
    fraction: float = 1.0  # of the head, its first numbers; the others have no position
    interleaved: bool = False  # pairs are (2i, 2i + 1); else (i, i + d/2)
    scaling: RopeScaling | None = None

    def __post_init__(self):
        if self.base <= 1:
            raise ValueError(f"base must be above 1, got {self.base}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction}")

    def width(self, head_width: int) -> int:
        """How many numbers of a head turn; an even number.

        Raises:
          ValueError: they do not make up pairs.
        """
        width = int(head_width * self.fraction)
        if width < 2 or width % 2:
            raise ValueError(f"rotary positions turn pairs; {self.fraction:g} of head_width = {head_width} is {width}")
        return width

    def frequencies(self, width: int) -> tuple[np.ndarray, float]:
        """Radians for each position of each pair, float64 [width / 2], and the factor on cosine and sine."""
        scaling, pairs = self.scaling, np.arange(0, width, 2, dtype=np.float64)
        plain = self.base ** (-pairs / width)
        if scaling is None:
            return plain, 1.0
        if scaling.kind == "linear":
            return plain / scaling.factor, 1.0
        if scaling.kind == "ntk":
            return (self.base * scaling.factor ** (width / max(width - 2, 1))) ** (-pairs / width), 1.0
        turns = scaling.original_length * plain / (2 * math.pi)  # of each pair over the original length
        if scaling.kind == "llama3":
            keep = np.clip((turns - scaling.slow) / (scaling.fast - scaling.slow), 0, 1)
            return keep * plain + (1 - keep) * plain / scaling.factor, 1.0
        keep = 1 - self._yarn_ramp(width)
        grow = yarn_growth(scaling.factor) if scaling.attention_factor is None else scaling.attention_factor
        return keep * plain + (1 - keep) * plain / scaling.factor, grow

    def _yarn_ramp(self, width: int) -> np.ndarray:
        """From 0 at the pair that turns `fast` times over the original length to 1 at that which turns `slow` times."""
        scaling = self.scaling

        def pair_that_turns(times: float) -> float:
            return width * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = pair_that_turns(scaling.fast), pair_that_turns(scaling.slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)


def yarn_growth(factor: float, times: float = 1.0) -> float:
    """By what queries and keys grow where a sequence is `factor` times as long (YaRN, arXiv:2309.00071)."""
    return 0.1 * times * math.log(factor) + 1


def rotate(x: Float[Array, "b t h d"], positions: Int[Array, "*b t"], config: RopeConfig) -> Float[Array, "b t h d"]:
    """Turns the pairs of each head by their frequency times the position."""
    width = config.width(x.shape[-1])
    frequencies, grow = config.frequencies(width)
    angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = grow * jnp.cos(angles), grow * jnp.sin(angles)
    turning, rest = x[..., :width].astype(angles.dtype), x[..., width:]
    if config.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turning.shape)
    else:
        a, b = jnp.split(turning, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1) if rest.shape[-1] else turned.astype(x.dtype)
