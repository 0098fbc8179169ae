"""Rows, events and the progress report."""

import csv
import io
import json
import types

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from sparsejax.train import progress as progress_module
from sparsejax.train.progress import ProgressReport
from sparsejax.train.writers import Writers, describe_versions
from sparsejax.workdir import Workdir, read_rows, write_json

pytestmark = pytest.mark.quick


def read_events(folder):
    """Scalars by step from the event files, oldest first: each record is length, checksum, data, checksum."""
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            yield event.step, {value.tag: value.simple_value for value in event.summary.value}


def write(workdir, step, losses):
    with Writers(Workdir(workdir), step) as writers:
        for number, loss in enumerate(losses, step + 1):
            writers.write(number, {"train/loss": loss}, {"steps_per_second": 2.0})


def test_rows_go_to_jsonl_csv_and_events(tmp_path):
    write(tmp_path, 0, [3.0, 2.5])
    assert read_rows(Workdir(tmp_path).metrics) == [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.5}]
    assert read_rows(Workdir(tmp_path).timing)[1] == {"step": 2, "steps_per_second": 2.0}
    with Workdir(tmp_path).metrics_table.open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "train/loss": "3.0"},
            {"step": "2", "train/loss": "2.5"},
        ]
    scalars = {step: values for step, values in read_events(Workdir(tmp_path).events) if values}
    assert scalars == {
        1: {"train/loss": 3.0, "steps_per_second": 2.0},
        2: {"train/loss": 2.5, "steps_per_second": 2.0},
    }


def test_rows_after_the_step_of_the_checkpoint_are_written_again(tmp_path):
    write(tmp_path, 0, [3.0, 2.5, 2.0])
    with Workdir(tmp_path).metrics.open("a") as file:
        file.write('{"step": 4, "train/lo')  # the process was killed during the write
    write(tmp_path, 1, [2.25])
    assert read_rows(Workdir(tmp_path).metrics) == [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.25}]
    assert [row["step"] for row in read_rows(Workdir(tmp_path).timing)] == [1, 2]


def test_numbers_that_json_lacks_are_null(tmp_path):
    write(tmp_path, 0, [float("nan"), float("inf")])
    lines = Workdir(tmp_path).metrics.read_text().splitlines()
    assert [json.loads(line)["train/loss"] for line in lines] == [None, None]
    assert "NaN" not in "".join(lines)


def test_later_columns_are_in_the_table(tmp_path):
    with Writers(Workdir(tmp_path), 0) as writers:
        writers.write(1, {"a": 1.0})
        writers.write(2, {"a": 2.0, "b": 3.0})
    assert Workdir(tmp_path).metrics_table.read_text().splitlines() == ["step,a,b", "1,1.0,", "2,2.0,3.0"]


def test_json_is_replaced_in_one_step(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_versions_name_the_software_and_the_devices():
    assert describe_versions().keys() >= {"python", "jax", "flax", "sparsejax", "git", "devices", "platform"}


def follow(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with ProgressReport(console, 0, 4) as report:
        report.begin(0, 100)
        timing = []
        for step in (1, 2, 3, 4):
            report.advance(step)
            timing.append(report.log(step, f"loss {5 - step}"))
    return out.getvalue(), timing


def test_plain_lines_where_there_is_no_terminal():
    out, timing = follow(terminal=False)
    assert "\x1b" not in out
    lines = out.splitlines()
    assert [line.split(" | ")[:2] for line in lines] == [[f"step {i}/4", f"loss {5 - i}"] for i in (1, 2, 3, 4)]
    assert all("ETA" in line for line in lines)
    assert timing[0] == {}  # the first step compiles
    for rates in timing[1:]:
        assert rates["tokens_per_second"] == pytest.approx(100 * rates["steps_per_second"])


def test_a_bar_on_a_terminal():
    out, _ = follow(terminal=True)
    assert "4/4" in out
    assert "loss 1" in out
    assert "\x1b" in out


def test_the_remaining_time_includes_evaluations(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 5.0, 7.0])  # the start, step 1, an evaluation of 4 s, and step 4
    monkeypatch.setattr(progress_module, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    console = Console(file=io.StringIO(), width=160)
    with ProgressReport(console, 0, 8) as progress:
        progress.advance(1)
        with progress.pause():
            pass
        timing = progress.log(4, "")
    assert timing["steps_per_second"] == 1  # three steps in 7 - 4 s
    assert console.file.getvalue().endswith("ETA 0:00:08\n")  # four steps of 1 s, and again 4 s of evaluations
