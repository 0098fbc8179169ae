"""The model under check, with random parameters and tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.config import ModelConfig
from sparsejax.layers import EMPTY, Context
from sparsejax.layers.testing import perturb
from sparsejax.model import Functional, Model


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under check.

    Attributes:
      config: The model.
      length: Tokens per sequence.
      seed: Seed of parameters and tokens.
    """

    config: ModelConfig
    length: int
    seed: int = 0

    @functools.cached_property
    def model(self) -> Functional:
        """The model as functions."""
        return Functional(self.config)

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """Random parameters."""
        initial = jax.jit(self.model.init)(jax.random.key(self.seed))
        return perturb(initial, np.random.default_rng(self.seed))

    def draw_tokens(self, rows: int, seed: int = 0) -> np.ndarray:
        """Random token ids [rows, length], none of which is padding."""
        tokens = np.random.default_rng((self.seed, seed)).integers(0, self.config.vocab, (rows, self.length))
        padding = self.config.embedding.padding
        return tokens if padding is None else np.where(tokens == padding, (padding + 1) % self.config.vocab, tokens)

    def forward(self, tokens: np.ndarray, context: Context = EMPTY) -> np.ndarray:
        """Logits of the compiled program, float32 [b, t, v]."""
        return np.asarray(self._forward(self.parameters, jnp.asarray(tokens, jnp.int32), context))

    @functools.cached_property
    def _forward(self) -> Any:
        return jax.jit(lambda parameters, tokens, context: self.model.bind(parameters)(tokens, context))

    def bind(self) -> Model:
        """The model with its parameters."""
        return self.model.bind(self.parameters)

    def with_config(self, config: ModelConfig) -> Subject:
        """The same parameters in a model of the same shapes."""
        changed = dataclasses.replace(self, config=config)
        changed.__dict__["parameters"] = self.parameters
        return changed
