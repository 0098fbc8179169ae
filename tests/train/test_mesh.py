"""The same losses on one device and on eight, data 2 x fsdp 2 x tensor 2."""

import pytest

from sparsejax.train import read_rows
from tests.train import runs


def test_eight_devices_train_like_one(tmp_path):
    text = runs.write_text(tmp_path / "text")
    arguments = ("train", f"--config={runs.RECIPE}", f"--config.data.files={text}")
    mesh = ("--config.sharding.data=2", "--config.sharding.fsdp=2", "--config.sharding.tensor=2")
    one = runs.finish(runs.start(*arguments, f"--workdir={tmp_path / 'one'}"))
    eight = runs.finish(runs.start(*arguments, *mesh, f"--workdir={tmp_path / 'eight'}", devices=8))
    assert (one[0], eight[0]) == (0, 0), (one[2], eight[2])
    assert "data 2 x fsdp 2 x tensor 2" in eight[1]
    losses = [[row["train/loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("one", "eight")]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.5  # and it learns
