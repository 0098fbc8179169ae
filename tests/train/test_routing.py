"""Training of routing attention: centroids follow their members, whatever the number of microbatches."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.layers import EMPTY
from sparsejax.model import Functional
from sparsejax.ops.routing import update_centroids
from sparsejax.runs import build_optimizer, build_schedule, init_state
from sparsejax.train import build_step
from tests.tolerances import assert_close
from tests.train import recipe
from tests.train.test_experts import copy, draw

RATE = 0.1
ROUTING = {"kind": "routing", "heads": 2, "kv_heads": 2, "head_width": 8, "clusters": 3, "members": 4, "rope": None}


def build(accumulate=1, **changes):
    """The model and the compiled step of a model with three layers of routing, two of them scanned."""
    settings = recipe.get_config()
    settings.model.schedule, settings.data.length = "routing 2x(routing local)", 16
    settings.model.layers.routing = recipe.layer(ROUTING | {"rate": RATE} | changes)
    settings.train.accumulate, settings.optimizer.warmup = accumulate, 0
    config = configs.check(settings)
    model, mesh = Functional(config.model), sharding.make_mesh(config.sharding)
    optimizer, schedule = build_optimizer(config.optimizer, 10, decay=model.decay), build_schedule(config.optimizer, 10)
    step = build_step(model, optimizer, schedule, config.train, mesh, first=0, ends_row=lambda step: step > 0)
    return model, step, init_state(model, optimizer, 0, mesh)


def centroids(parameters):
    return [parameters[part][0]["mixer"]["centroids"] for part in ("before", "period")]


def test_a_step_moves_centroids_toward_their_members():
    model, step, state = build()
    batch = {key: jnp.asarray(value) for key, value in draw(0).items() if key not in ("segments", "positions")}
    output = jax.jit(lambda p: model.bind(p).forward(batch["inputs"], EMPTY))(state.parameters)
    before = jax.tree.map(np.asarray, centroids(state.parameters))
    after, metrics = step(copy(state), batch)
    sums = [output.statistics[part][0]["sums"] for part in ("before", "period")]
    for old, new, total in zip(before, centroids(after.parameters), sums, strict=True):
        assert_close("centroids", new, update_centroids(jnp.asarray(old), total, RATE), "float32")
        assert_close("length", jnp.linalg.norm(new, axis=-1), np.ones(new.shape[:-1]), "float32")
    assert float(metrics["details"]["aux/commitment"]) > 0


def test_microbatches_move_centroids_alike():
    batch = draw(1)
    moved = [centroids(step(copy(state), batch)[0].parameters) for _, step, state in (build(1), build(2))]
    for single, microbatches in zip(*moved, strict=True):
        assert_close("centroids", microbatches, single, "float32")


def test_a_rate_of_zero_keeps_centroids():
    _, step, state = build(rate=0.0)
    before = jax.tree.map(np.asarray, centroids(state.parameters))
    for old, new in zip(before, centroids(step(copy(state), draw(2))[0].parameters), strict=True):
        assert_close("centroids", new, old, "float32")
