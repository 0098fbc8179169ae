"""The same losses, with dropout, on one device and on eight, data 2 x fsdp 2 x tensor 2, and from one to the other."""

import shutil

import pytest

from sparsejax.train import list_steps, read_rows
from tests.train import runs

MESH = ("--config.sharding.data=2", "--config.sharding.fsdp=2", "--config.sharding.tensor=2")


def losses(workdir):
    return [row["train/loss"] for row in read_rows(workdir / "metrics.jsonl")]


def test_eight_devices_train_like_one(tmp_path):
    text = runs.write_text(tmp_path / "text")
    arguments = ("train", f"--config={runs.RECIPE}", f"--config.data.files={text}", "--config.model.dropout=0.1")
    one = runs.finish(runs.start(*arguments, f"--workdir={tmp_path / 'one'}"))
    eight = runs.finish(runs.start(*arguments, *MESH, f"--workdir={tmp_path / 'eight'}", devices=8))
    assert (one[0], eight[0]) == (0, 0), (one[2], eight[2])
    assert "data 2 x fsdp 2 x tensor 2" in eight[1]
    expected = losses(tmp_path / "one")
    assert len(expected) == 20
    assert losses(tmp_path / "eight") == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5  # and it learns

    # What eight devices saved goes on on one.
    shutil.rmtree(tmp_path / "eight" / "checkpoints" / "20")
    assert list_steps(tmp_path / "eight" / "checkpoints")[-1] == 15
    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={tmp_path / 'eight'}"))
    assert (code, err) == (0, "")
    assert "at step 15\n" in out
    assert losses(tmp_path / "eight") == pytest.approx(expected, abs=1e-4)
