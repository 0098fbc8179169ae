"""The losses are the same, with dropout, on one device and on eight (data 2 x fsdp 2 x tensor 2), also when resumed."""

import json
import math
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


@pytest.fixture(scope="module")
def whole_vocabulary():
    return score_in_chunks({}, 1)


def score_in_chunks(mesh, devices):
    """The losses and gradients of `tests.train.chunked_loss`."""
    program = ("-m", "tests.train.chunked_loss", json.dumps({"data": 1, "fsdp": 1, "tensor": 1} | mesh))
    code, out, err = runs.finish(runs.start(program=program, devices=devices))
    assert code == 0, err
    return json.loads(out.partition("RESULT")[2])


FOUR, EIGHT = {"tensor": 4}, {"data": 2, "tensor": 4}


@pytest.mark.parametrize("mesh", [pytest.param(FOUR, marks=pytest.mark.nightly), EIGHT], ids=["4", "8"])
def test_a_sharded_vocabulary_is_scored_in_chunks(whole_vocabulary, mesh):
    """Also where chunks do not divide the row, with both losses of the logits: values and gradients."""
    results = score_in_chunks(mesh, math.prod(mesh.values()))
    for chunk in ("32", "8", "5"):
        assert results[chunk] == pytest.approx(results["plain"], rel=1e-5)
        assert results[chunk] == pytest.approx(whole_vocabulary["32"], rel=1e-5)
    assert results["gradient error"] < 2e-5  # of the largest entry
    assert results["gradient"] == pytest.approx(whole_vocabulary["gradient"], rel=2e-5)
