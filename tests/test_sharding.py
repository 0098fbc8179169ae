"""Sharding of parameters, moments and batches."""

import json
import math

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from sparsejax import sharding
from sparsejax.config import ConfigError, ShardingConfig
from tests.messages import rejects
from tests.train import runs

pytestmark = pytest.mark.quick

SHOW_SHARDS = """
import json, pathlib, jax
from sparsejax import config, sharding
from sparsejax.model import Functional
from sparsejax.runs import build_optimizer, init_state
settings = config.check(config.load("{recipe}", {{"sharding.data": 2, "sharding.fsdp": 2, "sharding.tensor": 2}}))
model = Functional(settings.model)
optimizer = build_optimizer(settings.optimizer, 20, decay=model.decay)
state = init_state(model, optimizer, 0, sharding.make_mesh(settings.sharding))
leaves = jax.tree.leaves_with_path(state.parameters) + jax.tree.leaves_with_path(state.optimizer)
print(json.dumps([
    [jax.tree_util.keystr(path), leaf.shape, leaf.sharding.shard_shape(leaf.shape), len(leaf.addressable_shards)]
    for path, leaf in leaves
]))
"""


def test_eight_devices_hold_a_part_each():
    code, out, err = runs.finish(runs.start(program=("-c", SHOW_SHARDS.format(recipe=runs.RECIPE)), devices=8))
    assert code == 0, err
    shards = {path: (shape, part) for path, shape, part, copies in json.loads(out) if copies == 8}
    embedding = {path: value for path, value in shards.items() if "embedding" in path}
    assert len(embedding) == 3  # the parameter and its two moments
    for shape, part in embedding.values():
        assert (shape, part) == ([256, 16], [128, 8])
    size, held = (sum(math.prod(value[i]) for value in shards.values()) for i in (0, 1))
    assert held < size / 3  # most of the state is split four ways


def test_axes_that_do_not_divide_are_replicated():
    mesh = AbstractMesh((1, 2, 1, 4), sharding.MESH_AXES)
    shapes = {"w": jax.ShapeDtypeStruct((6, 8), "float32"), "odd": jax.ShapeDtypeStruct((7, 6), "float32")}
    axes = {"w": ("width", "ff"), "odd": ("width", "heads")}
    shardings = sharding.parameter_shardings(mesh, shapes, axes)
    assert shardings["w"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings["odd"].spec == PartitionSpec(None, None)


def test_devices_that_share_rows_share_parameters():
    mesh = AbstractMesh((1, 2, 4, 1), sharding.MESH_AXES)
    shapes = {"w": jax.ShapeDtypeStruct((16, 16), "float32"), "few": jax.ShapeDtypeStruct((6, 8), "float32")}
    axes = {"w": ("width", "width"), "few": ("width", "ff")}
    shardings = sharding.parameter_shardings(mesh, shapes, axes)
    assert shardings["w"].spec == PartitionSpec(("fsdp", "sequence"), None)
    assert shardings["few"].spec == PartitionSpec("fsdp", None)


def test_the_mesh_is_made_of_all_devices():
    assert dict(sharding.make_mesh(ShardingConfig(-1, 1, 1)).shape) == {
        "data": 1,
        "fsdp": 1,
        "sequence": 1,
        "tensor": 1,
    }
    with rejects(ConfigError, "sharding"):
        sharding.make_mesh(ShardingConfig(2, 1, 1))
