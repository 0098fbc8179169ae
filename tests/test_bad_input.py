"""Whatever is given wrong is said in one line that names it, with exit code 2, and nothing is written."""

import json
import shutil
from types import SimpleNamespace

import pytest

from sparsejax.cli import BAD_LOSS, USAGE_ERROR, main
from sparsejax.train import list_steps, read_rows
from tests.train import runs


@pytest.fixture
def text(tmp_path):
    return runs.write_text(tmp_path / "text")


def arguments(text, workdir, *more):
    return ["train", f"--config={runs.RECIPE}", f"--config.data.files={text}", f"--workdir={workdir}", *more]


def complain(capsys, given):
    """The one line on stderr."""
    assert main(given) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("sparsejax: ")
    return err


CASES = {
    "--config.model.widht=8": ["model.widht", "did you mean 'width'"],
    "--config.modle.width=8": ["modle", "did you mean 'model'"],
    "--config.train.steps=many": ["train.steps", "expected an integer"],
    "--config.model.tied=3": ["model.tied", "true or false"],
    "--config.optimizer.clip=none": ["optimizer.clip", "expected a number"],
    "--config.model.schedule=2x(ssm loca)": ["layer 'loca' is not defined", "did you mean 'local'"],
    "--config.model.schedule=2x(ssm local": ["column 1", "never closed"],
    "--config.model.layers.local.mixer.pattern=causal & (window(3)": ["model.layers.local.mixer", "column 10"],
    "--config.model.layers.local.mixer.pattern=window(3, 3)": ["local.mixer.pattern", "ahead"],
    "--config.model.layers.local.mixer.pattern=causal & (sink(2) | globals([32]))": [
        "model.layers.local.mixer.pattern",
        "column 21",
        "token 32 lies outside",
    ],
    "--config.model.layers.full.mixer.heads=3": ["model.layers.full.mixer", "heads = 3", "kv_heads = 2"],
    "--config.data.length=100000": ["data.length"],
    "--config.sharding.fsdp=3": ["sharding", "fsdp 3"],
    "--config.train.accumulate=3": ["train", "accumulate = 3"],
}


@pytest.mark.parametrize("override", CASES)
def test_bad_configuration_is_named(override, text, tmp_path, capsys):
    more = ["--config.model.layers.full.mixer.kv_heads=2"] if "heads=3" in override else []
    line = complain(capsys, arguments(text, tmp_path / "run", *more, override))
    for part in CASES[override]:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_missing_and_empty_data_are_named(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for name in ("absent", "empty.txt", "folder"):
        line = complain(capsys, arguments(tmp_path / name, tmp_path / "run"))
        assert "data.files" in line
        assert name in line
        assert not (tmp_path / "run").exists()


def test_validation_shorter_than_a_window_is_named(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("x" * 400)
    line = complain(capsys, arguments(tmp_path / "short.txt", tmp_path / "run"))
    assert "data.length" in line
    assert "validation" in line


def test_bad_command_lines_are_one_line(text, tmp_path, capsys):
    assert "absent.py" in complain(capsys, ["train", "--config=absent.py", f"--workdir={tmp_path / 'run'}"])
    assert "--workdir" in complain(capsys, ["train", f"--config={runs.RECIPE}"])
    assert "fly" in complain(capsys, ["fly"])
    for verb in (["show"], ["train", f"--workdir={tmp_path / 'run'}"]):
        assert "required: --config" in complain(capsys, verb)
    assert "complexity" in complain(capsys, ["show", "--table=depth"])
    assert "--config cannot" in complain(capsys, ["show", "--table=complexity", "--config.model.width=8"])
    assert "--measure" in complain(capsys, ["show", f"--config={runs.RECIPE}", "--measure"])
    assert "--length: must be at least 1" in complain(capsys, ["show", "--table=complexity", "--length=0"])
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    line = complain(capsys, ["train", f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'run'}"])
    assert "broken.py: line 1: SyntaxError" in line


def test_workdir_of_another_configuration_is_refused(text, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main(arguments(text, workdir, "--config.train.steps=5")) == 0
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    capsys.readouterr()
    line = complain(capsys, arguments(text, workdir, "--config.train.steps=6"))
    assert "train.steps was 5, is 6" in line
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").touch()
    assert "not empty" in complain(capsys, arguments(text, stranger))


def test_a_workdir_older_than_some_features_goes_on(text, tmp_path):
    workdir, more = tmp_path / "run", ["--config.train.steps=5"]
    assert main(arguments(text, workdir, *more)) == 0
    place = workdir / "config.json"
    config = json.loads(place.read_text())
    del config["data"]["packing"], config["data"]["mask"], config["eval"]["stride"], config["model"]["head"]["pool"]
    place.write_text(json.dumps(config))
    assert main(arguments(text, workdir, *more)) == 0
    assert json.loads(place.read_text())["eval"]["stride"] == 0


def test_damaged_checkpoint_is_named_and_the_one_before_it_serves(text, tmp_path, capsys):
    workdir, more = tmp_path / "run", ["--config.train.steps=10"]
    assert main(arguments(text, workdir, *more)) == 0
    for path in (workdir / "checkpoints" / "10" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    capsys.readouterr()
    line = complain(capsys, arguments(text, workdir, *more))
    assert str(workdir / "checkpoints" / "10") in line
    shutil.rmtree(workdir / "checkpoints" / "10")
    assert main(arguments(text, workdir, *more)) == 0
    assert "at step 5" in capsys.readouterr().out


def test_full_disk_is_named(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line = complain(capsys, arguments(text, tmp_path / "run", "--config.train.steps=5"))
    assert "no space left on the workdir's disk" in line


def test_bad_loss_stops_with_a_checkpoint_or_is_skipped(text, tmp_path, capsys):
    spike = ["--config.train.spike=0.5", "--config.train.steps=5"]  # every loss after the first is a spike
    assert main(arguments(text, tmp_path / "stop", *spike)) == BAD_LOSS
    assert capsys.readouterr().err.count("\n") == 1
    assert list_steps(tmp_path / "stop" / "checkpoints") == [3]  # noticed one step late
    assert main(arguments(text, tmp_path / "skip", *spike, "--config.train.bad_loss=skip")) == 0
    rows = read_rows(tmp_path / "skip" / "metrics.jsonl")
    assert [row["train/skipped"] for row in rows] == [0, 1, 2, 3, 4]


def test_show_trains_nothing_and_adds_up(capsys):
    assert main(["show", f"--config={runs.RECIPE}", "--length=64"]) == 0
    out = capsys.readouterr().out
    assert out.count("mamba") == 2
    assert out.count("window(5) | sink(2)") == 2
    assert f"{2 * 64 * 65 // 2:,}" in out  # causal pairs of two heads


def test_train_warns_as_it_starts(text, tmp_path, capsys):
    assert main(arguments(text, tmp_path / "run", "--config.train.steps=5", "--config.model.schedule=local")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert line.startswith("warning: layer 0 (local): position 31 is reached by 8 of the 32 inputs")
