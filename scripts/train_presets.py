"""Trains the tiny form of every preset and prints what it learnt and how long it took, on this machine.

    python scripts/train_presets.py [--only NAME ...]

Each is the command `sparsejax train --config=configs/NAME.py:tiny` with a fresh workdir, so the time includes
compilation, the evaluation of all held-out text and checkpoints. Exits with 1 if a loss did not fall.
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
from sparsejax.train import read_rows, train

CONFIGS = Path(__file__).parent.parent / "configs"


def list_presets() -> list[str]:
    """The names of all presets: the configs that are written with `recipe`."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if "import recipe" in path.read_text())


def train_preset(name: str) -> tuple[float, float, float, float]:
    """Training loss at the first and at the last step, seconds, and seconds of all cores together."""
    settings = configs.load(str(CONFIGS / f"{name}.py:tiny"), ["train.log_every=1"])
    start, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(settings, Path(folder), Console(file=io.StringIO()))
        losses = [row["train/loss"] for row in read_rows(Path(folder) / "metrics.jsonl") if "train/loss" in row]
    return losses[0], losses[-1], time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    """Parses the command line, trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list_presets(), help="these presets alone")
    names = parser.parse_args().only or list_presets()
    table, fell = Table("preset", "first loss", "last loss", "seconds", "CPU seconds"), True
    for name in names:
        first, last, seconds, busy = train_preset(name)
        fell &= last < first
        table.add_row(name, f"{first:.3f}", f"{last:.3f}", f"{seconds:.0f}", f"{busy:.0f}")
    Console().print(table)
    sys.exit(0 if fell else 1)


if __name__ == "__main__":
    main()
