"""The model against float64 NumPy: scanned and unrolled, whole sequences and token by token."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.layers import (
    AttentionConfig,
    Context,
    Dropout,
    Extras,
    LayerConfig,
    MambaConfig,
    MlpConfig,
    NormConfig,
    RopeConfig,
)
from sparsejax.model import Functional, Model, restack
from tests.layers import reference
from tests.layers.test_mixers import decode
from tests.messages import rejects
from tests.tolerances import assert_close

BATCH, LENGTH, VOCAB, WIDTH = 2, 12, 17, 8
NORM = NormConfig(kind="rms", eps=1e-6)
BARE = functools.partial(LayerConfig, mlp=None, norm=NORM, norm_position="pre", remat="none")
ATTENTION = AttentionConfig(
    pattern="causal", heads=2, kv_heads=1, head_width=4, rope=RopeConfig(base=100.0), qk_norm=NORM, impl="auto"
)
CONFIG = ModelConfig(
    vocab=VOCAB,
    width=WIDTH,
    schedule="2x(ssm local) full",
    layers={
        "ssm": BARE(mixer=MambaConfig(inner=12, state=3, conv=4, dt_rank=2, dt_min=1e-2, dt_max=0.5)),
        "local": BARE(
            mixer=dataclasses.replace(ATTENTION, pattern="causal & (window(3) | sink(2))"),
            mlp=MlpConfig(kind="plain", width=10, activation="gelu_tanh"),
        ),
        "full": BARE(mixer=ATTENTION),
    },
    norm=NORM,
    tied=True,
    dtype="float32",
    scan=True,
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def change(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, **changes)


def fill(config: ModelConfig) -> dict:
    """Random parameters."""
    filled = reference.fill(lambda: Model(config, nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(filled))


def unroll(config: ModelConfig, parameters: dict) -> dict:
    """Parameters of a scanned model, as those of an unrolled one."""
    layers = reference.layer_weights(config, parameters)
    outside = {name: value for name, value in parameters.items() if name not in ("before", "period", "after")}
    return outside | {"before": dict(enumerate(layers))}


def differentiate(config: ModelConfig, parameters: dict, jit=jax.jit):
    """Returns a loss, the logits and the gradient."""

    def loss(parameters):
        logits = Functional(config).bind(parameters)(jnp.asarray(TOKENS))
        return -jax.nn.log_softmax(logits)[:, :, 3].mean(), logits

    (value, logits), gradient = jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    return value, logits, gradient


def assert_same_trees(actual, expected):
    """Compares two trees up to rounding, relative to the scale of each array."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        assert scale > 0, path
        assert_close(str(path), a / scale, b / scale, "float32")


@pytest.fixture(scope="module")
def parameters():
    return fill(CONFIG)


@pytest.fixture(scope="module")
def scanned(parameters):
    """Loss, logits and gradient of the scanned model with rematerialization."""
    layers = {name: dataclasses.replace(layer, remat="full") for name, layer in CONFIG.layers.items()}
    return differentiate(change(layers=layers), parameters)


def drop(config: ModelConfig, parameters: dict, seed: int):
    """Logits and gradient at a dropout rate of 0.5."""

    def loss(parameters):
        context = Context(extras=Extras(dropout=Dropout(jax.random.key(seed), 0.5)))
        logits = Functional(config).bind(parameters)(jnp.asarray(TOKENS), context)
        return -jax.nn.log_softmax(logits)[:, :, 3].mean(), logits

    return jax.jit(jax.grad(loss, has_aux=True))(parameters)[::-1]


def test_dropout_draws_the_same_in_scanned_unrolled_and_recomputed_layers(parameters):
    layers = {name: dataclasses.replace(layer, remat="full") for name, layer in CONFIG.layers.items()}
    logits, gradient = drop(change(layers=layers), parameters, 1)
    unrolled, expected = drop(change(scan=False), unroll(CONFIG, parameters), 1)
    assert_same_trees((logits, unroll(CONFIG, gradient)), (unrolled, expected))
    assert np.abs(drop(CONFIG, parameters, 2)[0] - logits).max() > 1e-3


def test_dropout_keeps_the_mean_and_draws_anew_at_every_place():
    dropout, ones = Dropout(jax.random.key(0), 0.2), jnp.ones((200, 500))
    masks = [np.asarray(dropout(ones, *salts)) for salts in ((0, 0), (1, 0), (1, 1), (2, 0))]
    for mask in masks:
        np.testing.assert_allclose(np.unique(mask), [0, 1.25])
        assert mask.mean() == pytest.approx(1, abs=0.01)
    for a, b in itertools.combinations(masks, 2):
        assert np.mean(a == b) == pytest.approx(0.8**2 + 0.2**2, abs=0.01)


