"""The benchmark of the kernels for GPUs, as far as it can be tried without one."""

import argparse
import time

import pytest

from scripts import gpu_bench

WORKER = """#!/usr/bin/env python3
import json, sys, time
skip = int(sys.argv[sys.argv.index("--skip") + 1])
for number in range(skip, {cases}):
    if number == 1:
        {trouble}
    print(json.dumps({{"error": None, "times": {{"flex": {{"forward": 1.0, "backward": 2.5}}}}}}), flush=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Rows of a part of four cases, done by a worker that has trouble with the second."""
    cases = [gpu_bench.Case(gpu_bench.WINDOW, 1024 * n) for n in (1, 2, 3, 4)]
    monkeypatch.setattr(gpu_bench, "FLEX", cases)
    monkeypatch.setattr(gpu_bench, "PATIENCE", 8.0)

    def start(trouble: str, seconds: float = 60.0) -> list[dict]:
        worker = tmp_path / "worker"
        worker.write_text(WORKER.format(cases=len(cases), trouble=trouble))
        worker.chmod(0o755)
        options = argparse.Namespace(torch=str(worker), rehearse=False, only="")
        return list(gpu_bench.run_part("flex", options, time.monotonic() + seconds))

    return start


def test_a_case_that_crashes_costs_one_row(run):
    rows = run("sys.exit('CUDA error: an illegal memory access')")
    assert [row["error"] for row in rows] == [None, "CUDA error: an illegal memory access", None, None]
    assert [row["t"] for row in rows] == [1024, 2048, 3072, 4096]


def test_a_case_that_hangs_costs_one_row(run):
    rows = run("time.sleep(600)")
    assert [row["error"] for row in rows] == [None, "no answer for 8 s", None, None]


def test_the_end_comes_in_time(run):
    started = time.monotonic()
    rows = run("time.sleep(600)", seconds=6.0)  # before PATIENCE ends
    assert time.monotonic() - started < 60
    assert [row["error"] for row in rows] == [None] + ["not reached in time"] * 3


def test_what_is_left_out_and_what_is_aimed_at():
    """Figures from times that are easy to check."""
    record = {part: [] for part in gpu_bench.SHARES}
    for case in gpu_bench.TIMED:
        times = {"gpu": {"forward": 1.0, "backward": 2.5}}
        if case.pattern == gpu_bench.DENSE:
            times["cudnn"] = {"forward": 7.0, "backward": 17.5}
        record["time"].append(gpu_bench.describe(case) | {"error": None, "times": times})
    flex = gpu_bench.Case("causal & window(511)")
    record["flex"].append(
        gpu_bench.describe(flex) | {"error": None, "times": {"flex": {"forward": 1.5, "backward": 2.0}}}
    )
    found = {name: value for name, value, *_ in gpu_bench.judge(record)}
    # 8.71875 tiles in each of 128 rows of 16 heads, 4 * 128 operations for each pair of a tile
    flops = 8.71875 * 128 * 128**2 * 16 * 4 * 128
    assert found["forward, window 1024 (TFLOP/s)"] == pytest.approx(flops / 1e-3 / 1e12)
    assert found["backward, window 1024 (TFLOP/s)"] == pytest.approx(flops / 1e-3 / 1e12)
    assert found["forward, FlexAttention / ours, least of all masks"] == 1.5
    assert found["backward, FlexAttention / ours, least of all masks"] == 0.8
    assert found["both passes, dense cuDNN / window 1024"] == 7.0
    assert found["forward, dense cuDNN / ours, least of density <= 0.5"] == 7.0
    record |= {"gpu": {"before": None}, "date": "2026-01-01", "versions": {}}
    assert "| causal & window(511), 16,384 x 16 heads of 128 | 4.9 | 1.000 + 2.500 |  | 1.500 + 2.000 |" in (
        gpu_bench.write_table(record)
    )
    assert "not measured" in gpu_bench.write_table(record | {"time": [], "flex": []})


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["gpu_bench.py", "--out", str(out)])
    monkeypatch.setattr(gpu_bench, "describe_gpu", lambda: None)
    assert gpu_bench.main() == 2
    assert capsys.readouterr().err == "gpu_bench: nvidia-smi finds no GPU here; nothing was measured\n"
    assert not out.exists()
