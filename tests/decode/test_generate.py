"""Decoding with caches agrees with the forward pass of the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import config
from sparsejax.decode import generate
from sparsejax.model import Functional

pytestmark = pytest.mark.quick


def test_greedy_generation_equals_the_forward_pass(tiny_config):
    model = Functional(config.check(tiny_config).model)
    parameters = jax.tree.map(lambda x: 1.5 * x, model.init(jax.random.key(0)))
    prompt = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)
    steps = 20
    generated = jax.jit(lambda p, t: generate(model.bind(p), t, steps, jax.random.key(2), temperature=0))(
        parameters, prompt
    )
    forward = jax.jit(lambda p, t: model.bind(p)(t))
    tokens = jnp.pad(prompt, ((0, 0), (0, steps)))  # the model is causal: later positions do not matter
    for position in range(9, 9 + steps):
        tokens = tokens.at[:, position].set(forward(parameters, tokens)[:, position - 1].argmax(-1))
    np.testing.assert_array_equal(generated, tokens[:, 9:])


def test_samples_depend_on_the_key(tiny_config):
    model = Functional(config.check(tiny_config).model)
    parameters = model.init(jax.random.key(0))
    sample = jax.jit(lambda key: generate(model.bind(parameters), jnp.ones((1, 1), jnp.int32), 12, key))
    first, same, other = (sample(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