def test_equals_the_reference(parameters, scanned):
    expected = reference.model(CONFIG, jax.tree.map(np.float64, parameters), TOKENS)
    assert scanned[1].shape == (BATCH, LENGTH, VOCAB)
    assert_close("logits", scanned[1], expected, "float32")


def test_unrolled_without_remat_is_the_same_model(parameters, scanned):
    loss, logits, gradient = differentiate(change(scan=False), unroll(CONFIG, parameters))
    assert_same_trees((loss, logits, gradient), (*scanned[:2], unroll(CONFIG, scanned[2])))


@pytest.mark.parametrize("scan", [True, False])
def test_tokens_one_by_one_equal_the_whole(parameters, scanned, scan):
    held = parameters if scan else unroll(CONFIG, parameters)
    model = Functional(change(scan=scan)).bind(held)
    steps = jax.jit(lambda tokens: decode(model, tokens, LENGTH))(TOKENS)
    assert_close("logits", steps, scanned[1], "float32")


def test_an_untied_post_norm_model_without_a_period_whose_logits_depend_on_the_past_alone():
    layer = dataclasses.replace(CONFIG.layers["ssm"], norm_position="post", norm=NormConfig(kind="layer", eps=1e-6))
    config = change(tied=False, schedule="ssm local", layers=CONFIG.layers | {"ssm": layer})
    held = fill(config)
    tokens = jnp.arange(LENGTH)[None]  # every position has its own row of the embedding
    mix = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)

    def run(embedding):
        logits = Functional(config).bind(held | {"embedding": {"tokens": embedding}})(tokens)
        return (logits[0] * mix).sum(-1), logits

    jacobian, logits = jax.jit(jax.jacrev(run, has_aux=True))(held["embedding"]["tokens"])
    assert_close("logits", logits, reference.model(config, jax.tree.map(np.float64, held), tokens), "float32")
    np.testing.assert_array_equal((jacobian[:, :LENGTH] != 0).any(-1), np.tri(LENGTH, dtype=bool))


def test_bfloat16_has_float32_parameters_gradients_and_logits(parameters):
    config = change(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(Functional(config).shapes)} == {jnp.dtype("float32")}
    types = jax.eval_shape(functools.partial(differentiate, config, jit=jax.jit), parameters)
    assert {leaf.dtype for leaf in jax.tree.leaves(types)} == {jnp.dtype("float32")}


def test_bfloat16_is_close_and_its_logits_are_not_rounded():
    config = change(dtype="bfloat16", schedule="local")
    held = fill(config)
    logits = jax.jit(lambda held: Functional(config).bind(held)(jnp.asarray(TOKENS)))(held)
    expected = reference.model(config, jax.tree.map(np.float64, held), TOKENS)
    np.testing.assert_allclose(logits, expected, atol=0.03 * np.abs(expected).max())
    assert (logits != logits.astype(jnp.bfloat16)).any()  # accumulated in float32, not widened from bfloat16


def test_the_cache_is_what_the_layers_keep():
    cache = jax.eval_shape(lambda: Functional(CONFIG).bind(fill(CONFIG)).init_cache(BATCH, 100))
    full = 4 * 2 * BATCH * 100 * 4  # keys and values of a head of 4
    local = 4 * 2 * BATCH * 6 * 4  # 3 previous keys, the token itself and 2 sinks
    ssm = 4 * BATCH * ((4 - 1) * 12 + 12 * 3)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) == 2 * (ssm + local) + full


def test_constrain_is_applied_to_the_stream_between_layers():
    seen = []

    def constrain(x):
        seen.append(x.shape)
        return x

    jax.eval_shape(
        lambda p: Functional(CONFIG).bind(p).forward(jnp.asarray(TOKENS), constrain=constrain),
        Functional(CONFIG).shapes,
    )
    assert seen == [(BATCH, LENGTH, WIDTH)] * 4  # after the embedding, the two layers of the period, and full


# Parameters.


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "schedule", ["ssm", "ssm local", "3x(ssm)", "full 2x(ssm local) full", "2x(ssm ssm local) ssm"]
)
def test_every_parameter_has_axes(schedule, scan):
    functional = Functional(change(schedule=schedule, scan=scan, tied=False))

    def check(leaf, names):
        assert isinstance(names, tuple)
        assert len(names) == len(leaf.shape)
        assert {type(name) for name in names} <= {str, type(None)}

    jax.tree.map(check, functional.shapes, functional.axes)  # fails if the trees differ


