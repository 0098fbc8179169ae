"""Sampling: the next token from logits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sparsejax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of `sample`. The filters apply in the order of the fields, each to the tokens that the others keep.

    Attributes:
      repetition_penalty: Divides positive logits of tokens that are already in the row, and multiplies negative ones
        (CTRL, arXiv:1909.05858); 1 has no effect.
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Keeps the `top_k` most likely tokens, and those as likely as the last of them; 0 keeps all.
      top_p: Keeps the most likely tokens up to the first at which their probability reaches `top_p` (nucleus sampling,
        arXiv:1904.09751); 1 keeps all.
      min_p: Keeps tokens of at least `min_p` times the probability of the most likely one (arXiv:2407.01082).

    Raises:
      InputError: A value is out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not holds:
                raise InputError(name, f"{getattr(self, name)}: expected a number {expected}")

    def as_arrays(self) -> dict[str, np.generic]:
        """Returns the fields as scalars of NumPy: under `jax.jit`, other settings are no other program."""
        return {
            name: np.int32(min(value, 2**31 - 1)) if name == "top_k" else np.float32(value)
            for name, value in dataclasses.asdict(self).items()
        }


def row_keys(seeds: Any) -> Key[Array, " b"]:
    """Returns a PRNG key per row from non-negative integer seeds [b]."""
    return jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds, np.uint32)))


def sample(
    logits: Float[Array, "b v"],
    keys: Key[Array, " b"],
    positions: Int[Array, " b"],
    present: Bool[Array, "b v"],
    settings: dict[str, Any],
) -> Int[Array, " b"]:
    """Draws a token per row. A draw is a function of the row's logits, key and position, not of the other rows.

    Args:
      logits: Logits in float32.
      keys: Key per row, see `row_keys`.
      positions: Position of the token that is drawn, folded into the key.
      present: Whether a token of the vocabulary is in the row, for the repetition penalty.
      settings: `Sampling.as_arrays()`.
    """
    scores = _filter(_penalize(logits, present, settings["repetition_penalty"]), settings)
    draw = jax.vmap(lambda key, position, x: jax.random.categorical(jax.random.fold_in(key, position), x))
    is_greedy = settings["temperature"] == 0  # random numbers for a large vocabulary take time
    token = jax.lax.cond(is_greedy, lambda: scores.argmax(-1), lambda: draw(keys, positions, scores))
    return token.astype(jnp.int32)


def log_probabilities(
    logits: Float[Array, "b v"], present: Bool[Array, "b v"], settings: dict[str, Any]
) -> Float[Array, "b v"]:
    """Returns the distribution from which `sample` draws; -inf at tokens that a filter excludes."""
    return jax.nn.log_softmax(_filter(_penalize(logits, present, settings["repetition_penalty"]), settings))


def _penalize(logits: Array, present: Array, penalty: Array) -> Array:
    return jnp.where(present, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filter(logits: Array, settings: dict[str, Any]) -> Array:
    """Divides by the temperature, and sets the logits of excluded tokens to -inf."""
    temperature = settings["temperature"]
    scores = logits / jnp.where(temperature == 0, 1, temperature)
    sorts = (settings["top_k"] > 0) | (settings["top_p"] < 1)  # sorting a large vocabulary takes time
    scores = jax.lax.cond(sorts, _keep_top, lambda x, *_: x, scores, settings["top_k"], settings["top_p"])
    least = scores.max(-1, keepdims=True) + jnp.log(settings["min_p"])  # -inf without a minimum
    return jnp.where(scores >= least, scores, -jnp.inf)


def _keep_top(scores: Array, top_k: Array, top_p: Array) -> Array:
    size = scores.shape[-1]
    descending = -jnp.sort(-scores, axis=-1)
    last = jnp.clip(jnp.where(top_k > 0, top_k, size), 1, size) - 1
    least = descending[:, last][:, None]
    # The probability of the tokens before each: a token is kept until it reaches top_p, so the first always is.
    probabilities = jax.nn.softmax(jnp.where(descending >= least, descending, -jnp.inf))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) & (descending >= least)
    least = jnp.where(kept, descending, jnp.inf).min(-1, keepdims=True)
    return jnp.where(scores >= least, scores, -jnp.inf)
