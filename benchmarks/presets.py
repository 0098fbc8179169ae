"""Does the tiny variant of every preset train, and how long does it take on this machine?

Each run is `sparsejax train --config=preset:NAME:tiny` with a new workdir. Times include compilation, checkpoints and
the evaluation on all held-out text. The exit code is 1 if a loss did not fall.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.harness import Save, print_rows
from sparsejax import config as configs
from sparsejax.presets import list_presets
from sparsejax.train import train
from sparsejax.workdir import Workdir, read_rows


def train_preset(name: str) -> dict[str, object]:
    """Trains a preset; returns the losses of the first and the last step, seconds, and CPU seconds."""
    settings = configs.load(f"preset:{name}:tiny", {"train.log_every": 1})
    start, cpu_start = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(settings, Path(folder), Console(file=io.StringIO()))
        losses = [row["train/loss"] for row in read_rows(Workdir(Path(folder)).metrics) if "train/loss" in row]
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    return {"preset": name, "first_loss": losses[0], "last_loss": losses[-1]} | seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list_presets(), help="train only these presets")


def run(options: argparse.Namespace, save: Save) -> int:
    """Trains the presets."""
    names = options.only or list_presets()
    rows = [train_preset(name) for name in (names[:1] if options.quick else names)]
    print_rows(rows)
    save({"rows": rows})
    return int(any(row["last_loss"] >= row["first_loss"] for row in rows))
