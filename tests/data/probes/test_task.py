"""Every probe is a task that an override selects, and its batches resume exactly."""

import numpy as np
import pytest

from sparsejax import config
from sparsejax.data import load_dataset
from sparsejax.data.probes import PROBES
from tests.data.probes.test_example import GENERATED

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_a_task(name):
    probe = PROBES[name]()
    overrides = {"data.task": name, "data.length": probe.length, "model.vocab": max(probe.vocab, 256)}
    assert config.check(config.load("preset:quickstart", overrides)).data.probe == probe


@pytest.mark.parametrize("name", GENERATED)
def test_batches_resume(name):
    probe = GENERATED[name]
    overrides = {"data.task": name, "data.length": probe.length, "model.vocab": max(probe.vocab, 256)}
    dataset = load_dataset(config.check(config.load("preset:quickstart", overrides)).data)
    batches = dataset.train_batches(2, seed=4)
    for _ in range(3):
        next(batches)
    state, expected = batches.get_state(), next(batches)
    fresh = dataset.train_batches(2, seed=4)
    fresh.set_state(state)
    resumed = next(fresh)
    assert set(resumed) == set(expected)
    for key in expected:
        np.testing.assert_array_equal(resumed[key], expected[key])
        np.testing.assert_array_equal(resumed[key][1], probe.example(4, 7)[key])
    for i, batch in zip(range(2), dataset.validation_batches(2), strict=False):
        np.testing.assert_array_equal(batch["inputs"][0], probe.example(0, 2 * i, True)["inputs"])
