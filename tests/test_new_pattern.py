"""A new pattern of fifteen lines, through every part of the project."""

import dataclasses
import inspect
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.cli import main
from sparsejax.ops import attend
from sparsejax.patterns import Pattern, PatternError, from_ranges, parse, plan_cache, receptive_field, register
from sparsejax.patterns.base import require
from sparsejax.patterns.testing import check_pattern
from tests.messages import rejects
from tests.tolerances import assert_close
from tests.train import runs

pytestmark = pytest.mark.quick


# fmt: off
@dataclasses.dataclass(frozen=True)
class Older(Pattern):
    """A query attends to the oldest `1 / share` of its past."""
    name: ClassVar[str] = "older"
    share: int
    def __post_init__(self):
        require(self, share=1)
    def allows(self, q, k, t=None, s=None):
        return k * self.share <= q
    def bounds(self, grid):
        first, last = (position // self.share + 1 for position in grid.row_bounds())
        return from_ranges(grid, any_key=(0 * last, last), every_key=(0 * first, first))
# fmt: on


TEXT = "causal & (older(3) | window(2)) - sink(1)"


@pytest.fixture
def new(registries):
    register(Older)
    return parse(TEXT)


def test_definition_of_fifteen_lines():
    assert len(inspect.getsource(Older).splitlines()) <= 15


def test_views(new):
    assert str(new) == TEXT
    q, k = np.arange(200)[:, None], np.arange(170)[None, :]
    expected = (k <= q) & ((3 * k <= q) | (k >= q - 2)) & (k >= 1)
    np.testing.assert_array_equal(new.dense(200, 170), expected)
    for pattern in (Older(2), new):
        check_pattern(pattern, [(200, 170), (33, 45)], [(16, 32), (5, 3)])
    with rejects(PatternError, "column 10: older.share"):
        parse("causal & older(0)")


@pytest.mark.parametrize("impl", ["gather", "segment"])
def test_attention(new, impl):
    arrays = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 200, 2, 8)), jnp.float32)
    assert_close(impl, attend(*arrays, new, impl=impl), attend(*arrays, new, impl="dense"), "float32")


def test_cache_receptive_field_drawing_and_training(new, tmp_path, capsys):
    plan = plan_cache(new, 50)
    assert (plan.count, len(set(plan.slots.tolist()))) == (50, 50)  # without last_query every key is kept
    # The oldest third without the sink, and three steps of two keys back.
    assert receptive_field.sizes([new] * 3, 100)[-1] == 33 + 7
    assert main(["draw", TEXT, "--length=9", f"--out={tmp_path / 'new.svg'}"]) == 0
    assert (tmp_path / "new.svg").stat().st_size > 1000
    flags = [f"--config={runs.RECIPE}", f"--config.model.layers.local.mixer.pattern={TEXT}"]
    assert main(["show", *flags]) == 0
    assert TEXT in capsys.readouterr().out
    files = runs.write_text(tmp_path / "text")
    flags += [f"--config.data.files={files}", "--config.train.steps=2", f"--workdir={tmp_path / 'run'}"]
    assert main(["train", *flags]) == 0
