"""Evaluations under other settings at the end of a run."""

import json

import jax
import numpy as np
import pytest

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.cli import INTERRUPTED, USAGE_ERROR, main
from sparsejax.data import load_dataset
from sparsejax.model import Functional
from sparsejax.train import loop as loops
from sparsejax.train import read_arrays
from tests.train import runs

PATTERN = "model.layers.local.mixer.pattern"
ALSO = {
    "same": (),
    "short": ("data.length=8",),
    "narrow": (f"{PATTERN}=causal & window(1)", "model.schedule=2x(ssm local) local"),
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("also")
    files = runs.write_text(folder / "text")
    return ["train", f"--config={runs.RECIPE}", f"--config.data.files={files}", "--config.eval.batches=1"]


def test_each_is_the_loss_of_the_same_parameters_under_its_own_settings(arguments, tmp_path, capsys):
    place = write_config(tmp_path, ALSO)
    given = [f"--config={place}", *arguments[2:]]
    assert main(["train", *given, f"--workdir={tmp_path / 'run'}"]) == 0
    assert "validation, narrow: " in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["eval/loss/same"] == found["eval/loss"]
    assert found["eval/bits_per_byte/same"] == found["eval/bits_per_byte"]

    arrays = read_arrays(tmp_path / "run" / "checkpoints", 20)
    common = [one.removeprefix("--config.") for one in arguments[2:]]
    for name in ("short", "narrow"):
        settings = configs.load(str(place), [*common, *ALSO[name]])
        assert found[f"eval/loss/{name}"] == pytest.approx(measure(configs.check(settings), arrays), rel=1e-5)
        assert found[f"eval/loss/{name}"] != found["eval/loss"]


def write_config(folder, given, phases=None):
    place = folder / "config.py"
    place.write_text(
        "from tests.train import recipe\n\n\ndef get_config():\n    config = recipe.get_config()\n"
        f"    config.eval.also = {given!r}\n    config.train.phases = {phases or {}!r}\n    return config\n"
    )
    return place


def measure(config, arrays):
    """The mean loss of all held-out tokens, from logits in NumPy."""
    model = Functional(config.model)
    parameters = jax.tree.map_with_path(
        lambda path, _: arrays["parameters." + jax.tree_util.keystr(path, simple=True, separator=".")], model.shapes
    )
    dataset, losses, weights = load_dataset(config.data), 0.0, 0.0
    for batch in dataset.validation_batches(config.eval.batch):
        logits = np.asarray(model.bind(parameters)(batch["inputs"]), np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        losses += ((np.log(np.exp(logits).sum(axis=-1)) - chosen) * batch["weights"]).sum()
        weights += batch["weights"].sum()
    return losses / weights


def test_they_build_on_the_last_phase(tmp_path):
    phases = {"early": {"start": 0, "set": ["data.length=16"]}, "late": {"start": 10, "set": ["eval.final=1"]}}
    settings = configs.load(str(write_config(tmp_path, ALSO, phases)))
    assert configs.check_also(settings, "same").eval.final == 1
    assert configs.check_also(settings, "same").data.length == 32
    assert configs.check_also(settings, "short").data.length == 8


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"a": ("data.lenght=8",)}, "eval.also.a: data.lenght: unknown key, did you mean 'length'?"),
        ({"a": ("train.seed=1",)}, "eval.also.a: train.seed: an evaluation can only set data.length"),
        ({"a": ("data.length",)}, "eval.also.a: write KEY=VALUE, got 'data.length'"),
        ({"a": ("model.width=8",)}, "eval.also.a: changes the model's parameters: "),
        ({"a": (f"{PATTERN}=windou(3)",)}, "eval.also.a: model.layers.local.mixer"),
        ({"a": ("eval.batch=0",)}, "eval.also.a: eval: batch must be at least 1"),
        ({"a/b": ()}, "eval: also: 'a/b' is no name"),
        ({"a": "data.length=8"}, "eval.also.a: expected a tuple, got 'data.length=8'"),
        ({"a": ("data.length",), "b": 1}, "eval.also.b: expected a tuple, got 1"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_workdir(arguments, tmp_path, capsys, given, expected):
    place = write_config(tmp_path, given)
    code = main(["train", f"--config={place}", *arguments[2:], f"--workdir={tmp_path / 'run'}"])
    assert code == USAGE_ERROR
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "phases", "expected"),
    [
        ({"a": ("eval.batch=3",)}, {}, "eval.also.a: eval.batch: 3 rows do not divide over 2 devices"),
        ({}, {"b": {"start": 9, "set": ["train.batch=3"]}}, "train.phases.b.set: train.batch: a slice of 3 rows does"),
    ],
)
def test_rows_that_do_not_divide_name_who_asks_for_them(
    arguments, tmp_path, capsys, monkeypatch, given, phases, expected
):
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 2)
    place = write_config(tmp_path, given, phases)
    code = main(["train", f"--config={place}", *arguments[2:], f"--workdir={tmp_path / 'run'}"])
    assert code == USAGE_ERROR
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_ended_is_asked_again(arguments, tmp_path, capsys):
    command = [*arguments, f"--workdir={tmp_path / 'run'}"]
    assert main(command) == 0
    before = json.loads((tmp_path / "run" / "result.json").read_text())
    assert main([*command, "--config.eval.also.short=['data.length=8']"]) == 0
    assert "validation, short: " in capsys.readouterr().out
    after = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {name: value for name, value in after.items() if not name.endswith("/short")} == before
    assert after["eval/loss/short"] > 0
    assert main([*command, "--config.eval.also=['data.length=8']"]) == USAGE_ERROR
    assert "eval.also: is a section; set eval.also.NAME" in capsys.readouterr().err
    assert main([*command, "--config.eval.batch=2"]) == USAGE_ERROR
    assert "belongs to another configuration: eval.batch was 4, is 2" in capsys.readouterr().err


def test_a_run_that_is_stopped_among_them_goes_on(arguments, tmp_path, monkeypatch, capsys):
    command = ["train", f"--config={write_config(tmp_path, ALSO)}", *arguments[2:], f"--workdir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:  # a signal that comes with the last checkpoint
        last = tmp_path / "run" / "checkpoints" / "20"
        patch.setattr(loops._StopSignals, "agreed", lambda signals, ask: "SIGTERM" if last.exists() else None)
        assert main(command) == INTERRUPTED
    assert "before the last evaluations" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()
    assert main(command) == 0
    assert "eval/loss/narrow" in json.loads((tmp_path / "run" / "result.json").read_text())
