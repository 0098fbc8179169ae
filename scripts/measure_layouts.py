"""Times tile layouts and their transposes, compared with a dense mask and PyTorch's block mask.

    python scripts/measure_layouts.py [--torch TORCH_PYTHON] [--out FILE.json]

Peak memory is the memory that Python and NumPy allocate while the layout is built (tracemalloc), and for PyTorch the
growth of the process. TORCH_PYTHON is a Python interpreter with torch and transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from protocol import LEFT, SINK, OtherProcess, pin_cores
from rich.console import Console
from rich.table import Table

from sparsejax import patterns
from sparsejax.patterns import TileLayout
from sparsejax.patterns.layout import build_layout

COMMAND = "python scripts/measure_layouts.py --torch TORCH_PYTHON --out FILE.json"
TILE, REPEATS = 128, 5
MASK = f"causal & (window({LEFT}) | sink({SINK}))"
BIG_BIRD = str(patterns.recipes.bigbird(TILE, 3, seed=0))
LENGTHS = (131_072, 1_048_576)
TARGETS = {131_072: 0.2, 1_048_576: 2.0}  # seconds
DENSE_LENGTHS = (8192, 16_384, 32_768)
TORCH_LENGTHS = (8192, 16_384, 32_768, 65_536, 131_072)  # until a call exceeds a minute or 8 GiB
TORCH_SECONDS, TORCH_GIB = 60.0, 8.0


def measure(build: Callable[[], object], repeats: int = REPEATS) -> dict:
    """Returns median seconds, and the peak in MiB of an extra run, which tracing slows down."""
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        build()
        runs.append(time.perf_counter() - start)
    tracemalloc.start()
    build()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return {"seconds": statistics.median(runs), "runs": runs, "peak_mib": peak}


def measure_layouts(text: str, length: int) -> list[dict]:
    """Measures a layout and its transpose."""
    pattern = patterns.parse(text)
    layout = pattern.layout(length, tile=(TILE, TILE))
    about = {"pattern": text, "length": length, "live": len(layout.columns)}

    def build() -> TileLayout:
        build_layout.cache_clear()  # otherwise all runs but the first would be free
        return pattern.layout(length, tile=(TILE, TILE))

    built = measure(build)
    return [about | {"method": "layout"} | built, about | {"method": "transpose"} | measure(layout.transpose)]


def measure_dense(length: int) -> dict:
    """Measures the dense boolean mask."""
    pattern = patterns.parse(MASK)
    about = {"pattern": MASK, "length": length, "method": "dense mask"}
    return about | measure(lambda: pattern.dense(length), repeats=1)


def measure_torch(python: str, length: int) -> dict:
    """Measures PyTorch's block mask in a separate process, which isolates its peak memory."""
    about = {"pattern": MASK, "length": length, "method": "PyTorch block mask"}
    with OtherProcess(python) as torch:
        before = torch.request(do="versions")
        answer = torch.request(do="layout", length=length, tile=TILE, limit_gib=TORCH_GIB)
    if "error" in answer:
        return about | answer
    peak = answer["peak_rss_mib"] - before["rss_mib"]
    return about | {"seconds": answer["seconds"], "peak_mib": peak, "live": answer["live"]}


def climb_torch(python: str) -> list[dict]:
    """Measures growing lengths until one fails or takes too long."""
    rows = []
    for length in TORCH_LENGTHS:
        rows.append(measure_torch(python, length))
        print(rows[-1], flush=True)
        if "error" in rows[-1] or rows[-1]["seconds"] > TORCH_SECONDS:
            break
    return rows


def compare(rows: list[dict]) -> dict:
    """Returns time and memory of each other method relative to the layout of the same mask and length."""
    ratios = {}
    for row in rows:
        if row["method"] in ("dense mask", "PyTorch block mask") and "error" not in row:
            ours = measure_layouts(MASK, row["length"])[0]
            if row.get("live", ours["live"]) != ours["live"]:
                raise SystemExit(f"{row['method']} has {row['live']} live tiles, the layout has {ours['live']}")
            ratios[f"{row['method']} / layout, {row['length']} tokens"] = {
                "seconds": row["seconds"] / ours["seconds"],
                "memory": row["peak_mib"] / ours["peak_mib"],
            }
    return ratios


def main() -> None:
    """Prints a table; with --out also writes the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", help="a Python interpreter with torch and transformers")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    record = {"command": COMMAND, "python": platform.python_version(), "machine": platform.machine()}
    record |= {"cores": len(pin_cores()), "numpy": importlib.metadata.version("numpy"), "tile": TILE}
    rows = []
    for text in (MASK, BIG_BIRD):
        for length in LENGTHS:
            rows += measure_layouts(text, length)
            print(f"{text}, {length} tokens: {rows[-2]['seconds']:.3f} s", flush=True)
    for length in DENSE_LENGTHS:
        rows.append(measure_dense(length))
        print(f"dense mask, {length} tokens: {rows[-1]['seconds']:.3f} s", flush=True)
    if options.torch:
        rows += climb_torch(options.torch)
        with OtherProcess(options.torch) as torch:
            record["torch_side"] = torch.request(do="versions")
    else:
        print("no --torch: skipping PyTorch's block mask")
    table = Table("", "tokens", "live tiles", "seconds", "peak MiB", title=MASK)
    for row in rows:
        cells = ["failed", ""] if "error" in row else [f"{row['seconds']:.4f}", f"{row['peak_mib']:.1f}"]
        method = row["method"] if row["pattern"] == MASK else f"{row['method']} of {row['pattern']}"
        table.add_row(method, str(row["length"]), str(row.get("live", "")), *cells)
    Console(width=120).print(table)
    record |= {"rows": rows, "ratios": compare(rows), "targets": {str(n): TARGETS[n] for n in LENGTHS}}
    for name, ratio in record["ratios"].items():
        print(f"{name}: {ratio['seconds']:.0f} in time, {ratio['memory']:.0f} in memory")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
