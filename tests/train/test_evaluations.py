"""Evaluations under other settings at the end of a run."""

import json
import shutil

import jax
import numpy as np
import pytest

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.config import ConfigError
from sparsejax.data import load_dataset
from sparsejax.model import Functional
from sparsejax.runs import plan_evaluations, plan_phases, read_arrays
from sparsejax.signals import Interrupted
from sparsejax.train.interruption import StopRequests
from sparsejax.workdir import Workdir
from tests.messages import rejects
from tests.train import recipe, runs

PATTERN = "model.layers.local.mixer.pattern"


def read_result(workdir):
    return json.loads(Workdir(workdir).result.read_text())


def test_each_is_the_loss_of_the_same_parameters_under_its_setting(trained, text):
    workdir, printed = trained
    result = read_result(workdir)
    assert "validation, narrow: " in printed
    assert result["eval/loss/same"] == result["eval/loss"]
    assert result["eval/bits_per_byte/same"] == result["eval/bits_per_byte"]
    arrays = read_arrays(Workdir(workdir).checkpoints, 20)
    for name in ("short", "narrow"):
        config = configs.check(runs.load(text, runs.ALSO[name]))
        assert result[f"eval/loss/{name}"] == pytest.approx(measure(config, arrays), rel=1e-5)
        assert result[f"eval/loss/{name}"] != result["eval/loss"]


def measure(config, arrays):
    """The mean loss of all validation tokens, from logits in NumPy."""
    model = Functional(config.model)
    parameters = jax.tree.map_with_path(
        lambda path, _: arrays["parameters." + jax.tree_util.keystr(path, simple=True, separator=".")], model.shapes
    )
    forward = jax.jit(lambda p, tokens: model.bind(p)(tokens))
    dataset, losses, weights = load_dataset(config.data), 0.0, 0.0
    for batch in dataset.validation_batches(config.eval.batch):
        logits = np.asarray(forward(parameters, batch["inputs"]), np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        targets = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        losses += ((np.log(np.exp(logits).sum(axis=-1)) - targets) * batch["weights"]).sum()
        weights += batch["weights"].sum()
    return losses / weights


def test_a_setting_starts_from_the_last_phase(text):
    overrides = {"train.phases.early.start": 0, "train.phases.early.set.data.length": 16}
    overrides |= {"train.phases.late.start": 10, "train.phases.late.set.eval.final": 1}
    overrides |= {"eval.also.short.data.length": 8, "eval.also.strided.eval.stride": 4}
    short, strided = plan_evaluations(runs.load(text, overrides))
    assert (short.config.data.length, short.config.eval.final) == (8, 1)
    assert (strided.config.data.length, strided.config.eval.final) == (32, 1)
    assert short.overrides == {"data.length": 8}


@pytest.mark.parametrize(
    ("also", "key"),
    [
        pytest.param({"a": {"data": {"lenght": 8}}}, "eval.also.a.data.lenght", id="unknown"),
        pytest.param({"a": {"train": {"seed": 1}}}, "eval.also.a.train.seed", id="not allowed"),
        pytest.param({"a": {"model": {"width": 8}}}, "eval.also.a", id="parameters"),
        pytest.param(
            {"a": {"model": {"layers": {"local": {"mixer": {"pattern": "windou(3)"}}}}}}, "eval.also.a", id="pattern"
        ),
        pytest.param({"a": {"eval": {"batch": 0}}}, "eval.also.a.eval.batch", id="value"),
        pytest.param({"a/b": {}}, "eval.also", id="name"),
        pytest.param({"a": "data.length=8"}, "eval.also.a", id="text"),
        pytest.param({"a": {}, "b": 1}, "eval.also.b", id="number"),
    ],
)
def test_an_invalid_setting_is_named(also, key):
    config = recipe.get_config()
    config.eval.also = also
    with rejects(ConfigError, key):
        plan_evaluations(config)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        pytest.param({"eval.also.a.eval.batch": 3}, "eval.also.a.eval.batch", id="evaluation"),
        pytest.param(
            {"train.phases.b.start": 9, "train.phases.b.set.train.batch": 3},
            "train.phases.b.set.train.batch",
            id="phase",
        ),
        pytest.param({"train.batch": 3}, "train.batch", id="run"),
    ],
)
def test_rows_that_do_not_divide_name_their_setting(text, tmp_path, monkeypatch, overrides, key):
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 2)
    with rejects(ConfigError, key):
        runs.train_here(runs.load(text, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_ended_is_evaluated_again(trained, text, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    before = read_result(workdir)
    settings = runs.load(text, runs.TRAINED | {"eval.also.strided.eval.stride": 8})
    assert "validation, strided: " in runs.train_here(settings, workdir)
    after = read_result(workdir)
    assert {name: value for name, value in after.items() if not name.endswith("/strided")} == before
    assert after["eval/loss/strided"] > 0
    with rejects(ConfigError, "workdir"):
        runs.train_here(runs.load(text, runs.TRAINED | {"eval.batch": 2}), workdir)


def test_a_run_that_is_stopped_among_them_resumes(trained, text, tmp_path, monkeypatch):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    result = read_result(workdir)
    Workdir(workdir).result.unlink()
    settings = runs.load(text, runs.TRAINED)
    with monkeypatch.context() as patch:
        patch.setattr(StopRequests, "poll", lambda self, work: "SIGTERM" if work == "evaluation short" else None)
        with rejects(Interrupted, "SIGTERM"):
            runs.train_here(settings, workdir)
    assert not Workdir(workdir).result.exists()
    runs.train_here(settings, workdir)
    assert read_result(workdir) == result


def test_a_run_without_settings_has_none(text):
    assert plan_evaluations(runs.load(text)) == []
    assert [phase.key for phase in plan_phases(runs.load(text))] == [""]
