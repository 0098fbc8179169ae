"""Generation, token by token from a cache of fixed size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sparsejax.errors import InputError
from sparsejax.model import Cache, Model


def generate(
    model: Model, prompt: Int[Array, "b t"], steps: int, key: Key[Array, ""], temperature: float = 1.0
) -> Int[Array, "b {steps}"]:
    """Continues a prompt. To be called under `jax.jit`, with `steps` and `temperature` static.

    Args:
      model: The model. Its caches hold the keys that its patterns can still attend to, see `patterns.plan_cache`.
      prompt: At least one token per row.
      steps: Number of tokens to generate.
      key: PRNG key of the samples.
      temperature: Divides the logits before sampling; 0 takes the most likely token.

    Raises:
      InputError: The prompt is empty or has ids outside the vocabulary, or the tokens exceed the model's positions.
    """
    batch, prompt_length = prompt.shape
    length = prompt_length + steps
    if not prompt_length:
        raise InputError("prompt", "there is no token; start with at least one per row")
    if steps < 1:
        raise InputError("steps", f"{steps} is below 1")
    if not 0 <= temperature < math.inf:
        raise InputError("temperature", f"{temperature} is not a number of at least 0")
    model.embedding.check_tokens(prompt, length - 1)  # the last token is not an input

    def sample(logits: Float[Array, "b v"], key: Key[Array, ""]) -> Int[Array, " b"]:
        if temperature == 0:
            return logits.argmax(axis=-1).astype(prompt.dtype)
        return jax.random.categorical(key, logits / temperature).astype(prompt.dtype)

    def advance(carry: tuple[Cache, Array], position: Int[Array, ""]) -> tuple[tuple[Cache, Array], Array]:
        cache, token = carry
        prompt_token = prompt[:, jnp.minimum(position, prompt_length - 1)]
        token = jnp.where(position < prompt_length, prompt_token, token)
        logits, cache = model.step(token, cache, position, length)
        return (cache, sample(logits, jax.random.fold_in(key, position))), token

    start = model.init_cache(batch, length), jnp.zeros(batch, prompt.dtype)
    (_, last), tokens = jax.lax.scan(advance, start, jnp.arange(length - 1))
    return jnp.concatenate([tokens.T, last[:, None]], axis=1)[:, prompt_length:]
