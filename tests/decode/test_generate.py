"""Decoding with caches agrees with running the whole model again for every token."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import config
from sparsejax.decode import generate
from sparsejax.model import Functional


def test_greedy_generation_equals_the_full_forward(tiny_config):
    model = Functional(config.check(tiny_config).model)
    parameters = jax.tree.map(lambda x: 1.5 * x, model.init(jax.random.key(0)))
    prompt = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)
    steps = 20
    found = jax.jit(lambda p, t: generate(model.bind(p), t, steps, jax.random.key(2), temperature=0))(
        parameters, prompt
    )
    forward = jax.jit(lambda p, t: model.bind(p)(t))
    tokens = jnp.pad(prompt, ((0, 0), (0, steps)))  # causal: what follows a position does not matter
    for at in range(9, 9 + steps):
        tokens = tokens.at[:, at].set(forward(parameters, tokens)[:, at - 1].argmax(-1))
    np.testing.assert_array_equal(found, tokens[:, 9:])


def test_sampling_follows_the_key(tiny_config):
    model = Functional(config.check(tiny_config).model)
    parameters = model.init(jax.random.key(0))
    sample = jax.jit(lambda key: generate(model.bind(parameters), jnp.ones((1, 1), jnp.int32), 12, key))
    first, same, other = (sample(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
