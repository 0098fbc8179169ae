"""Measures how time and memory of each method grow with the length on this machine.

    python scripts/measure_complexity.py [--out FOLDER]

Prints the table of `sparsejax show --table=complexity --measure` in Markdown, and writes it to FOLDER/table.md and all
measurements to FOLDER/result.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path

import jax

from sparsejax import complexity

COMMAND = "python scripts/measure_complexity.py --out experiments/complexity"


def main() -> None:
    """Measures all methods, prints the table, and writes it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder to write")
    options = parser.parse_args()
    growth = {}
    for method in complexity.METHODS:
        growth[method.name] = complexity.measure(method)
        print(f"{method.name}: {', '.join(f'{s:.3f} s' for s in growth[method.name].seconds)}", flush=True)
    heading, *rows = complexity.tabulate(complexity.TABLE_LENGTH, growth)
    cells = [heading, ["---"] * 3 + ["---:"] * (len(heading) - 3), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    print("\n".join(lines))
    if options.out:
        about = {"command": COMMAND, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
        about |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        exponents = {
            name: dataclasses.asdict(g) | {"time_exponent": g.time_exponent, "memory_exponent": g.memory_exponent}
            for name, g in growth.items()
        }
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "result.json").write_text(json.dumps(about | {"methods": exponents}, indent=2) + "\n")
        (options.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
