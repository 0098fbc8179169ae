"""Compares implementations of `attend` on this machine: time of the forward and backward pass, and temporary memory.

    python scripts/measure_attention.py [--out FILE.json]

The cases bracket the thresholds `DENSE_LENGTH` and `SEGMENT_FILL` of `sparsejax.ops.attention`. `density` is the
fraction of live tiles, `fill` the fraction of allowed pairs in live tiles. The implementations alternate; times are
medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sparsejax import patterns
from sparsejax.ops import attend
from sparsejax.ops.gather import SMALL

CASES = [
    (8, 64, "causal"),
    (8, 128, "causal"),
    (8, 128, "full"),
    (8, 256, "causal"),
    (8, 256, "full"),
    (8, 256, "causal & (window(63) | sink(4))"),
    (4, 512, "causal"),
    (4, 512, "full"),
    (2, 1024, "causal"),
    (2, 1024, "full"),
    (2, 1024, "causal & window(128)"),
    (1, 4096, "window(256, 256)"),
    (2, 1024, "globals([5, 900]) | window(0)"),
    (2, 1024, "globals([5, 900]) | window(15)"),
    (2, 1024, "chunk(2)"),
    (2, 1024, "chunk(4)"),
    (2, 1024, "chunk(8)"),
    (2, 1024, "chunk(16)"),
    (2, 1024, "chunk(32)"),
]
IMPLS = ("dense", "gather", "segment")
HEADS, WIDTH, REPEATS = 4, 32, 7


def compile_gradient(batch: int, length: int, text: str, impl: str) -> tuple[Callable, list[jax.Array], float]:
    """Returns the compiled gradient of a loss, its arguments, and its temporary memory in MiB."""
    pattern = patterns.parse(text)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(batch, length, HEADS, WIDTH)), jnp.float32) for _ in range(3)]

    def loss(q, k, v):
        return jnp.square(attend(q, k, v, pattern, impl=impl)).sum()

    run = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
    return run, arrays, run.memory_analysis().temp_size_in_bytes / 2**20


def measure(batch: int, length: int, text: str) -> dict:
    """Measures all implementations in alternation; returns a row of the table."""
    runs = {impl: compile_gradient(batch, length, text, impl) for impl in IMPLS}
    seconds: dict[str, list[float]] = {impl: [] for impl in runs}
    for _ in range(REPEATS + 1):
        for impl, (run, arrays, _) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            seconds[impl].append(time.perf_counter() - start)
    pattern = patterns.parse(text)
    layout = pattern.layout(length, tile=(SMALL, SMALL))
    return {
        "batch": batch,
        "length": length,
        "pattern": text,
        "density": layout.density,
        "fill": pattern.pairs(length) / (len(layout.columns) * SMALL**2),
        **{f"{impl}_ms": 1e3 * float(np.median(times[1:])) for impl, times in seconds.items()},
        **{f"{impl}_mib": runs[impl][2] for impl in IMPLS},
    }


def main() -> None:
    """Prints a table, and writes it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(*case))
        fastest = min(IMPLS, key=lambda impl: rows[-1][f"{impl}_ms"])
        print(f"{len(rows)}/{len(CASES)} {case}: fastest {fastest}", flush=True)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    if options.out:
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "heads": HEADS, "head_width": WIDTH}
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