def test_axes_of_a_scanned_and_of_an_unrolled_layer():
    functional = Functional(change(tied=False, schedule="full 2x(ssm local) full"))
    axes, shapes = functional.axes, functional.shapes
    assert axes["embedding"]["tokens"] == ("vocab", "width")
    assert axes["head"]["weight"] == ("width", "vocab")
    assert axes["before"][0]["mixer"]["query"]["weight"] == ("width", "heads")
    assert axes["period"][0]["mixer"]["log_decay"] == (None, "inner", None)
    assert shapes["period"][0]["mixer"]["log_decay"].shape == (2, 12, 3)
    assert axes["period"][1]["mlp"]["down"]["weight"] == (None, "ff", "width")
    assert axes["after"][0]["mixer_residual"]["before"]["scale"] == ("width",)


def test_the_number_of_parameters_by_hand():
    def count(config):
        return sum(leaf.size for leaf in jax.tree.leaves(Functional(config).shapes))

    norm, mlp = 8, 2 * 8 * 10
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 2 * 4  # query, key, value, out, norms of queries and keys
    mamba = 2 * 8 * 12 + (4 + 1) * 12 + 12 * (2 + 3 + 3) + (2 + 1) * 12 + 12 * 3 + 12 + 12 * 8
    layers = 2 * (norm + mamba) + 2 * (norm + attention + norm + mlp) + (norm + attention)
    assert count(CONFIG) == count(change(scan=False)) == 17 * 8 + layers + norm
    assert count(change(tied=False)) == 2 * 17 * 8 + layers + norm


@pytest.fixture(scope="module")
def queries():
    """Initial query projections of all layers of a small model with a period, as a function of the key."""
    config = change(schedule="2x(one two) one", layers={"one": BARE(mixer=ATTENTION), "two": BARE(mixer=ATTENTION)})

    def init(key):
        layers = reference.layer_weights(config, Functional(config).init(key))
        return [layer["mixer"]["query"]["weight"] for layer in layers]

    return jax.jit(init)


def test_no_two_layers_and_no_two_keys_start_alike(queries):
    weights = queries(jax.random.key(0)) + queries(jax.random.key(1))
    assert len(weights) == 10
    assert all((a != b).all() for a, b in itertools.combinations(weights, 2))


def test_the_same_key_gives_the_same_parameters(queries):
    jax.tree.map(np.testing.assert_array_equal, queries(jax.random.key(3)), queries(jax.random.key(3)))


def test_fresh_parameters_have_the_stated_shapes():
    functional = Functional(CONFIG)
    made = jax.eval_shape(functional.init, jax.random.key(0))
    actual, stated = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), t) for t in (made, functional.shapes))
    assert actual == stated


def test_bind_gives_back_what_it_was_given(parameters):
    held = nnx.to_pure_dict(nnx.state(Functional(CONFIG).bind(parameters)))
    assert jax.tree.structure(held) == jax.tree.structure(parameters)
    jax.tree.map(np.testing.assert_array_equal, held, parameters)


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


RENAMED = {"first": CONFIG.layers["ssm"]} | CONFIG.layers
FOLDS = {
    "unrolled": {"scan": False},
    "under other names": {"layers": RENAMED, "schedule": "first local ssm local full"},
    "a longer period": {"layers": RENAMED, "schedule": "2x(ssm local) full"},
}


@pytest.mark.parametrize("fold", FOLDS)
def test_restack_between_folds_of_the_same_layers(parameters, fold):
    target = change(**FOLDS[fold])
    restacked = restack(parameters, CONFIG, target)
    assert_equal_trees(restacked, parameters if target.fold == CONFIG.fold else unroll(CONFIG, parameters))
    assert_equal_trees(restack(restacked, target, CONFIG), parameters)
    logits = [Functional(c).bind(p)(jnp.asarray(TOKENS)) for c, p in ((CONFIG, parameters), (target, restacked))]
    assert_close("logits", logits[1], logits[0], "float32")


@pytest.mark.parametrize(
    ("schedule", "path"),
    [("2x(local ssm) full", "period.0"), ("3x(ssm local) full", "layers"), ("full 2x(ssm local)", "mixer.")],
)
def test_restack_of_other_layers(parameters, schedule, path):
    with rejects(InputError, path):
        restack(parameters, CONFIG, change(schedule=schedule))


@pytest.mark.parametrize(
    ("edit", "path"),
    [
        (lambda p: unroll(CONFIG, p), "after.0"),
        (lambda p: restack(p, CONFIG, change(scan=False)), "after.0"),
        (lambda p: p | {"norm": {}}, "norm.scale"),
        (lambda p: p | {"extra": np.zeros(3)}, "extra"),
        (lambda p: p | {"norm": {"scale": np.zeros(3)}}, "norm.scale"),
        (lambda p: {}, "is missing"),
    ],
    ids=["unrolled", "restacked", "missing", "unknown", "shape", "empty"],
)
def test_parameters_of_another_model(parameters, edit, path):
    with rejects(InputError, path):
        Functional(CONFIG).bind(edit(parameters))
