"""Measures throughput, waiting time and memory of batches from memory-mapped files.

    python scripts/measure_data.py [--folder DIR] [--gigabytes 10] [--out FILE.json]

Targets: at least 20 million byte tokens per second for windows of 1,024 and 8,192 tokens; every batch ready well within
a step of 20 ms; resident memory that does not grow while a large corpus is read. The folder holds each corpus twice, as
text and in the cache. Batches are read in training order. Memory is measured on the large corpus, speed on 1 GB, which
fits in the page cache, and on packed lines of 80 bytes. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sparsejax.data import DataConfig, load_dataset
from sparsejax.data.dataset import Dataset

WINDOWS = {1024: 64, 8192: 8}  # tokens per row -> rows per batch
SECONDS, STEP = 4.0, 0.02  # duration of a measurement and of a training step
BLOCK = 1 << 24  # bytes per write


def write_text(path: Path, size: int) -> None:
    """Writes repetitions of a block of random letters in lines of 80 bytes."""
    block = np.random.default_rng(0).integers(97, 123, BLOCK, dtype=np.uint8)
    block[::80] = 10
    with path.open("wb") as file:
        for _ in range(size // BLOCK):
            file.write(block)


def measure_memory() -> dict[str, float]:
    """Returns resident memory in MiB: in total, and without pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("all", "VmRSS"), ("anonymous", "RssAnon"))}


def measure_speed(dataset: Dataset, rows: int) -> dict[str, float]:
    """Measures tokens per second, and waiting times per batch between steps of 20 ms.

    Tokens per CPU second depend less on other processes than tokens per second.
    """
    batches = dataset.train_batches(rows, 0)
    next(batches)
    count, start, used = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        next(batches)
        count += 1
    used = time.process_time() - used
    waits = []
    for _ in range(int(SECONDS / STEP)):
        time.sleep(STEP)  # a step on the device does not hold the interpreter
        begin = time.perf_counter()
        next(batches)
        waits.append(1000 * (time.perf_counter() - begin))
    tokens = rows * dataset.config.length
    return {
        "tokens_per_second": round(tokens * count / elapsed),
        "tokens_per_cpu_second": round(tokens * count / used),
        "batch_tokens": tokens,
        "wait_ms_median": round(statistics.median(waits), 3),
        "wait_ms_99": round(float(np.quantile(waits, 0.99)), 3),
    }


def measure_growth(dataset: Dataset, report: Callable[[str], None]) -> list[dict[str, float]]:
    """Measures resident memory while a corpus is read."""
    batches, growth = dataset.train_batches(WINDOWS[8192], 1), []
    for part in range(6):
        for _ in range(3000 if part else 0):
            next(batches)
        memory = measure_memory()
        read = part * 3000 * WINDOWS[8192] * dataset.config.length / 1e9
        growth.append({"gigabytes_read": round(read, 2), **memory})
        report(f"{read:.2f} GB read: {memory['all']:.0f} MiB, {memory['anonymous']:.0f} MiB anonymous")
    return growth


def main() -> None:
    """Writes the corpora, measures, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder of the corpora; defaults to a temporary folder")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the large corpus")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    flags = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=flags.folder) as scratch:
        large, medium, small = (Path(scratch) / name for name in ("large.txt", "medium.txt", "lines.txt"))

        def load(text: Path, length: int, **fields) -> Dataset:
            return load_dataset(DataConfig("text", str(text), length, cache=str(Path(scratch) / "cache"), **fields))

        write_text(large, int(flags.gigabytes * 1e9))
        before, start = measure_memory(), time.perf_counter()
        dataset = load(large, 8192)
        seconds = {"first": round(time.perf_counter() - start, 1)}
        after, start = measure_memory(), time.perf_counter()
        load(large, 8192)
        seconds["again"] = round(time.perf_counter() - start, 1)
        growth = measure_growth(dataset, console.print)
        large.unlink()
        write_text(medium, int(1e9))
        write_text(small, BLOCK)
        speeds = {}
        for length, rows in WINDOWS.items():
            for objective in ("causal", "masked"):
                speeds[f"{objective} {length}"] = measure_speed(load(medium, length, objective=objective), rows)
            packed = load(small, length, separator="\\n", packing="packed")
            speeds[f"packed {length}"] = measure_speed(packed, rows)
    record = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "corpus_bytes": sum(dataset.counts[side]["bytes"] for side in ("training", "validation")),
        "load_seconds": seconds,
        "memory_mib": {"before": before, "loaded": after},
        "speed": speeds,
        "growth": growth,
    }
    table = Table("rows", "million tokens/s", "per CPU second", "wait, ms: median", "99 %")
    for name, speed in speeds.items():
        waits = (f"{speed[f'wait_ms_{quantile}']:.2f}" for quantile in ("median", "99"))
        rates = (f"{speed[f'tokens_per_{unit}'] / 1e6:.1f}" for unit in ("second", "cpu_second"))
        table.add_row(name, *rates, *waits)
    console.print(table)
    if flags.out:
        flags.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
