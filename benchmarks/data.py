"""How fast are batches from memory-mapped files, how long does a step wait for them, and how much memory do they take?

Targets: at least 20 million byte tokens per second for windows of 1,024 and 8,192 tokens; every batch ready well within
a step of 20 ms; resident memory that does not grow while a large corpus is read. The folder holds each corpus twice, as
text and in the cache. Batches are read in training order. Memory is measured on the large corpus, speed on 1 GB, which
fits in the page cache, and on packed lines of 80 bytes. Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Save, print_rows, timed
from sparsejax.data import DataConfig, load_dataset
from sparsejax.data.dataset import Dataset

WINDOWS = {1024: 64, 8192: 8}  # tokens per row -> rows per batch
SECONDS, QUICK_SECONDS, STEP = 4.0, 0.2, 0.02  # duration of a measurement and of a training step
PARTS, PART = 6, 3000  # batches after which memory is measured
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


def measure_speed(dataset: Dataset, rows: int, duration: float) -> dict[str, float]:
    """Measures tokens per second, and waiting times per batch between steps of 20 ms.

    Tokens per CPU second depend less on other processes than tokens per second.
    """
    batches = dataset.train_batches(rows, 0)
    next(batches)
    count, start, used = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < duration:
        next(batches)
        count += 1
    used = time.process_time() - used
    waits = []
    for _ in range(int(duration / STEP)):
        time.sleep(STEP)  # a step on the device does not hold the interpreter
        waits.append(1000 * timed(lambda: next(batches)))
    tokens = rows * dataset.config.length
    return {
        "tokens_per_second": round(tokens * count / elapsed),
        "tokens_per_cpu_second": round(tokens * count / used),
        "batch_tokens": tokens,
        "wait_ms_median": round(statistics.median(waits), 3),
        "wait_ms_99": round(float(np.quantile(waits, 0.99)), 3),
    }


def measure_growth(dataset: Dataset, batches_per_part: int) -> list[dict[str, float]]:
    """Measures resident memory while a corpus is read."""
    batches, growth = dataset.train_batches(WINDOWS[8192], 1), []
    for part in range(PARTS):
        for _ in range(batches_per_part if part else 0):
            next(batches)
        read = part * batches_per_part * WINDOWS[8192] * dataset.config.length / 1e9
        growth.append({"gigabytes_read": round(read, 2), **measure_memory()})
    return growth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--folder", type=Path, help="folder of the corpora; defaults to a temporary folder")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the large corpus; defaults to 10")


def run(options: argparse.Namespace, save: Save) -> None:
    """Writes the corpora and measures."""
    scale, duration = (0.02, QUICK_SECONDS) if options.quick else (1.0, SECONDS)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        large, medium, small = (Path(scratch) / name for name in ("large.txt", "medium.txt", "lines.txt"))

        def load(text: Path, length: int, **fields) -> Dataset:
            return load_dataset(DataConfig("text", str(text), length, cache=str(Path(scratch) / "cache"), **fields))

        write_text(large, int(scale * options.gigabytes * 1e9))
        before = measure_memory()
        load_seconds = {name: round(timed(lambda: load(large, 8192)), 1) for name in ("first", "again")}
        dataset, loaded = load(large, 8192), measure_memory()
        growth = measure_growth(dataset, int(scale * PART))
        print_rows(growth, "resident memory, MiB")
        large.unlink()
        write_text(medium, int(scale * 1e9))
        write_text(small, BLOCK)
        speeds = {}
        for length, rows in WINDOWS.items():
            for objective in ("causal", "masked"):
                windows = load(medium, length, objective=objective)
                speeds[f"{objective} {length}"] = measure_speed(windows, rows, duration)
            packed = load(small, length, separator="\\n", packing="packed")
            speeds[f"packed {length}"] = measure_speed(packed, rows, duration)
    print_rows([{"rows": name} | speed for name, speed in speeds.items()])
    corpus_bytes = sum(dataset.counts[side]["bytes"] for side in ("training", "validation"))
    memory = {"before": before, "loaded": loaded}
    record = {"corpus_bytes": corpus_bytes, "load_seconds": load_seconds, "memory_mib": memory}
    save(record | {"speed": speeds, "growth": growth})
