"""Invalid input ends in one line on stderr that names the key, in exit code 2, and nothing is written."""

import json
import shutil
from types import SimpleNamespace

import pytest

from sparsejax.cli import LOSS_DIVERGED, USAGE_ERROR, main
from sparsejax.overrides import write_overrides
from sparsejax.runs import list_steps
from sparsejax.workdir import read_rows
from tests.messages import check_message
from tests.train import runs


@pytest.fixture
def text(tmp_path):
    return runs.write_text(tmp_path / "text")


def arguments(text, workdir, *options):
    return ["train", f"--config={runs.RECIPE}", f"--config.data.files={text}", f"--workdir={workdir}", *options]


def reject(capsys, command, key):
    """Expects one line on stderr that has the key, and compares it with the golden file."""
    assert main(command) == USAGE_ERROR
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert line.startswith("sparsejax: ")
    assert key in line, line
    check_message(line.rstrip("\n"))


LOCAL, FULL = "model.layers.local.mixer", "model.layers.full.mixer"
CASES = {
    "unknown": ({"model.widht": "8"}, "model.widht"),
    "unknown-section": ({"modle.width": "8"}, "modle"),
    "integer": ({"train.steps": "many"}, "train.steps"),
    "boolean": ({"model.tied": "3"}, "model.tied"),
    "number": ({"optimizer.learning_rate": "none"}, "optimizer.learning_rate"),
    "kind": ({f"{FULL}.kind": "mamba"}, f"{FULL}.kind"),
    "layers": ({"model.schedule": "10000000000000x(local)"}, "model.schedule"),
    "product": ({f"{LOCAL}.pattern": "causal & dilated(8, 1073741824, stride=2)"}, f"{LOCAL}.pattern"),
    "layer": ({"model.schedule": "2x(ssm loca)"}, "model.schedule"),
    "schedule": ({"model.schedule": "2x(ssm local"}, "model.schedule"),
    "pattern": ({f"{LOCAL}.pattern": "causal & (window(3)"}, f"{LOCAL}.pattern"),
    "lookahead": ({f"{LOCAL}.pattern": "window(3, 3)"}, f"{LOCAL}.pattern"),
    "globals": ({f"{LOCAL}.pattern": "causal & (sink(2) | globals([32]))"}, f"{LOCAL}.pattern"),
    "heads": ({f"{FULL}.kv_heads": "2", f"{FULL}.heads": "3"}, f"{FULL}.heads"),
    "length": ({"data.length": "100000"}, "data.length"),
    "mesh": ({"sharding.fsdp": "3"}, "sharding"),
    "accumulate": ({"train.accumulate": "3"}, "train.batch"),
    "phase": ({"train.phases.long.set.train.batch": "8"}, "train.phases.long.start"),
    "evaluation": ({"eval.also.long.data.lenght": "8"}, "eval.also.long.data.lenght"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_configuration_is_named(case, text, tmp_path, capsys):
    overrides, key = CASES[case]
    options = [f"--config.{override}" for override in write_overrides(overrides)]
    reject(capsys, arguments(text, tmp_path / "run", *options), key)
    assert not (tmp_path / "run").exists()


def test_missing_and_empty_data_are_named(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for name in ("absent", "empty.txt", "folder"):
        reject(capsys, arguments(tmp_path / name, tmp_path / "run"), "data.files")
        assert not (tmp_path / "run").exists()


def test_validation_text_shorter_than_a_window_is_named(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("x" * 400)
    reject(capsys, arguments(tmp_path / "short.txt", tmp_path / "run"), "data.length")


BAD_COMMANDS = {
    "verb": (["fly"], "argument VERB"),
    "no-verb": ([], "VERB"),
    "option": (["train", f"--config={runs.RECIPE}", "--workdri=run", "--workdir=run"], "unrecognized arguments"),
    "file": (["train", "--config=absent.py", "--workdir=run"], "--config"),
    "no-workdir": (["train", f"--config={runs.RECIPE}"], "--workdir"),
    "no-config": (["train", "--workdir=run"], "--config"),
    "no-value": (["train", f"--config={runs.RECIPE}", "--workdir=run", "--config.train.steps"], "train.steps"),
    "swallowed": (
        ["train", f"--config={runs.RECIPE}", "--config.train.steps", "--workdir=run"],
        "--config.train.steps",
    ),
    "spaces": (["train", f"--config={runs.RECIPE}", "--config.train.steps", "=", "3"], "--config.train.steps"),
    "no-key": (["train", f"--config={runs.RECIPE}", "--config.=3", "--workdir=run"], "--config."),
    "no-out": (["draw", "causal", "--out", "--tile=8"], "--out"),
    "near-verb": (["trian"], "'train'"),
    "near-data-verb": (["data", "fetc"], "'fetch'"),
    "corpus": (["data", "fetch", "nothing"], "argument NAME"),
    "no-integer": (["draw", "causal", "--length=1.5"], "--length"),
    "measure": (["show", f"--config={runs.RECIPE}", "--complexity"], "--complexity"),
    "data": (["data"], "VERB"),
    "data-verb": (["data", "fly"], "argument VERB"),
    "draw": (["draw"], "--config"),
    "draw-pattern": (["draw", "causl", "--length=8"], "pattern"),
    "draw-config": (["draw", "causal", f"--config={runs.RECIPE}"], "--config"),
    "draw-override": (["draw", "causal", "--length=8", "--config.model.width=8"], "--config"),
    "draw-titles": (["draw", "causal", "--length=8", "--titles=a,b"], "--titles"),
    "preset": (["train", "--config=preset:jambo", "--workdir=run"], "--config"),
    "import": (["draw", "causal", "--import=absent.py"], "--import"),
    "encoding": (["sweep", "--sweep=label=\udcff", "--workdir=s"], "not UTF-8"),
    "report-override": (["report", "run", "--config.model.width=8"], "unrecognized arguments"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_line_is_one_line(case, capsys, monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: SimpleNamespace(columns=80, lines=24))
    reject(capsys, *BAD_COMMANDS[case])


def test_an_error_in_a_config_file_is_one_line(text, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    assert main(["train", f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'run'}"]) == USAGE_ERROR
    assert f"{tmp_path / 'broken.py'}: line 1: SyntaxError" in capsys.readouterr().err


def test_a_workdir_of_another_configuration_is_rejected(text, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main(arguments(text, workdir, "--config.train.steps=5")) == 0
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    capsys.readouterr()
    reject(capsys, arguments(text, workdir, "--config.train.steps=6"), "extend")
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").touch()
    reject(capsys, arguments(text, stranger), "workdir")


def test_a_workdir_older_than_some_keys_resumes(text, tmp_path):
    workdir, options = tmp_path / "run", ["--config.train.steps=5"]
    assert main(arguments(text, workdir, *options)) == 0
    record = workdir / "config.json"
    config = json.loads(record.read_text())
    del config["data"]["packing"], config["data"]["mask"], config["eval"]["stride"], config["model"]["head"]["pool"]
    record.write_text(json.dumps(config))
    assert main(arguments(text, workdir, *options)) == 0
    assert json.loads(record.read_text())["eval"]["stride"] == 0


def test_a_damaged_checkpoint_is_named_and_the_previous_one_resumes(text, tmp_path, capsys):
    workdir, options = tmp_path / "run", ["--config.train.steps=10"]
    assert main(arguments(text, workdir, *options)) == 0
    for path in (workdir / "checkpoints" / "10" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    capsys.readouterr()
    assert main(arguments(text, workdir, *options)) == USAGE_ERROR
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert line.startswith(f"sparsejax: {workdir / 'checkpoints' / '10'}: ")
    shutil.rmtree(workdir / "checkpoints" / "10")
    assert main(arguments(text, workdir, *options)) == 0
    assert "at step 5" in capsys.readouterr().out


def test_full_disk_is_named(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    reject(capsys, arguments(text, tmp_path / "run", "--config.train.steps=5"), "run/checkpoints")


def test_bad_loss_stops_with_a_checkpoint_or_is_skipped(text, tmp_path, capsys):
    spike = ["--config.train.spike=0.5", "--config.train.steps=5"]  # every loss after the first is a spike
    assert main(arguments(text, tmp_path / "stop", *spike)) == LOSS_DIVERGED
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
    assert line.startswith("warning: layer 0 (local): ")
    assert "8 of 32" in line
