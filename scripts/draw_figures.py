"""Draws the figures of two papers from the text form of their patterns.

    python scripts/draw_figures.py [--folder experiments/figures]

Prints the `sparsejax draw` command of each figure. The files are reproducible byte for byte.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from sparsejax.cli import main

RANDOM, GLOBAL = "random(2, tile=64, seed=3, apart=2)", "globals(128)"
WINDOW = "chunk(64) | shift(chunk(64), 64) | shift(chunk(64), -64)"
FIGURES = {
    # Child et al. 2019 (arXiv:1904.10509), figure 3: a stride of 4, and the last of every 4 keys as a summary.
    "sparse_transformer.svg": [
        *("causal", "causal & (window(3) | strided(4))", "causal & (chunk(4) | fixed(4, 1))"),
        *("--titles=Dense,Strided,Fixed", "--length=16"),
    ],
    # Zaheer et al. 2020 (arXiv:2007.14062), figure 1, in tiles of 64: 2 random, 3 in a window, 2 global.
    "bigbird.svg": [
        *(RANDOM, WINDOW, GLOBAL, f"{RANDOM} | {WINDOW} | {GLOBAL}"),
        *("--titles=Random,Window,Global,BigBird", "--length=1024", "--tile=64"),
    ],
}


def draw_figures(folder: Path) -> int:
    """Draws every figure into `folder`; returns the exit code of the first failure, or 0."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in FIGURES.items():
        command = ["draw", *arguments, f"--out={folder / name}"]
        print("sparsejax", shlex.join(command))
        code = main(command)
        if code:
            return code
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("experiments/figures"))
    sys.exit(draw_figures(parser.parse_args().folder))
