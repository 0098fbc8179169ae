"""The verb, up to where runs start: what it prints, records and refuses."""

import json
from pathlib import Path

import pytest

from sparsejax.cli import main
from sparsejax.sweep import read_record
from sparsejax.workdir import SweepFolder

RECIPE = Path(__file__).parents[1] / "train" / "recipe.py"


@pytest.fixture
def sweep(tmp_path, capsys):
    """Calls the verb in this process; returns the exit code and the lines on stdout and stderr."""

    def call(axes, *arguments, config=RECIPE, folder=tmp_path / "sweep"):
        code = main(["sweep", f"--config={config}", f"--sweep={axes}", f"--workdir={folder}", *arguments])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return call


def finish(folder, runs):
    """As if all runs of a sweep had ended."""
    for name in runs:
        (folder / "runs" / name).mkdir(parents=True)
        SweepFolder(folder).workdir(name).result.write_text("{}")


def test_print_starts_nothing(sweep, tmp_path):
    code, out, err = sweep("seed=range(2);train.steps=[5, 6]", "--print", "--config.train.batch=2")
    assert (code, err, len(out)) == (0, [], 4)
    assert out[0].startswith(f"python -m sparsejax train --config={RECIPE} --config.train.batch=2 ")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("axes", "arguments", "message"),
    [
        ("train.stepps=[5]", (), "stepps=5: train.stepps: unknown key, did you mean 'steps'?"),
        ("train.steps=[5]", ("--config.train.sed=1",), "steps=5: train.sed: unknown key, did you mean 'seed'?"),
        ("train.steps=[5]", ("--config.train.seed",), "--config.train.seed: write --config.train.seed=VALUE"),
        ("train.steps=[5, 60]", ("--max-steps=50",), "steps=60: train.steps is 60, more than --max-steps=50"),
        ("train.steps", (), "--sweep: write KEY=[VALUE, ...], got 'train.steps'"),
        ("train.steps=[5]", ("--jobs=0",), "--jobs: at least 1, got 0"),
        ("train.steps=[5]", ("--slurm.partition=main",), "--slurm.partition: goes with sweep --launcher=slurm"),
        ("none.py", (), "--sweep: no file 'none.py'"),
    ],
)
def test_what_cannot_be_used_fails_before_the_first_run(sweep, tmp_path, axes, arguments, message):
    assert sweep(axes, *arguments) == (2, [], [f"sparsejax: {message}"])
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_finished_runs_runs_nothing_and_is_recorded(sweep, tmp_path):
    folder = tmp_path / "sweep"
    names = [line.rpartition("/")[2] for line in sweep("seed=range(3)", "--print")[1]]
    finish(folder, names)
    assert sweep("seed=range(2)") == (0, ["2 of 2 runs done"], [])
    assert sweep("train.seed=[2, 1]") == (0, ["2 of 2 runs done"], [])
    record = read_record(folder)
    assert record == json.loads((folder / "sweep.json").read_text())
    assert record["config"] == str(RECIPE)
    assert record["sweeps"] == ["seed=range(2)", "train.seed=[2, 1]"]
    assert list(record["runs"]) == names
    assert record["runs"][names[2]] == {"label": "config", "seed": 2, "overrides": {"train.seed": 2}}


def test_a_folder_belongs_to_one_config(sweep, tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    finish(folder, [line.rpartition("/")[2] for line in sweep("seed=[0]", "--print")[1]])
    assert sweep("seed=[0]")[0] == 0
    other = tmp_path / "other.py"
    other.write_text(RECIPE.read_text())
    message = f"sparsejax: --workdir: {folder} is a sweep of {RECIPE}, not of {other}"
    assert sweep("seed=[0]", config=other) == (2, [], [message])
    monkeypatch.chdir(RECIPE.parent)
    assert sweep("seed=[0]", config="recipe.py")[0] == 0  # the same file


def test_a_config_that_has_changed_since(sweep, tmp_path):
    config, folder = tmp_path / "config.py", tmp_path / "sweep"
    config.write_text(RECIPE.read_text())
    (line,) = sweep("seed=[0]", "--print", config=config)[1]
    workdir = folder / "runs" / line.rpartition("/")[2]
    workdir.mkdir(parents=True)
    settings = {"sharding": {"data": 8, "fsdp": 1, "tensor": 1}}
    from sparsejax import config as configs

    recorded = configs.load(str(config), {"train.seed": 0}).to_dict()
    (workdir / "config.json").write_text(json.dumps(recorded | settings))
    assert sweep("seed=[0]", "--print", config=config)[0] == 0  # other devices are no other run
    config.write_text(RECIPE.read_text().replace('"batch": 4', '"batch": 2', 1))
    message = f"config: {workdir} was started with another configuration: train.batch was 4, is 2"
    assert sweep("seed=[0]", config=config) == (2, [], [f"sparsejax: {message}"])


def test_a_damaged_record(sweep, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    code, _, err = sweep("seed=[0]")
    assert code == 2
    assert "sweep.json is damaged" in err[0]
