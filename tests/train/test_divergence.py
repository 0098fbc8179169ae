"""Runs whose loss diverges stop, and a run without a finite evaluation is not done."""

import numpy as np
import pytest

from sparsejax.runs import list_steps, read_arrays
from sparsejax.train import LossDiverged
from sparsejax.train.runtime import PhaseRuntime
from sparsejax.workdir import Workdir, read_rows
from tests.messages import rejects
from tests.train import runs

SKIP = {"train.bad_loss": "skip", "train.max_skips": 3, "model.schedule": "local", "train.log_every": 4}


@pytest.fixture
def poison(monkeypatch):
    """Makes the losses of the steps for which a function holds NaN; steps count from 1."""
    step = PhaseRuntime.step

    def apply(is_bad):
        def take(runtime, state, batch):
            if is_bad(int(state.step) + 1):
                batch = batch | {"weights": np.full_like(batch["weights"], np.nan)}
            return step(runtime, state, batch)

        monkeypatch.setattr(PhaseRuntime, "step", take)

    return apply


def test_single_skips_do_not_stop_a_run(poison, text, tmp_path):
    poison(lambda step: step in (1, 2, 7))
    runs.train_here(runs.load(text, SKIP), tmp_path)
    rows = {row["step"]: row for row in read_rows(Workdir(tmp_path).metrics)}
    assert Workdir(tmp_path).result.exists()
    assert rows[20]["train/skipped"] == 3
    assert [rows[step]["train/loss"] for step in (1, 2, 7)] == [None] * 3
    assert [rows[step]["train/loss_mean"] is None for step in (1, 2, 4, 7)] == [True, True, False, False]


@pytest.mark.parametrize("first", [1, 9])
def test_consecutive_skips_stop_a_run_each_time_it_resumes(poison, text, tmp_path, first):
    poison(lambda step: step >= first)
    workdir, settings = Workdir(tmp_path), runs.load(text, SKIP)
    for attempt in range(2):
        with rejects(LossDiverged, "updates were skipped"):
            runs.train_here(settings, tmp_path)
        assert not workdir.result.exists()
        arrays = read_arrays(workdir.checkpoints, list_steps(workdir.checkpoints)[-1])
        assert arrays["step"] - arrays["skipped"] == first - 1
        assert arrays["skipped"] >= 3 + attempt
        assert np.isfinite(arrays["parameters.embedding.tokens"]).all()


def test_a_run_without_a_finite_evaluation_is_not_done(text, tmp_path):
    settings = runs.load(text, SKIP | {"train.steps": 1, "optimizer.warmup": 0, "optimizer.learning_rate": 1e39})
    workdir = Workdir(tmp_path)
    for _ in range(2):  # the second start finds the last step
        with rejects(LossDiverged, "final evaluation"):
            runs.train_here(settings, tmp_path)
        assert read_rows(workdir.metrics)[-1]["eval/loss"] is None
        assert not workdir.result.exists()
