"""Generation from caches agrees with the forward pass of the whole sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import config
from sparsejax.config import AxialConfig
from sparsejax.errors import InputError
from sparsejax.inference import Decoder, Plan, Sampling, generate, generation
from sparsejax.model import Functional
from tests.messages import rejects
from tests.train import recipe

pytestmark = pytest.mark.quick

GREEDY = Sampling(temperature=0)
LENGTHS = (3, 20, 9)


@pytest.fixture(scope="module")
def model():
    """A model and its parameters, for which every shape is compiled once."""
    model = Functional(config.check(recipe.get_config()).model)
    return model, jax.tree.map(lambda x: 1.5 * x, model.init(jax.random.key(0)))


def draw_prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length) for length in LENGTHS]


def test_greedy_generation_equals_the_forward_pass(model):
    steps, prompts = 12, draw_prompts()
    generated = generate(*model, prompts, steps, sampling=GREEDY, chunk=8)
    forward = jax.jit(lambda parameters, tokens: model[0].bind(parameters)(tokens))
    for prompt, row in zip(prompts, generated, strict=True):
        tokens = np.zeros((1, max(LENGTHS) + steps), np.int32)  # the model is causal: later positions do not matter
        tokens[0, : len(prompt)] = prompt
        for position in range(len(prompt), len(prompt) + steps):
            tokens[0, position] = forward(model[1], tokens)[0, position - 1].argmax()
        np.testing.assert_array_equal(row, tokens[0, len(prompt) :][:steps])


def test_rows_are_independent(model):
    prompts = draw_prompts()
    together = generate(*model, prompts, 12, seeds=[5, 6, 7])
    for prompt, seed, row in zip(prompts, (5, 6, 7), together, strict=True):
        np.testing.assert_array_equal(generate(*model, [prompt], 12, seeds=[seed])[0], row)
    other = generate(*model, prompts, 12, seeds=[5, 8, 7])
    np.testing.assert_array_equal(other[0], together[0])
    assert (other[1] != together[1]).any()


def test_a_row_ends_at_its_last_token(model):
    prompts = draw_prompts()
    whole = generate(*model, prompts, 12, sampling=GREEDY)
    end = int(whole[1][4])
    ended = generate(*model, prompts, 12, sampling=GREEDY, ends=[end, 255])
    for row, expected in zip(ended, whole, strict=True):
        stop = next((i + 1 for i, token in enumerate(expected) if token in (end, 255)), 12)
        np.testing.assert_array_equal(row, expected[:stop])
    assert len(ended[1]) <= 5


def test_blocks_and_stopped_rows(model):
    prompts = draw_prompts()
    whole = generate(*model, prompts, 12, sampling=GREEDY)
    decoder = Decoder(*model, prompts, 12, sampling=GREEDY)
    blocks = [decoder.advance(1), decoder.advance(3)]
    decoder.stop(1)
    blocks.append(decoder.advance())
    assert [block.shape[1] for block in blocks] == [1, 3, 8]
    assert not decoder.active.any()
    assert decoder.advance().shape == (3, 0)
    tokens = np.concatenate(blocks, axis=1)
    np.testing.assert_array_equal(tokens[[0, 2]], np.stack(whole)[[0, 2]])
    np.testing.assert_array_equal(tokens[1], [*whole[1][:4], *[-1] * 8])


def test_a_bucket_is_compiled_once(model):
    sizes = []
    for length in (17, 19, 20):
        prompt = np.arange(length)
        generate(*model, [prompt], 41 - length, sampling=Sampling(temperature=length / 20), ends=[length])
        sizes.append([function._cache_size() for function in (generation._extend, generation._decode)])
    assert sizes[0] == sizes[1] == sizes[2]


def test_buckets():
    for longest in (1, 15, 16, 17, 100, 511, 512, 513, 1025, 40_000):
        plan = Plan.build([1, longest], 10)
        assert sum(plan.chunks) >= longest
        assert plan.length >= longest + 9
        assert max(plan.chunks) <= generation.CHUNK
        if longest > 16:
            assert sum(plan.chunks) <= 1.25 * longest + 1
            assert plan.length <= 1.25 * (longest + 9)
    lengths = {Plan.build([longest], 10).length for longest in range(1, 4096)}
    assert len(lengths) < 35
    assert str(Plan.build([600, 20], 100)) == "2 rows, chunks of 1 x 512 + 1 x 96 tokens, caches for 768 tokens"


def build(tiny_config, **embedding):
    tiny_config.model.schedule = "full"
    del tiny_config.model.layers["ssm"], tiny_config.model.layers["local"]
    settings = config.check(tiny_config).model
    settings = dataclasses.replace(settings, embedding=dataclasses.replace(settings.embedding, **embedding))
    model = Functional(settings)
    return model, model.init(jax.random.key(0))


@pytest.mark.parametrize(
    "embedding",
    [{"positions": 12}, {"positions": 15, "padding": 2}, {"axial": True}],
    ids=["learned", "after padding", "axial"],
)
def test_generation_ends_at_the_last_position(tiny_config, embedding):
    width = config.check(tiny_config).model.width
    embedding = {"axial": AxialConfig((3, 4), (width - 4, 4))} if "axial" in embedding else embedding
    model, parameters = build(tiny_config, **embedding)
    prompt = np.ones(5, np.int32)
    [tokens] = generate(model, parameters, [prompt], 8, sampling=GREEDY)
    assert len(tokens) == 8  # the last token is not an input
    logits = model.bind(parameters)(jnp.asarray([[*prompt, *tokens[:-1]]]))
    np.testing.assert_array_equal(tokens, logits[0, 4:].argmax(-1))
    with rejects(InputError, "12 positions"):
        generate(model, parameters, [prompt], 9)
    with rejects(InputError, "12 positions"):
        model.bind(parameters)(jnp.ones((1, 13), jnp.int32))


@pytest.mark.parametrize("ids", [[1, 256], [-1, 3]], ids=["above the vocabulary", "negative"])
def test_ids_outside_the_vocabulary(model, ids):
    with rejects(InputError, "256"):
        generate(*model, [ids], 3)
    with rejects(InputError, "256"):
        model[0].bind(model[1])(jnp.asarray([ids]))


@pytest.mark.parametrize(
    ("argument", "prompts", "options"),
    [
        ("prompt", [], {}),
        ("prompt", [[]], {}),
        ("prompt", [[[1]]], {}),
        ("prompt", [[0.5]], {}),
        ("tokens", [[1]], {"tokens": 0}),
        ("seeds", [[1]], {"seeds": [1, 2]}),
        ("seeds", [[1]], {"seeds": [-1]}),
    ],
)
def test_invalid_arguments(model, argument, prompts, options):
    with rejects(InputError, argument):
        generate(*model, prompts, **{"tokens": 3} | options)


def test_an_encoder_cannot_generate(tiny_config):
    tiny_config.model.causal = False
    tiny_config.data.objective = "masked"
    tiny_config.model.vocab = 257
    tiny_config.model.schedule = "2x(full)"
    tiny_config.model.layers.full.mixer.pattern = "full"
    del tiny_config.model.layers["ssm"], tiny_config.model.layers["local"]
    model = Functional(config.check(tiny_config).model)
    with rejects(InputError, "causal"):
        generate(model, model.init(jax.random.key(0)), [[1]], 3)
