"""Decoding with caches agrees with the forward pass of the whole sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import config
from sparsejax.config import AxialConfig
from sparsejax.decode import generate
from sparsejax.errors import InputError
from sparsejax.model import Functional, Model
from tests.messages import rejects

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


def build(tiny_config, **embedding) -> Model:
    settings = config.check(tiny_config).model
    settings = dataclasses.replace(settings, embedding=dataclasses.replace(settings.embedding, **embedding))
    model = Functional(settings)
    return model.bind(model.init(jax.random.key(0)))


@pytest.mark.parametrize(
    "embedding",
    [{"positions": 12}, {"positions": 15, "padding": 2}, {"axial": True}],
    ids=["learned", "after padding", "axial"],
)
def test_generation_ends_at_the_last_position(tiny_config, embedding):
    width = config.check(tiny_config).model.width
    embedding = {"axial": AxialConfig((3, 4), (width - 4, 4))} if "axial" in embedding else embedding
    model, prompt = build(tiny_config, **embedding), jnp.ones((1, 5), jnp.int32)
    sample = jax.jit(lambda prompt, steps: generate(model, prompt, steps, jax.random.key(0)), static_argnums=1)
    assert sample(prompt, 8).shape == (1, 8)  # the last token is not an input
    with rejects(InputError, "12 positions"):
        sample(prompt, 9)
    with rejects(InputError, "12 positions"):
        model(jnp.ones((1, 13), jnp.int32))


@pytest.mark.parametrize("ids", [[[1, 256]], [[-1, 3]]], ids=["above the vocabulary", "negative"])
def test_ids_outside_the_vocabulary(tiny_config, ids):
    model, prompt = build(tiny_config), jnp.asarray(ids)
    with rejects(InputError, "256"):
        generate(model, prompt, 3, jax.random.key(0))
    with rejects(InputError, "256"):
        model(prompt)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("prompt", {"length": 0}),
        ("steps", {"steps": 0}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": np.nan}),
    ],
)
def test_invalid_arguments(tiny_config, argument, change):
    length, options = change.pop("length", 2), {"steps": 3} | change
    with rejects(InputError, argument):
        generate(build(tiny_config), jnp.ones((1, length), jnp.int32), key=jax.random.key(0), **options)
