"""A model with its parameters, as `sparsejax.load` returns it."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.config import ModelConfig
from sparsejax.decode import generate
from sparsejax.errors import InputError
from sparsejax.layers import Context, Tokens
from sparsejax.model import Functional

Parameters = dict[str, Any]


class LoadedModel:
    """A model with its parameters; `model(input_ids, attention_mask=None)` returns logits.

    Attributes:
      config: The configuration of the model.
      parameters: Nested dicts of float32 arrays, for `Functional(config)`.
    """

    kind = "this model"  # in errors
    masks: Collection[str] = ("attention_mask",)  # names of the masks that the model takes

    def __init__(self, config: ModelConfig, parameters: Parameters):
        self.config, self.parameters = config, parameters
        self._models: list[tuple[ModelConfig, Functional]] = []

    def __call__(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None, **masks: Any
    ) -> Float[Array, "b t v"]:
        """Returns logits in float32.

        Args:
          input_ids: Token ids.
          attention_mask: 0 at padding, where logits are undefined.
          **masks: `global_attention_mask` (1 at tokens with symmetric global attention), for families that have it.

        Raises:
          InputError: Shapes or values are invalid, or the model does not have an argument.
        """
        return self.logits(self.parameters, input_ids, attention_mask, **masks)

    def logits(
        self,
        parameters: Parameters,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        **masks: Any,
    ) -> Float[Array, "b t v"]:
        """Returns logits for other parameters; differentiable in them."""
        model, tokens, context = self._prepare(input_ids, attention_mask, masks)
        return _run_forward(model, parameters, tokens, context)[:, : input_ids.shape[1]]

    def streams(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None, **masks: Any
    ) -> list[Float[Array, "b t m"]]:
        """Returns the residual stream before the first layer, after each layer, and after the last norm."""
        model, tokens, context = self._prepare(input_ids, attention_mask, masks)
        return [x[:, : input_ids.shape[1]] for x in _run_streams(model, self.parameters, tokens, context)]

    def generate(
        self, input_ids: Int[Array, "b t"], steps: int, *, temperature: float = 1.0, seed: int = 0
    ) -> Int[Array, "b {steps}"]:
        """Continues a prompt by `steps` tokens.

        Args:
          input_ids: Token ids, at least one per row.
          steps: Number of tokens to generate.
          temperature: Divides the logits before sampling; 0 takes the most likely token.
          seed: Seed of the samples.

        Raises:
          InputError: An argument is invalid, or the model is not causal.
        """
        if not self.config.causal:
            raise InputError("config.causal", f"{self.kind} is not causal, and cannot generate")
        tokens, _ = self._check(input_ids, {})
        prompt = jnp.asarray(tokens, jnp.int32)
        return _run_generate(self._decoder(), self.parameters, prompt, steps, temperature, jax.random.key(seed))

    def _prepare(
        self, input_ids: Any, attention_mask: Any, other_masks: dict[str, Any]
    ) -> tuple[Functional, Array, Context]:
        tokens, masks = self._check(input_ids, {"attention_mask": attention_mask} | other_masks)
        mask = masks.get("attention_mask")
        tokens_context = Tokens(mask=None if mask is None or mask.all() else jnp.asarray(mask, bool))
        return self._build(self.config), jnp.asarray(tokens, jnp.int32), Context(tokens_context)

    def _decoder(self) -> Functional:
        """Returns the model with which `generate` decodes."""
        return self._build(self.config)

    def _check(self, input_ids: Any, arguments: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the tokens, and the masks that are not None."""
        masks = {name: np.asarray(mask) for name, mask in arguments.items() if mask is not None}
        tokens = np.asarray(input_ids)
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError("input_ids", f"{tokens.dtype} {list(tokens.shape)}: expected integers [b, t]")
        for name, mask in masks.items():
            if name not in self.masks:
                known = ", ".join(["input_ids", *sorted(self.masks)])
                raise InputError(name, f"not an argument of {self.kind}; it has {known}")
            if mask.shape != tokens.shape:
                raise InputError(name, f"shape {list(mask.shape)} differs from {list(tokens.shape)} of input_ids")
            if not np.isin(mask, (0, 1)).all():
                raise InputError(name, "expected zeros and ones")
        if not 0 <= tokens.min() <= tokens.max() < self.config.vocab:
            raise InputError("input_ids", f"expected ids from 0 to {self.config.vocab - 1}")
        return tokens, masks

    def _build(self, config: ModelConfig) -> Functional:
        """Returns one object per configuration, so that it is compiled once."""
        for known, model in self._models:
            if known == config:
                return model
        self._models.append((config, Functional(config)))
        return self._models[-1][1]


@functools.partial(jax.jit, static_argnums=0)
def _run_forward(model: Functional, parameters: Parameters, tokens: Array, context: Context) -> Array:
    return model.bind(parameters)(tokens, context)


@functools.partial(jax.jit, static_argnums=0)
def _run_streams(model: Functional, parameters: Parameters, tokens: Array, context: Context) -> list[Array]:
    return model.bind(parameters).streams(tokens, context)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _run_generate(
    model: Functional, parameters: Parameters, tokens: Array, steps: int, temperature: float, key: Array
) -> Array:
    return generate(model.bind(parameters), tokens, steps, key, temperature)
