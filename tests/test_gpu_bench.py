"""The benchmark of the GPU kernels, without a GPU."""

import argparse
import time

import pytest

from benchmarks import gpu
from benchmarks.__main__ import main
from tests.messages import check_message

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
    """Runs a part of four cases with a worker that fails at the second."""
    cases = [gpu.Case(gpu.WINDOW, 1024 * n) for n in (1, 2, 3, 4)]
    monkeypatch.setattr(gpu, "FLEX", cases)
    monkeypatch.setattr(gpu, "PATIENCE", 5.0)

    def start(trouble: str, seconds: float = 60.0) -> list[dict]:
        worker = tmp_path / "worker"
        worker.write_text(WORKER.format(cases=len(cases), trouble=trouble))
        worker.chmod(0o755)
        options = argparse.Namespace(torch=str(worker), quick=False, only="")
        return list(gpu.run_part("flex", options, time.monotonic() + seconds))

    return start


def test_a_case_that_crashes_costs_one_row(run):
    rows = run("sys.exit('CUDA error: an illegal memory access')")
    assert [bool(row["error"]) for row in rows] == [False, True, False, False]
    check_message(rows[1]["error"])
    assert [row["t"] for row in rows] == [1024, 2048, 3072, 4096]


def test_a_case_that_hangs_costs_one_row(run):
    rows = run("time.sleep(600)")
    assert [bool(row["error"]) for row in rows] == [False, True, False, False]
    check_message(rows[1]["error"])


def test_the_time_limit_holds(run):
    started = time.monotonic()
    rows = run("time.sleep(600)", seconds=3.0)  # before PATIENCE ends
    assert time.monotonic() - started < 60
    assert rows[0]["error"] is None
    (error,) = {row["error"] for row in rows[1:]}
    check_message(error)


def test_ratios_and_goals():
    record = {part: [] for part in gpu.SHARES}
    for case in gpu.TIMED:
        times = {"gpu": {"forward": 1.0, "backward": 2.5}}
        if case.pattern == gpu.DENSE:
            times["cudnn"] = {"forward": 7.0, "backward": 17.5}
        record["time"].append(gpu.describe(case) | {"error": None, "times": times})
    flex = gpu.Case("causal & window(511)")
    record["flex"].append(gpu.describe(flex) | {"error": None, "times": {"flex": {"forward": 1.5, "backward": 2.0}}})
    values = {name: value for name, value, *_ in gpu.compare_with_goals(record)}
    # 8.71875 tiles per row, 128 rows, 16 heads, 4 * 128 operations per pair of a tile
    flops = 8.71875 * 128 * 128**2 * 16 * 4 * 128
    assert values["forward, window 1024 (TFLOP/s)"] == pytest.approx(flops / 1e-3 / 1e12)
    assert values["backward, window 1024 (TFLOP/s)"] == pytest.approx(flops / 1e-3 / 1e12)
    assert values["forward, FlexAttention / sparsejax, minimum over masks"] == 1.5
    assert values["backward, FlexAttention / sparsejax, minimum over masks"] == 0.8
    assert values["both passes, dense cuDNN / window 1024"] == 7.0
    assert values["forward, dense cuDNN / sparsejax, minimum over density <= 0.5"] == 7.0
    record |= {"gpu": {"before": None}, "date": "2026-01-01", "versions": {}}
    record["check"] = [gpu.describe(flex) | {"error": "ArithmeticError: out: error 1.0"}]
    assert "| causal & window(511), 16,384 x 16 heads of 128 | 4.9 | 1.000 + 2.500 |  | 1.500 + 2.000 |" in (
        gpu.write_table(record)
    )
    assert "heads of 128 | ArithmeticError: out: error 1.0 |" in gpu.write_table(record)
    assert "not measured" in gpu.write_table(record | {"time": [], "flex": []})


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.json"
    monkeypatch.setattr(gpu, "describe_gpu", lambda: None)
    assert main(["gpu", f"--out={out}"]) == 2
    check_message(capsys.readouterr().err.removesuffix("\n"))
    assert not out.exists()
