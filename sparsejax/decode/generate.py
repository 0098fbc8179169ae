"""Generation, one token at a time from a cache of fixed size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from sparsejax.model import Model


def generate(
    model: Model, prompt: Int[Array, "b t"], steps: int, key: Key[Array, ""], temperature: float = 1.0
) -> Int[Array, "b steps"]:
    """Continues a prompt; to be called under `jax.jit`, with `steps` and `temperature` static.

    Args:
      model: the model; its caches hold what its patterns can still look at, see `patterns.cache_slots`.
      prompt: at least one token for each row.
      steps: tokens to add.
      key: for the draws.
      temperature: of the distribution sampled from; 0 takes the most likely token.
    """
    batch, given = prompt.shape
    length = given + steps

    def draw(logits: Array, key: Array) -> Array:
        if temperature == 0:
            return logits.argmax(axis=-1).astype(prompt.dtype)
        return jax.random.categorical(key, logits / temperature).astype(prompt.dtype)

    def advance(carry, position):
        cache, token = carry
        inside = position < given
        token = jnp.where(inside, prompt[:, jnp.minimum(position, given - 1)], token)
        logits, cache = model.step(token, cache, position, length)
        return (cache, draw(logits, jax.random.fold_in(key, position))), token

    start = model.init_cache(batch, length), jnp.zeros(batch, prompt.dtype)
    (_, last), tokens = jax.lax.scan(advance, start, jnp.arange(length - 1))
    return jnp.concatenate([tokens.T, last[:, None]], axis=1)[:, given:]
