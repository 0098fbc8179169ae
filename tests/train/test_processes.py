"""One process and two real ones see the same global batches."""

import os
import re
import socket
import subprocess
import sys

import pytest

from sparsejax.cli import USAGE_ERROR, main
from sparsejax.train import read_rows
from tests.train import runs


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_see_the_batches_of_one(tmp_path):
    files, port = runs.write_text(tmp_path / "text"), find_port()

    def start(index, count):
        command = [sys.executable, "-m", "tests.train.share", str(port), str(index), str(count), str(files)]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def finish(process):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        *_, line = out.splitlines()
        rows, _, digest = line.rpartition(" ")
        return rows, digest

    one = finish(start(0, 1))
    pair = [start(index, 2) for index in range(2)]
    found = [finish(process) for process in pair]
    assert one[0] == "(0, 1)"
    assert [rows for rows, _ in found] == ["(0, 2)", "(1, 2)"]
    assert {digest for _, digest in found} == {one[1]}


def test_two_processes_train_together(tmp_path):
    files = runs.write_text(tmp_path / "text")
    given = [f"--config={runs.RECIPE}", f"--config.data.files={files}", "--config.sharding.fsdp=2"]

    def start(name, devices, *more):
        return runs.start("train", *given, f"--workdir={tmp_path / name}", *more, devices=devices)

    place = f"127.0.0.1:{find_port()}"
    pair = [start("two", 2, f"--distributed={place},{index}/2") for index in range(2)]
    said = [runs.finish(process) for process in pair]
    assert [code for code, _, _ in said] == [0, 0], said
    assert "validation:" in said[0][1]
    # One of them speaks. Gloo's threads do too, and now and then two of its lines become one.
    assert not re.sub(r"\[Gloo\] [^\[\n]*", "", said[1][1]).strip()
    code, _, err = runs.finish(start("one", 4))
    assert code == 0, err
    alone, together = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in alone] == [row["step"] for row in together]
    for a, b in zip(alone, together, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    # What two have saved, one goes on with.
    code, out, err = runs.finish(start("two", 4))
    assert code == 0, err
    assert "resuming" in out


@pytest.mark.parametrize("place", ["somewhere", "127.0.0.1:1,2/2", "127.0.0.1,0/2"])
def test_a_place_that_cannot_be_read_is_refused(place, capsys):
    code = main(["train", "--config=configs/quickstart.py", "--workdir=nowhere", f"--distributed={place}"])
    assert code == USAGE_ERROR
    assert "--distributed" in capsys.readouterr().err
