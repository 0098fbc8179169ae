"""The optimizer: AdamW by hand, its schedule, weight decay and clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.config import OptimizerConfig
from sparsejax.runs import build_optimizer, build_schedule

pytestmark = pytest.mark.quick

STEPS = 104
CONFIG = OptimizerConfig(
    learning_rate=0.5, final_rate=0.1, warmup=4, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.2, clip=1e9
)
FLAT = dataclasses.replace(CONFIG, warmup=0, final_rate=1.0)  # a constant rate of 0.5
PARAMETERS = {
    "out": {"weight": jnp.array([[2.0, -4.0]]), "bias": jnp.array([3.0])},
    "norm": {"scale": jnp.array([5.0])},
    "embedding": jnp.array([[7.0]]),
}


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.0), (1, 0.125), (3, 0.375), (4, 0.5), (54, 0.5 * (0.1 + 0.9 / 2)), (104, 0.05), (200, 0.05)],
)
def test_schedule_warms_up_and_follows_a_cosine(step, rate):
    assert float(build_schedule(CONFIG, STEPS)(step)) == pytest.approx(rate, rel=1e-6)


def test_schedule_of_a_run_shorter_than_its_warmup_only_rises():
    rates = [float(build_schedule(CONFIG, 3)(step)) for step in range(3)]
    assert rates == pytest.approx([0.0, 0.125, 0.25])


def test_only_marked_parameters_decay():
    marked = {"out": {"weight": True, "bias": False}, "norm": {"scale": False}, "embedding": False}
    optimizer = build_optimizer(FLAT, STEPS, decay=marked)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMETERS), optimizer.init(PARAMETERS), PARAMETERS)
    np.testing.assert_allclose(updates["out"]["weight"], [[-0.5 * 0.2 * 2.0, 0.5 * 0.2 * 4.0]], rtol=1e-6)
    for update in (updates["out"]["bias"], updates["norm"]["scale"], updates["embedding"]):
        assert not update.any()


def test_two_updates_by_hand():
    optimizer = build_optimizer(dataclasses.replace(FLAT, weight_decay=0.0), STEPS, decay={"weight": True})
    parameters = {"weight": jnp.array([1.0])}
    state, mean, square, value = optimizer.init(parameters), 0.0, 0.0, 1.0
    for count, grad in enumerate([3.0, -1.0], 1):
        updates, state = optimizer.update({"weight": jnp.array([grad])}, state, parameters)
        parameters = {"weight": parameters["weight"] + updates["weight"]}
        mean, square = 0.9 * mean + 0.1 * grad, 0.99 * square + 0.01 * grad**2
        value -= 0.5 * (mean / (1 - 0.9**count)) / ((square / (1 - 0.99**count)) ** 0.5 + 1e-8)
    assert float(parameters["weight"][0]) == pytest.approx(value, rel=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    decay = {"a": False, "b": {"weight": True}}
    clipped, free = (build_optimizer(dataclasses.replace(FLAT, clip=clip), STEPS, decay=decay) for clip in (1.0, 1e9))
    grads = {"a": jnp.array([3.0]), "b": {"weight": jnp.array([4.0])}}  # global norm 5
    _, after = clipped.update(grads, clipped.init(grads), grads)
    _, expected = free.update(jax.tree.map(lambda g: g / 5, grads), free.init(grads), grads)
    for update, leaf in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(update, leaf, rtol=1e-6)
