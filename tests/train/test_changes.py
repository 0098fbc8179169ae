"""A run resumes with every change that changes no number, and with more steps if it is extended."""

import shutil

import numpy as np
import pytest

from sparsejax import config as configs
from sparsejax.config import ConfigError
from sparsejax.runs import read_arrays
from sparsejax.train import find_change
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.messages import rejects
from tests.train import runs

HARMLESS = {
    "data.cache": "/another/cache",
    "train.log_every": 7,
    "eval.every": 2,
    "checkpoint.every": 4,
    "checkpoint.keep_last": 3,
    "checkpoint.keep_best": 0,
    "model.layers.full.remat": "full",
    "model.layers.local.mixer.impl": "dense",
    "model.scan": False,
    "train.bad_loss": "skip",
    "eval.sample": 0,
    "sharding.fsdp": 2,
}


def change(overrides, base=None):
    """The changes between the recipe and the recipe with overrides."""
    old, new = (
        configs.load(str(runs.RECIPE), settings).to_dict() for settings in (base or {}, (base or {}) | overrides)
    )
    return configs.find_changes(old, new)


@pytest.mark.parametrize("key", HARMLESS)
def test_what_changes_no_number_may_change(key):
    changes = change({key: HARMLESS[key]})
    assert [item.key for item in changes] == [key] * (key != "eval.sample")
    assert all(item.effect in configs.EFFECTS for item in changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.width", 32),
        ("train.steps", 40),
        ("train.batch", 8),
        ("train.seed", 1),
        ("optimizer.learning_rate", 1.0),
        ("model.dtype", "bfloat16"),
        ("model.layers.local.mixer.pattern", "causal"),
        ("data.length", 16),
        ("eval.batch", 2),
        ("data.tokenizer", "chars"),
    ],
)
def test_what_changes_numbers_may_not(key, value):
    (item,) = change({key: value})
    assert (item.key, item.effect) == (key, None)


def test_microbatches_draw_dropout_masks_of_their_own():
    assert change({"train.accumulate": 2})[0].effect == "rounding"
    assert change({"train.accumulate": 2}, {"model.dropout": 0.1})[0].effect is None


def test_a_phase_follows_the_same_rule():
    base = {"train.phases.late.start": 10, "train.phases.late.set.model.scan": True}
    changes = change({"train.phases.late.set.model.scan": False}, base)
    assert [(item.key, item.effect) for item in changes] == [("train.phases.late.set.model.scan", "rounding")]
    changes = change({"train.phases.late.set.data.length": 16}, base)
    assert [item.effect for item in changes] == [None]


@pytest.fixture
def workdir(trained, tmp_path):
    return Workdir(shutil.copytree(trained[0], tmp_path / "run"))


def test_a_run_resumes_on_a_moved_text(workdir, text, tmp_path):
    moved = shutil.copytree(text, tmp_path / "moved")
    rows = workdir.metrics.read_bytes()
    printed = runs.train_here(runs.load(moved, runs.TRAINED | {"train.log_every": 5}), workdir.path)
    assert f"data.files was '{text}', is '{moved}': changes no number\n" in printed
    assert "train.log_every was 1, is 5: changes no number\n" in printed
    assert workdir.metrics.read_bytes() == rows
    assert read_json(workdir.config)["data"]["files"] == str(moved)
    assert read_json(workdir.versions)[-1]["changes"] == {
        "data.files": [str(text), str(moved)],
        "train.log_every": [1, 5],
    }
    assert "changes" not in read_json(workdir.versions)[0]


def test_a_run_does_not_resume_on_another_text(workdir, text, tmp_path):
    other = shutil.copytree(text, tmp_path / "other")
    (other / "0.txt").write_text("another text")
    before = workdir.config.read_bytes()
    with rejects(ConfigError, "data.files"):
        runs.train_here(runs.load(other, runs.TRAINED), workdir.path)
    assert workdir.config.read_bytes() == before


def test_what_may_change_is_part_of_the_error(workdir, text):
    settings = runs.load(text, runs.TRAINED | {"model.width": 32})
    with rejects(ConfigError, "checkpoint.keep_last"):
        runs.train_here(settings, workdir.path)
    assert "model.width was 16, is 32" in str(find_change(workdir.path, settings))


def test_more_steps_need_an_extension(workdir, text, tmp_path):
    """The extended run follows the schedule of its new length, also with another layout of its parameters."""
    with rejects(ConfigError, "train.steps was 20, is 24"):
        runs.train_here(runs.load(text, runs.TRAINED | {"train.steps": 24}), workdir.path)
    with rejects(ConfigError, "train.steps was 20, is 16"):
        runs.train_here(runs.load(text, runs.TRAINED | {"train.steps": 16}), workdir.path, extend=True)
    unrolled = Workdir(shutil.copytree(workdir.path, tmp_path / "unrolled"))
    for folder, scan in ((workdir, True), (unrolled, False)):
        settings = runs.load(text, runs.TRAINED | {"train.steps": 24, "model.scan": scan})
        printed = runs.train_here(settings, folder.path, extend=True)
        assert "train.steps was 20, is 24: the cosine schedule now ends at step 24" in printed
        assert ("model.scan was True, is False: changes rounding only" in printed) is not scan
    rows, others = (read_rows(folder.metrics) for folder in (workdir, unrolled))
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, 25))
    rates = [row["train/learning_rate"] for row in rows]
    assert rates[20] > rates[19]
    assert rates[23] == pytest.approx(1e-3, rel=0.2)
    for row, other in zip(rows[20:], others[20:], strict=True):
        assert other["train/loss"] == pytest.approx(row["train/loss"], rel=1e-4)
    scanned, flat = (read_arrays(folder.checkpoints, 24) for folder in (workdir, unrolled))
    assert scanned.keys() != flat.keys()
    np.testing.assert_allclose(flat["parameters.embedding.tokens"], scanned["parameters.embedding.tokens"], atol=1e-4)
    assert read_json(workdir.result)["step"] == 24
