"""Optimizers by name, groups of parameters and averages of them, each compared with optax used plainly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.config import OPTIMIZERS, ConfigError, GroupConfig, OptimizerConfig
from sparsejax.errors import InputError
from sparsejax.model import Functional, restack
from sparsejax.runs import build_optimizer, build_schedule, init_state, state_shapes
from sparsejax.runs.optimizer import averaged_parameters, find_ema
from sparsejax.runs.state import restack_state
from tests.messages import rejects
from tests.train import recipe

STEPS, RATE = 3, 0.1
CONFIG = OptimizerConfig(learning_rate=RATE, final_rate=1.0, warmup=0, weight_decay=0.2, clip=None, schedule="constant")
DECAY = {"linear": {"weight": True}, "stack": {"weight": True}, "norm": {"scale": False}}
SHAPES = {"linear": {"weight": (6, 4)}, "stack": {"weight": (3, 4, 5)}, "norm": {"scale": (4,)}}
FACTORED = 4  # least axis of a matrix that Adafactor factors, below those of the models here


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def draw_like(model, seed):
    return draw(seed, jax.tree.map(lambda leaf: leaf.shape, model.shapes))


def run(optimizer, parameters, gradients):
    """The parameters and the state after the updates by all gradients."""

    @jax.jit
    def update(parameters, state, gradient):
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    state = jax.jit(optimizer.init)(parameters)
    for gradient in gradients:
        parameters, state = update(parameters, state, gradient)
    return parameters, state


def assert_close(actual, expected, rtol=2e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected)


def plain(name):
    """The optimizer as its users write it with optax."""
    decay = optax.add_decayed_weights(0.2, DECAY)
    if name == "adamw":
        return optax.adamw(RATE, weight_decay=0.2, mask=DECAY)
    if name == "lion":
        return optax.lion(RATE, weight_decay=0.2, mask=DECAY)
    if name == "sgd":
        return optax.chain(optax.trace(0.9, nesterov=True), decay, optax.scale(-RATE))
    if name == "adafactor":
        return optax.adafactor(
            RATE, min_dim_size_to_factor=FACTORED, weight_decay_rate=0.2 * RATE, weight_decay_mask=DECAY
        )
    if name == "schedule_free_adamw":
        rms = optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)
        return optax.contrib.schedule_free(optax.chain(rms, decay, optax.scale(-RATE)), RATE, b1=0.9)
    numbers = optax.contrib.MuonDimensionNumbers
    axes = {"linear": {"weight": numbers(0, 1)}, "stack": {"weight": numbers(1, 2)}, "norm": {"scale": None}}
    return optax.contrib.muon(
        RATE, weight_decay=0.2, consistent_rms=0.2, adam_learning_rate=RATE, muon_weight_dimension_numbers=axes,
        nesterov=False, adam_b2=0.999,
    )  # fmt: skip


KEYS = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adafactor": {"min_factored": FACTORED},
    "muon": {"nesterov": False},  # which optax shares between Muon and AdamW
}


def configure(name, **changes):
    return dataclasses.replace(CONFIG, name=name, **KEYS.get(name, {}), **changes)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_that_of_optax(name):
    parameters, gradients = draw(0), [draw(seed) for seed in range(1, STEPS + 1)]
    actual, state = run(build_optimizer(configure(name), STEPS, decay=DECAY), parameters, gradients)
    expected, plain_state = run(plain(name), parameters, gradients)
    assert_close(actual, expected)
    if name == "schedule_free_adamw":
        average = optax.contrib.schedule_free_eval_params(plain_state, expected)
        assert_close(averaged_parameters(state, actual), average)
        assert not np.allclose(average["linear"]["weight"], expected["linear"]["weight"], atol=1e-3)


def test_muon_orthogonalizes_each_matrix_of_a_stack():
    gradient = draw(1)
    config = configure("muon", weight_decay=0.0, momentum=0.0)
    parameters, _ = run(build_optimizer(config, STEPS, decay=DECAY), draw(0), [gradient])
    update = np.asarray(parameters["stack"]["weight"] - draw(0)["stack"]["weight"])
    singular = np.linalg.svd(update, compute_uv=False)
    assert singular.shape == (3, 4)
    np.testing.assert_allclose(singular / (RATE * 0.2 * 5**0.5), 1, atol=0.4)  # the iteration of Muon is coarse


def build_models():
    """A model whose layers are scanned, and the same with all layers unrolled."""
    settings = recipe.get_config()
    settings.model.tied = False
    settings.model.schedule = "5x(local) full"
    scanned = Functional(configs.check(settings).model)
    settings.model.scan = False
    return scanned, Functional(configs.check(settings).model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scanned_model_is_updated_as_the_unrolled_one(name):
    scanned, unrolled = build_models()
    assert scanned.config.fold.repeats == 5
    results = []
    for model in (scanned, unrolled):
        trees = (draw_like(scanned, seed) for seed in range(STEPS + 1))
        parameters, *gradients = (restack(tree, scanned.config, model.config) for tree in trees)
        optimizer = build_optimizer(configure(name, clip=1.0), STEPS, decay=model.decay, axes=model.axes)
        parameters, _ = run(optimizer, parameters, gradients)
        results.append(restack(parameters, model.config, unrolled.config))
    assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "muon", "schedule_free_adamw"])  # those with states of several kinds
def test_a_state_can_change_between_scanned_and_unrolled_layers(name):
    scanned, unrolled = build_models()
    mesh = sharding.single_device_mesh()
    config = configure(name, ema=None if name == "schedule_free_adamw" else 0.9)
    config = dataclasses.replace(config, freeze="embedding.*", groups=(GroupConfig("*.scale", rate=0.5),))
    optimizers = [build_optimizer(config, STEPS, decay=model.decay, axes=model.axes) for model in (scanned, unrolled)]
    state = init_state(scanned, optimizers[0], 0, mesh)
    there = restack_state(state, scanned, unrolled, optimizers[1], mesh)
    expected = state_shapes(unrolled, optimizers[1], mesh)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (there, expected)]
    assert shapes[0] == shapes[1]
    back = restack_state(there, unrolled, scanned, optimizers[0], mesh)
    jax.tree.map(np.testing.assert_array_equal, (back.parameters, back.optimizer), (state.parameters, state.optimizer))


def test_the_head_and_the_embedding_are_no_matrices_of_muon():
    model, _ = build_models()
    optimizer = build_optimizer(configure("muon"), STEPS, decay=model.decay, axes=model.axes)
    paths = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree.leaves_with_path(jax.eval_shape(optimizer.init, model.shapes))
    }
    assert any("adamw" in path and path.endswith("nu.head.weight") for path in paths)
    assert any("adamw" in path and path.endswith("nu.embedding.tokens") for path in paths)
    assert not any("muon" in path and ("head" in path or "embedding" in path) for path in paths)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "adam"}, "name"),
        ({"name": "lion", "eps": 1e-8}, "eps"),
        ({"name": "sgd", "beta1": 0.9}, "beta1"),
        ({"momentum": 0.9}, "momentum"),
        ({"min_factored": 4}, "min_factored"),
        ({"decay_fraction": 0.1}, "decay_fraction"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, "decay_fraction"),
        ({"schedule": "wsd", "decay_shape": "step"}, "decay_shape"),
        ({"name": "schedule_free_adamw", "schedule": "cosine"}, "schedule"),
        ({"name": "schedule_free_adamw", "beta1": 0.0}, "beta1"),
        ({"name": "schedule_free_adamw", "ema": 0.9}, "ema"),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_a_key_that_does_not_fit_is_refused(changes, key):
    with rejects(InputError, key):
        dataclasses.replace(CONFIG, **changes)


def test_another_optimizer_keeps_the_keys_that_it_has():
    settings = recipe.get_config()
    configs.override(settings, {"optimizer.momentum": "0.9", "optimizer.name": "sgd"} | {"optimizer.nesterov": True})
    optimizer = configs.check(settings).optimizer
    assert (optimizer.beta1, optimizer.eps, optimizer.momentum, optimizer.nesterov) == (None, None, 0.9, True)
    settings = recipe.get_config()
    configs.override(settings, {"optimizer.name": "lion"})
    assert (configs.check(settings).optimizer.beta2, configs.check(settings).optimizer.eps) == (0.95, None)
    settings.optimizer.name = "adafactor"
    with rejects(ConfigError, "optimizer.beta1"):
        configs.check(settings)


# Schedules.


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", lambda x: 1 - 0.9 * x),
        ("cosine", lambda x: 0.1 + 0.9 * (1 + np.cos(np.pi * x)) / 2),
        ("sqrt", lambda x: 1 - 0.9 * np.sqrt(x)),
    ],
)
def test_warmup_stable_decay(shape, expected):
    config = dataclasses.replace(
        CONFIG, warmup=10, final_rate=0.1, schedule="wsd", decay_fraction=0.2, decay_shape=shape
    )
    steps = np.arange(0, 121)
    after = RATE * expected(np.clip((steps - 80) / 20, 0, 1))
    rates = [float(build_schedule(config, 100)(step)) for step in steps]
    np.testing.assert_allclose(rates, np.where(steps < 10, RATE * steps / 10, after), rtol=1e-5)


def test_inverse_square_root():
    config = dataclasses.replace(CONFIG, warmup=16, schedule="inverse_sqrt")
    rates = [float(build_schedule(config, 100)(step)) for step in (0, 8, 16, 64, 400)]
    np.testing.assert_allclose(rates, [0, RATE / 2, RATE, RATE / 2, RATE / 5], rtol=1e-6)


# Groups.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_group_that_matches_sets_rate_and_decay(name):
    groups = (GroupConfig("linear.*", rate=0.5, weight_decay=0.0), GroupConfig("*.weight", rate=9.0, weight_decay=0.1))
    parameters, gradients = draw(0), [draw(seed) for seed in range(1, STEPS + 1)]
    actual, _ = run(build_optimizer(configure(name, groups=groups), STEPS, decay=DECAY), parameters, gradients)
    for part, changes in {
        "linear": {"learning_rate": RATE * 0.5, "weight_decay": 0.0},
        "stack": {"learning_rate": RATE * 9, "weight_decay": 0.1},
        "norm": {},
    }.items():
        config = dataclasses.replace(configure(name), **changes)
        expected, _ = run(build_optimizer(config, STEPS, decay=DECAY), parameters, gradients)
        assert_close(actual[part], expected[part])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_have_no_state(name):
    def count_bytes(**changes):
        state = jax.eval_shape(build_optimizer(configure(name, **changes), STEPS, decay=DECAY).init, draw(0))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)

    only = {key: value for key, value in draw(0).items() if key != "stack"}
    decay = {key: value for key, value in DECAY.items() if key != "stack"}
    state = jax.eval_shape(build_optimizer(configure(name), STEPS, decay=decay).init, only)
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert count_bytes(freeze="stack.*") == expected
    assert count_bytes(groups=(GroupConfig("stack.*", freeze=True),)) == expected
    if name != "sgd" or KEYS["sgd"]["momentum"]:
        assert count_bytes() > expected


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"freeze": "linear.*, absent.*"}, "optimizer.freeze"),
        ({"groups": (GroupConfig("linear.*"), GroupConfig("absent.*"))}, "optimizer.groups[1].match"),
        ({"freeze": "*"}, "optimizer.freeze"),
    ],
)
def test_a_pattern_must_match(changes, key):
    with rejects(InputError, key):
        build_optimizer(dataclasses.replace(CONFIG, **changes), STEPS, decay=DECAY)


def test_a_frozen_group_has_no_rate():
    with rejects(InputError, "freeze"):
        GroupConfig("linear.*", rate=0.5, freeze=True)


# Averages.


def test_ema_is_the_debiased_average_of_optax():
    optimizer = build_optimizer(configure("adamw", ema=0.9), STEPS, decay=DECAY)
    parameters, gradients = draw(0), [draw(seed) for seed in range(1, 8)]
    average, expected, state = optax.ema(0.9, debias=True), None, optimizer.init(parameters)
    reference = average.init(parameters)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        expected, reference = average.update(parameters, reference)
        assert_close(find_ema(state), expected)


def dtypes_of(state, name):
    """Dtypes of the arrays of parameters in the fields `name` of a state."""
    leaves = jax.tree.leaves_with_path(state)
    return {leaf.dtype.name for path, leaf in leaves if leaf.ndim and any(getattr(p, "name", "") == name for p in path)}


MEANS = {"adamw": "mu", "lion": "mu", "adafactor": "ema", "sgd": "trace", "muon": "mu"}


@pytest.mark.parametrize("name", MEANS)
def test_means_of_gradients_in_bfloat16(name):
    """Only they are rounded, once per update: the first update is the same, and later ones are close."""
    momentum = {"momentum": 0.9} if name in ("sgd", "adafactor") else {}
    config = dataclasses.replace(configure(name), **momentum)
    half = dataclasses.replace(config, moments="bfloat16")
    parameters, gradients = draw(0), [draw(seed) for seed in range(1, 6)]
    optimizers = [build_optimizer(c, STEPS, decay=DECAY) for c in (config, half)]
    (plain_after, _), (other, state) = (run(optimizer, parameters, gradients[:1]) for optimizer in optimizers)
    assert_close(other, plain_after, rtol=5e-3 if name in ("adafactor", "sgd") else 2e-5, atol=5e-3)
    assert dtypes_of(state, MEANS[name]) == {"bfloat16"}
    assert dtypes_of(state, "nu") <= {"float32"}
    (plain_after, full), (other, state) = (run(optimizer, parameters, gradients) for optimizer in optimizers)
    for a, b, start in zip(*map(jax.tree.leaves, (other, plain_after, parameters)), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b - start)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (full, state)]
    assert sizes[0] - sizes[1] == 2 * sum(leaf.size for leaf in jax.tree.leaves(parameters))


def test_schedule_free_averages_keep_no_mean_of_gradients():
    with rejects(InputError, "moments"):
        configure("schedule_free_adamw", moments="bfloat16")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_in_bfloat16_are_updated_in_float32_and_rounded(name):
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(0))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    gradient = draw(1)
    optimizer = build_optimizer(configure(name), STEPS, decay=DECAY)
    (rounded, state), (expected, plain_state) = (run(optimizer, x, [gradient]) for x in (start, exact))
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(plain_state)]
