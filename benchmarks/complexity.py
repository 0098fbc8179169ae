"""How do time and memory of each method grow with the sequence length on this machine?

Forward and backward pass of one head. Writes the table of `sparsejax show --complexity=measured` in Markdown, and all
measurements with the fitted exponents.
"""

from __future__ import annotations

import argparse
import dataclasses

from benchmarks.harness import Save, write_markdown
from sparsejax import complexity

QUICK_LENGTHS = (1024, 2048)


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures all methods."""
    growth = {}
    for method in complexity.METHODS:
        growth[method.name] = complexity.measure(method, QUICK_LENGTHS if options.quick else ())
        print(f"{method.name}: {', '.join(f'{s:.3f} s' for s in growth[method.name].seconds)}", flush=True)
    heading, *rows = complexity.tabulate(complexity.TABLE_LENGTH, growth)
    table = write_markdown(heading, rows, text_columns=3)
    print(table)
    methods = {
        name: dataclasses.asdict(g) | {"time_exponent": g.time_exponent, "memory_exponent": g.memory_exponent}
        for name, g in growth.items()
    }
    save({"methods": methods}, table)
