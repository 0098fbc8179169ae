"""Runs and sweeps that are killed at random moments lose nothing. `experiments/` has longer series of the same."""

import pytest

from tests.stress import kill_runs, kill_sweep

pytestmark = pytest.mark.nightly

SEEDS = pytest.mark.parametrize("seed", range(2))


@SEEDS
def test_a_killed_run_loses_nothing(seed, tmp_path):
    record = kill_runs.measure(kills=4, seed=seed, folder=tmp_path)
    assert record["lost"] == 0
    assert record["differences"] == []


@SEEDS
def test_a_killed_sweep_loses_and_repeats_nothing(seed, tmp_path):
    record = kill_sweep.measure(count=4, kills=4, seed=seed, jobs_at_once=2, folder=tmp_path)
    assert record["disturbances"]
    assert kill_sweep.is_intact(record), record
