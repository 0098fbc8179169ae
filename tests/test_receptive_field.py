"""Receptive fields of a real model: exactly the inputs inside change the logits."""

import jax
import numpy as np
import pytest

from sparsejax import config as configs
from sparsejax.model import Functional
from sparsejax.patterns import parse, receptive_field
from tests.train import recipe

pytestmark = pytest.mark.quick

LENGTH = 24
ATTENTION = {
    "local": "causal & window(3)",
    "sinks": "causal & (window(2) | sink(2))",
    "chunks": "causal & chunk(5)",
    "heads": "per_head(causal & window(1), causal & chunk(4))",
    "globals": "causal & (window(2) | globals([4]))",
    "full": "causal",
}
SCHEDULES = ["3x(local)", "2x(sinks local)", "2x(chunks)", "2x(heads)", "2x(globals)", "local ssm", "chunks full"]


def build_model(schedule):
    settings = recipe.get_config().model.to_dict()
    mixers = {name: recipe.layer(recipe.attention(pattern)) for name, pattern in ATTENTION.items()}
    whole = recipe.get_config()
    whole.model = settings | {"schedule": schedule, "scan": False, "layers": settings["layers"] | mixers}
    return Functional(configs.check(whole).model)


def changed_outputs(model):
    """Booleans [outputs, inputs]: whether another input token changes any bit of the logits."""
    draws = np.random.default_rng(0)
    parameters = model.init(jax.random.key(0))
    run = jax.jit(lambda tokens: model.bind(parameters)(tokens))
    changed = np.zeros((LENGTH, LENGTH), bool)
    for _ in range(4):  # rounding can hide a faint influence, but not in every draw
        tokens = draws.integers(0, 256, LENGTH)
        others = np.where(np.eye(LENGTH, dtype=bool), (tokens + draws.integers(1, 256)) % 256, tokens)
        logits = run(np.concatenate([tokens[None], others]))
        changed |= np.asarray((logits[1:] != logits[0]).any(axis=-1)).T
    return changed


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exactly_the_receptive_field_changes_the_logits(schedule):
    model = build_model(schedule)
    layers = [model.config.layers[name].mixer.connectivity for name in model.config.names]
    np.testing.assert_array_equal(changed_outputs(model), receptive_field.matrix(layers, LENGTH))


def test_connectivity_of_mixers():
    layers = build_model("local ssm").config.layers
    assert layers["ssm"].mixer.connectivity == parse("causal")
    assert layers["heads"].mixer.connectivity == parse(ATTENTION["heads"])
