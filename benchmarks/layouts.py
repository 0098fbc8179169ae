"""How long do tile layouts and their transposes take, compared with a dense mask and PyTorch's block mask?

Peak memory is the memory that Python and NumPy allocate while the layout is built (tracemalloc), and for PyTorch the
growth of the process. TORCH_PYTHON is a Python interpreter with torch and transformers.
"""

from __future__ import annotations

import argparse
import tracemalloc
from collections.abc import Callable

from benchmarks.harness import LEFT, SINK, OtherProcess, Save, alternate, pin_cores, print_rows, timed
from sparsejax import patterns
from sparsejax.patterns import TileLayout
from sparsejax.patterns.layout import build_layout

TILE, REPETITIONS = 128, 5
MASK = f"causal & (window({LEFT}) | sink({SINK}))"
BIG_BIRD = str(patterns.recipes.bigbird(TILE, 3, seed=0))
LENGTHS = (131_072, 1_048_576)
TARGETS = {131_072: 0.2, 1_048_576: 2.0}  # seconds
DENSE_LENGTHS = (8192, 16_384, 32_768)
TORCH_LENGTHS = (8192, 16_384, 32_768, 65_536, 131_072)  # until a call exceeds a minute or 8 GiB
TORCH_SECONDS, TORCH_GIB = 60.0, 8.0
TORCH_WORKER = "benchmarks.workers.torch"


def measure(build: Callable[[], object], repetitions: int = REPETITIONS) -> dict:
    """Returns median seconds, and the peak in MiB of an extra run, which tracing slows down."""
    seconds = alternate({"": lambda: timed(build)}, repetitions)[""]
    tracemalloc.start()
    build()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return seconds | {"peak_mib": peak}


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
    return about | measure(lambda: pattern.dense(length), repetitions=1)


def measure_torch(python: str, length: int) -> dict:
    """Measures PyTorch's block mask in a separate process, which isolates its peak memory."""
    about = {"pattern": MASK, "length": length, "method": "PyTorch block mask"}
    with OtherProcess(python, TORCH_WORKER) as torch:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--torch", metavar="TORCH_PYTHON", help="a Python interpreter with torch and transformers")


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures layouts, dense masks and, with `--torch`, block masks."""
    record = {"cores": len(pin_cores()), "tile": TILE}
    lengths, dense_lengths = ((8192,), (2048,)) if options.quick else (LENGTHS, DENSE_LENGTHS)
    rows = []
    for text in (MASK, BIG_BIRD):
        for length in lengths:
            rows += measure_layouts(text, length)
            print(f"{text}, {length} tokens: {rows[-2]['seconds']:.3f} s", flush=True)
    for length in dense_lengths:
        rows.append(measure_dense(length))
        print(f"dense mask, {length} tokens: {rows[-1]['seconds']:.3f} s", flush=True)
    if options.torch:
        rows += climb_torch(options.torch)
        with OtherProcess(options.torch, TORCH_WORKER) as torch:
            record["torch_side"] = torch.request(do="versions")
    else:
        print("no --torch: skipping PyTorch's block mask")
    print_rows(rows)
    record |= {"rows": rows, "ratios": compare(rows), "targets": {str(n): TARGETS[n] for n in LENGTHS}}
    for name, ratio in record["ratios"].items():
        print(f"{name}: {ratio['seconds']:.0f} in time, {ratio['memory']:.0f} in memory")
    save(record)
