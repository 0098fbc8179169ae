"""The verb, up to where runs start: what it prints, records and refuses."""

import json
from pathlib import Path

import pytest

from sparsejax.cli import main
from sparsejax.workdir import SweepFolder
from tests.messages import check_message

pytestmark = pytest.mark.quick

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
    """Marks all runs of a sweep as ended."""
    for name in runs:
        workdir = SweepFolder(folder).workdir(name)
        workdir.path.mkdir(parents=True)
        workdir.result.write_text("{}")


def test_print_starts_nothing(sweep, tmp_path):
    code, out, err = sweep("seed=range(2);train.steps=[5, 6]", "--print", "--config.train.batch=2")
    assert (code, err, len(out)) == (0, [], 4)
    assert out[0].startswith(f"sparsejax train --config={RECIPE} --config.train.batch=2 ")
    assert not (tmp_path / "sweep").exists()


INVALID = {
    "key": ("train.stepps=[5]",),
    "common_key": ("train.steps=[5]", "--config.train.sed=1"),
    "no_value": ("train.steps=[5]", "--config.train.seed"),
    "max_steps": ("train.steps=[5, 60]", "--max-steps=50"),
    "axes": ("train.steps",),
    "jobs": ("train.steps=[5]", "--jobs=0"),
    "slurm": ("train.steps=[5]", "--slurm.partition=main"),
    "file": ("none.py",),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_reported_before_the_first_run(sweep, tmp_path, case):
    code, out, err = sweep(*INVALID[case])
    assert (code, out, len(err)) == (2, [], 1)
    check_message(err[0])
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_finished_runs_runs_nothing_and_is_recorded(sweep, tmp_path):
    folder = tmp_path / "sweep"
    names = [line.rpartition("/")[2] for line in sweep("seed=range(3)", "--print")[1]]
    finish(folder, names)
    assert sweep("seed=range(2)") == (0, ["2 of 2 runs done"], [])
    assert sweep("train.seed=[2, 1]") == (0, ["2 of 2 runs done"], [])
    record = SweepFolder(folder).read()
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
    code, out, (message,) = sweep("seed=[0]", config=other)
    assert (code, out) == (2, [])
    check_message(message)
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
    assert sweep("seed=[0]", "--print", config=config)[0] == 0  # a run may move to other devices
    config.write_text(RECIPE.read_text().replace('"batch": 4', '"batch": 2', 1))
    code, out, (message,) = sweep("seed=[0]", config=config)
    assert (code, out) == (2, [])
    assert "train.batch was 4, is 2" in message


def test_a_damaged_record(sweep, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    code, _, err = sweep("seed=[0]")
    assert code == 2
    assert str(SweepFolder(tmp_path / "sweep").record) in err[0]
