"""Runs and sweeps that are killed, and runs whose system calls fail, lose nothing."""

import os
import random
import shutil

import pytest

from tests.stress import faulty_runs, kill_runs, kill_sweep

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


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("kind", ["kills", "faults"])
def test_a_hundred_disturbed_system_calls_lose_nothing(kind, tmp_path):
    seed = int(os.environ.get("SPARSEJAX_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed {seed}")
    counts = {"kills": 0, "faults": 0} | {kind: 100}
    record = faulty_runs.measure(**counts, seed=seed, folder=tmp_path)
    assert record["problems"] == [], f"seed {seed}"
    assert record[kind] >= 100
