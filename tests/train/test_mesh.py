"""The losses are the same, with dropout, on one device and on eight (data 2 x fsdp 2 x tensor 2), also when resumed."""

import shutil

import pytest

from sparsejax.runs import list_steps
from sparsejax.workdir import Workdir, read_rows
from tests.train import runs

MESH = ("--config.sharding.data=2", "--config.sharding.fsdp=2", "--config.sharding.tensor=2")


def losses(workdir):
    return [row["train/loss"] for row in read_rows(Workdir(workdir).metrics)]


def test_eight_devices_train_like_one(trained, text, tmp_path):
    eight = tmp_path / "eight"
    arguments = ("train", f"--config={runs.RECIPE}", f"--config.data.files={text}", "--config.model.dropout=0.1")
    code, out, err = runs.finish(runs.start(*arguments, *MESH, f"--workdir={eight}", devices=8))
    assert code == 0, err
    assert "data 2 x fsdp 2 x tensor 2" in out
    expected = losses(trained[0])
    assert len(expected) == 20
    assert losses(eight) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5  # and it learns

    # One device resumes what eight devices saved.
    shutil.rmtree(Workdir(eight).checkpoints / "20")
    assert list_steps(Workdir(eight).checkpoints)[-1] == 15
    assert "at step 15\n" in runs.train_here(runs.load(text, {"model.dropout": 0.1}), eight)
    assert losses(eight) == pytest.approx(expected, abs=1e-4)
