"""Runs whose rows are sharded train like those on one device, and resume on other meshes."""

import shutil
import signal
import time

import pytest

from sparsejax.runs import list_steps
from sparsejax.workdir import Workdir, read_rows
from tests.train import runs
from tests.train.test_processes import find_port

CONFIG = {"data.length": 64, "model.dropout": 0.1, "train.steps": 20, "train.log_every": 1}
LAYERS = {
    "model.schedule": "2x(full local)",
    "model.layers.local": "full",
    "model.layers.local.mixer.pattern": "causal & (window(9) | sink(1))",
}


def start(workdir, text, sequence, *options, devices=8, **keys):
    changes = CONFIG | LAYERS | {"data.files": text, "sharding.sequence": sequence} | keys
    arguments = [f"--config.{key}={value}" for key, value in changes.items()]
    return runs.start("train", f"--config={runs.RECIPE}", *arguments, f"--workdir={workdir}", *options, devices=devices)


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in read_rows(Workdir(workdir).metrics)}


def test_a_run_resumes_on_another_mesh(text, tmp_path):
    """Resumed with as many shards the losses are equal to the bit, with another number to rounding."""
    single, eight = tmp_path / "single", tmp_path / "eight"
    for workdir, sequence in ((single, 1), (eight, 8)):
        code, out, err = runs.finish(start(workdir, text, sequence, devices=sequence))
        assert code == 0, err
        assert ("sequence 8" in out) == (sequence == 8)
    expected, sharded = losses(single), losses(eight)
    assert sharded == pytest.approx(expected, abs=1e-4)
    for sequence, tolerance in ((8, 0.0), (2, 1e-4)):
        shutil.rmtree(Workdir(eight).checkpoints / "20")
        code, out, err = runs.finish(start(eight, text, sequence))
        assert code == 0, err
        assert losses(eight) == pytest.approx(sharded, abs=tolerance, rel=0)


def test_processes_share_rows_are_killed_and_resume(text, tmp_path):
    """Two processes of four devices hold half of the tokens of every row each."""
    single, two = tmp_path / "single", tmp_path / "two"
    code, _, err = runs.finish(start(single, text, 1, devices=1))
    assert code == 0, err

    def start_pair():
        address = f"127.0.0.1:{find_port()}"
        return [start(two, text, 8, f"--distributed={address},{index}/2", devices=4) for index in range(2)]

    pair = start_pair()
    while 5 not in list_steps(Workdir(two).checkpoints):
        assert pair[0].poll() is None, pair[0].communicate()
        time.sleep(0.05)
    for process in pair:
        process.send_signal(signal.SIGKILL)
    for process in pair:
        runs.finish(process)
    results = [runs.finish(process) for process in start_pair()]
    assert [code for code, _, _ in results] == [0, 0], results
    assert losses(two) == pytest.approx(losses(single), abs=1e-4)
