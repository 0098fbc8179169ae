"""What cannot be sharded is refused by name."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from sparsejax import config as configs
from sparsejax import patterns, sharding
from sparsejax.config import ConfigError
from sparsejax.errors import InputError
from sparsejax.ops import ImplementationError, attend, top_tokens
from tests.messages import rejects
from tests.train import runs

pytestmark = pytest.mark.quick

REFORMER = Path(__file__).parents[2] / "configs" / "reformer_duplication.py"


@pytest.fixture
def two_shards():
    mesh = AbstractMesh((2,), ("sequence",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.mark.parametrize(
    ("length", "impl", "argument"), [(33, "auto", "q"), (32, "tpu", "impl"), (32, "cudnn", "impl")]
)
def test_attention_is_refused(two_shards, length, impl, argument):
    q = jnp.zeros((1, length, 2, 8))
    with rejects(InputError, argument):
        attend(q, q, q, "causal", impl=impl)


@pytest.mark.parametrize("impl", ["ring", "tpu"])
def test_selected_keys_are_refused(two_shards, impl):
    def select_and_attend(q):
        selection = top_tokens(q, q, 2, patterns.Causal())
        return attend(q, q, q, "causal", selection=selection, impl=impl, interpret=impl == "tpu")

    with rejects(ImplementationError, "impl"):
        jax.eval_shape(select_and_attend, jnp.zeros((1, 32, 2, 8)))


def test_a_mixer_that_sorts_rows_is_refused():
    model = configs.check(configs.load(str(REFORMER))).model
    name = model.names[0]
    model.check_sharded(32, 1)
    with rejects(InputError, f"layers.{name}.mixer"):
        model.check_sharded(32, 2)


@pytest.mark.parametrize("keys", [{"data": 2}, {"sequence": 3}], ids=lambda keys: next(iter(keys)))
def test_a_mesh_of_another_size_is_refused(keys):
    sizes = {"data": -1, "fsdp": 1, "tensor": 1} | keys
    with rejects(ConfigError, "sharding"):
        sharding.make_mesh(configs.ShardingConfig(**sizes))


def test_show_refuses_a_length_that_the_shards_do_not_divide(capsys):
    from sparsejax.cli import main

    arguments = ["show", f"--config={runs.RECIPE}", "--config.sharding.sequence=5", "--length=32"]
    assert main(arguments) == 2
    assert "length: 32 tokens cannot be split evenly over sharding.sequence = 5 devices" in capsys.readouterr().err
