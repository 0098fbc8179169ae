"""Trains the tiny variant of every preset, and prints losses and times on this machine.

    python scripts/train_presets.py [--only NAME ...]

Each run is `sparsejax train --config=configs/NAME.py:tiny` with a new workdir. Times include compilation, checkpoints
and the evaluation on all held-out text. The exit code is 1 if a loss did not fall.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparsejax import config as configs
from sparsejax.train import train
from sparsejax.workdir import Workdir, read_rows

CONFIGS = Path(__file__).parent.parent / "configs"


def list_presets() -> list[str]:
    """Returns the names of all presets: the configs whose docstring names the source of their sizes."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if "Sizes:" in path.read_text())


def train_preset(name: str) -> tuple[float, float, float, float]:
    """Trains a preset; returns the losses of the first and the last step, seconds, and CPU seconds."""
    settings = configs.load(str(CONFIGS / f"{name}.py:tiny"), {"train.log_every": 1})
    start, cpu_start = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(settings, Path(folder), Console(file=io.StringIO()))
        losses = [row["train/loss"] for row in read_rows(Workdir(Path(folder)).metrics) if "train/loss" in row]
    return losses[0], losses[-1], time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    """Parses the command line, trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list_presets(), help="train only these presets")
    names = parser.parse_args().only or list_presets()
    table, fell = Table("preset", "first loss", "last loss", "seconds", "CPU seconds"), True
    for name in names:
        first, last, seconds, cpu_seconds = train_preset(name)
        fell &= last < first
        table.add_row(name, f"{first:.3f}", f"{last:.3f}", f"{seconds:.0f}", f"{cpu_seconds:.0f}")
    Console().print(table)
    sys.exit(0 if fell else 1)


if __name__ == "__main__":
    main()
