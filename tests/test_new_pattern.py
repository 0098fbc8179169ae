"""A pattern that is new: what fifteen lines of one file are enough for."""

import dataclasses
import inspect
from typing import ClassVar

import numpy as np
import pytest

from sparsejax.cli import main
from sparsejax.ops import attend
from sparsejax.patterns import NAMES, Pattern, from_ranges, parse, plan_cache, receptive_field
from sparsejax.patterns.base import require
from tests.patterns.test_layout import check
from tests.tolerances import assert_close
from tests.train import runs


# fmt: off
@dataclasses.dataclass(frozen=True)
class Older(Pattern):
    """A query looks at the oldest share of its past: the first of every `share` keys before it, and itself."""
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
def new(monkeypatch):
    monkeypatch.setitem(NAMES, Older.name, Older)
    return parse(TEXT)


def test_it_takes_fifteen_lines():
    assert len(inspect.getsource(Older).splitlines()) <= 15


def test_it_is_text_mask_layout_and_count(new):
    assert str(new) == TEXT
    q, k = np.arange(200)[:, None], np.arange(170)[None, :]
    expected = (k <= q) & ((3 * k <= q) | (k >= q - 2)) & (k >= 1)
    np.testing.assert_array_equal(new.dense(200, 170), expected)
    check(new.layout(200, 170, (16, 32)), expected, (16, 32))
    assert new.pairs(200, 170) == expected.sum()
    np.testing.assert_array_equal(new.edges(200, 170), np.nonzero(expected))
    assert parse("shift(older(2), 3)").pairs(90) == parse("shift(older(2), 3)").dense(90).sum()
    with pytest.raises(ValueError, match="column 10: older: share must be an integer >= 1, got 0"):
        parse("causal & older(0)")


@pytest.mark.parametrize("impl", ["gather", "segment"])
def test_it_is_computed(new, impl):
    arrays = np.random.default_rng(0).normal(size=(3, 1, 200, 2, 8)).astype(np.float32)
    assert_close(impl, attend(*arrays, new, impl=impl), attend(*arrays, new, impl="dense"), "float32")


def test_it_is_cached_reached_drawn_and_trained(new, tmp_path, capsys):
    slots, count = plan_cache(new, 50)
    assert (count, len(set(slots.tolist()))) == (50, 50)  # it says nothing of when a key can be forgotten
    assert receptive_field.sizes([new] * 3, 100)[-1] == 33 + 7  # the oldest third without the sink; three steps of two back
    assert main(["draw", TEXT, "--length=9", f"--out={tmp_path / 'new.svg'}"]) == 0
    assert (tmp_path / "new.svg").stat().st_size > 1000
    given = [f"--config={runs.RECIPE}", f"--config.model.layers.local.mixer.pattern={TEXT}"]
    assert main(["show", *given]) == 0
    assert TEXT in capsys.readouterr().out
    files = runs.write_text(tmp_path / "text")
    given += [f"--config.data.files={files}", "--config.train.steps=2", f"--workdir={tmp_path / 'run'}"]
    assert main(["train", *given]) == 0
