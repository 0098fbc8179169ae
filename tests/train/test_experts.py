"""Training of experts: losses and loads do not depend on microbatches, and the selection bias balances the loads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.model import Functional, restack
from sparsejax.runs import build_optimizer, build_schedule, init_state
from sparsejax.train import build_step
from sparsejax.train.step import read_context
from tests.train import recipe, runs

TOP_K, LENGTH, RATE = 2, 16, 0.01
LOSSES = {"balance_weight": 0.5, "router_z_weight": 0.25}
BIAS = {"selection_bias": True, "bias_rate": RATE}
SCHEDULE = "moe 2x(moe local)"  # folded into one layer before and a period of two


def build(mlp, **train):
    """The settings, the model and the compiled step of a model with three layers of experts, two of them scanned."""
    settings = recipe.get_config()
    settings.model.schedule, settings.data.length = SCHEDULE, LENGTH
    settings.model.layers.moe = recipe.layer(None) | {"mlp": recipe.EXPERTS | dict(mlp)}
    settings.train.update(train)
    settings.optimizer.warmup = 0
    config = configs.check(settings)
    model, mesh = Functional(config.model), sharding.make_mesh(config.sharding)
    optimizer, schedule = build_optimizer(config.optimizer, 10, decay=model.decay), build_schedule(config.optimizer, 10)
    step = build_step(model, optimizer, schedule, config.train, mesh, first=0, ends_row=lambda step: step > 0)
    return model, step, init_state(model, optimizer, 0, mesh)


def draw(seed, rows=4):
    """Packed rows of different lengths, whose scored tokens are again fewer."""
    random = np.random.default_rng(seed)
    tokens = random.integers(97, 123, (rows, LENGTH + 1)).astype(np.int32)
    lengths = np.array([LENGTH, 9, 13, 2])[:rows, None]
    segments = (np.arange(LENGTH) < lengths).astype(np.int32)
    weights = (segments * (random.random((rows, LENGTH)) < 0.6)).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "segments": segments,
        "positions": positions,
    }


def copy(state):
    return jax.tree.map(lambda x: x.copy(), state)


def biases(model, state):
    """The selection biases of the three layers of experts, [3, e]."""
    unrolled = dataclasses.replace(model.config, scan=False)
    layers = restack(state.parameters, model.config, unrolled)["before"]
    return np.stack([np.asarray(layers[i]["mlp"]["selection_bias"]) for i in (0, 1, 3)])


@pytest.fixture(scope="module", params=["batch", "sequence"])
def whole(request):
    """A step of the whole batch with every auxiliary loss."""
    options = LOSSES | BIAS | {"balance": request.param}
    model, step, state = build(options)
    return options, model, state, step(copy(state), draw(0))


def test_microbatches_change_neither_losses_nor_gradient_nor_loads(whole):
    options, model, _, (expected, metrics) = whole
    assert metrics["details"].keys() == {"aux/balance", "aux/router_z", "expert_load_max", "expert_load_min"}
    for microbatches in (2, 4) if options["balance"] == "batch" else (4,):
        _, step, state = build(options, accumulate=microbatches)
        after, accumulated = step(state, draw(0))
        for name, value in {**metrics, **metrics["details"]}.items():
            if name != "details":
                same = {**accumulated, **accumulated["details"]}[name]
                assert float(same) == pytest.approx(float(value), rel=1e-5), name
        np.testing.assert_array_equal(biases(model, after), biases(model, expected))
        for a, b in zip(jax.tree.leaves(after.optimizer), jax.tree.leaves(expected.optimizer), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7)


def test_the_loss_is_that_of_the_tokens(whole):
    _, model, state, (_, metrics) = whole
    _, step, _ = build({"selection_bias": True})
    after, bare = step(copy(state), draw(0))
    assert not biases(model, after).any()  # without a rate the bias is constant
    assert float(metrics["loss"]) == pytest.approx(float(bare["loss"]), rel=1e-6)
    assert bare["details"].keys() == {"expert_load_max", "expert_load_min"}
    assert not np.allclose(bare["grad_norm"], metrics["grad_norm"], rtol=1e-3)


def test_the_bias_follows_the_sign_of_the_load_error():
    model, step, state = build(BIAS)
    batch = jax.tree.map(jnp.asarray, draw(1))
    expected = biases(model, state)

    @jax.jit
    def count(parameters):
        choices = model.bind(parameters).forward(batch["inputs"], read_context(batch)).choices
        return jnp.stack([choices["before"][0], *choices["period"][0]])

    for _ in range(3):
        choices = np.asarray(count(state.parameters), np.float64)
        np.testing.assert_array_equal(choices.sum(axis=1), TOP_K * batch["segments"].sum())
        # arXiv:2412.19437, section 2.1.2: lower the bias of an overloaded expert by gamma, raise that of the others.
        expected += np.float32(RATE) * np.sign(choices.mean(axis=1, keepdims=True) - choices).astype(np.float32)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(biases(model, state), expected, atol=1e-7)
        relative = choices / choices.mean(axis=1, keepdims=True)
        assert float(metrics["details"]["expert_load_max"]) == pytest.approx(relative.max())
        assert float(metrics["details"]["expert_load_min"]) == pytest.approx(relative.min())
    assert np.abs(expected).max() == pytest.approx(3 * RATE)


def test_a_skipped_step_leaves_the_bias():
    model, step, state = build(BIAS, bad_loss="skip")
    state, _ = step(state, draw(0))
    before = biases(model, state)
    assert np.abs(before).max() > 0
    state, metrics = step(state, draw(1) | {"weights": np.full((4, LENGTH), np.nan, np.float32)})
    assert metrics["diverged"]
    np.testing.assert_array_equal(biases(model, state), before)


@pytest.mark.nightly
def test_devices_change_neither_losses_nor_loads(whole):
    options, model, _, (expected, metrics) = whole
    program = f"from tests.train import test_experts; test_experts.print_step({options!r})"
    code, out, err = runs.finish(runs.start(program=("-c", program), devices=4))
    assert code == 0, err
    devices, details, moved = json.loads(out)
    assert devices == 4
    assert details == pytest.approx({name: float(value) for name, value in metrics["details"].items()}, rel=1e-5)
    np.testing.assert_array_equal(np.float32(moved), biases(model, expected))


def print_step(options):
    """Prints the number of devices, the metrics of experts and the biases after a step, in another process."""
    model, step, state = build(options)
    after, metrics = step(state, draw(0))
    details = {name: float(value) for name, value in metrics["details"].items()}
    print(json.dumps([jax.device_count(), details, biases(model, after).tolist()]))
