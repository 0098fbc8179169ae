"""What a run writes: rows, events, and what it shows on the way."""

import csv
import io
import json

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from sparsejax.train import read_rows
from sparsejax.train.progress import ProgressReport
from sparsejax.train.writers import Writers, describe_versions, write_json


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
    with Writers(workdir, step) as writers:
        for number, loss in enumerate(losses, step + 1):
            writers.write(number, {"train/loss": loss}, {"steps_per_second": 2.0})


def test_rows_go_to_jsonl_csv_and_events(tmp_path):
    write(tmp_path, 0, [3.0, 2.5])
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.5}]
    assert read_rows(tmp_path / "timing.jsonl")[1] == {"step": 2, "steps_per_second": 2.0}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "train/loss": "3.0"},
            {"step": "2", "train/loss": "2.5"},
        ]
    scalars = {step: values for step, values in read_events(tmp_path / "events") if values}
    assert scalars == {
        1: {"train/loss": 3.0, "steps_per_second": 2.0},
        2: {"train/loss": 2.5, "steps_per_second": 2.0},
    }


def test_rows_past_the_step_gone_on_from_are_written_again(tmp_path):
    write(tmp_path, 0, [3.0, 2.5, 2.0])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # killed while it wrote
    write(tmp_path, 1, [2.25])
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.25}]
    assert [row["step"] for row in read_rows(tmp_path / "timing.jsonl")] == [1, 2]


def test_numbers_that_json_has_no_name_for_are_null(tmp_path):
    write(tmp_path, 0, [float("nan"), float("inf")])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/loss"] for line in lines] == [None, None]
    assert "NaN" not in "".join(lines)


def test_columns_that_come_later_are_in_the_csv(tmp_path):
    with Writers(tmp_path, 0) as writers:
        writers.write(1, {"a": 1.0})
        writers.write(2, {"a": 2.0, "b": 3.0})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,a,b", "1,1.0,", "2,2.0,3.0"]


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_versions_name_what_a_result_depends_on():
    found = describe_versions()
    assert found.keys() >= {"python", "jax", "flax", "sparsejax", "git", "devices", "platform"}


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
    for each in timing[1:]:
        assert each["tokens_per_second"] == pytest.approx(100 * each["steps_per_second"])


def test_a_bar_on_a_terminal():
    out, _ = follow(terminal=True)
    assert "4/4" in out
    assert "loss 1" in out
    assert "\x1b" in out
