"""Times sparsejax's `gather` on CPU, forward and backward, beside dense attention and beside PyTorch.

    python scripts/measure_cpu_attention.py --torch TORCH_PYTHON [--out FILE.json] [--only PART ...]

One layer's core, 8 heads of 64, batch 1, float32, two cores. TORCH_PYTHON is a Python that has torch and
transformers; without it only JAX is measured. Parts: `window`, `big_bird`, `growth` with the length, `tiles`. All
contenders of a part take turns; each number is a median.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from contest import BIG_BIRD_TILE, RANDOM_TILES, REACH, WIDTH, TorchProcess, draw_arrays, keep_to_cores
from rich.console import Console
from rich.table import Table

from sparsejax import patterns
from sparsejax.ops import attend, gather
from sparsejax.ops.request import Request

COMMAND = "python scripts/measure_cpu_attention.py --torch TORCH_PYTHON --out FILE.json"
REPEATS, FEW = 7, 3  # runs after the first; a contender whose first run takes longer than SLOW seconds has FEW
SLOW = 5.0
WINDOW = patterns.parse(f"window({REACH}, {REACH})")
WINDOW_LENGTH, BIG_BIRD_LENGTH = 8192, 4096  # 4096 is the length that HF's BigBird was made for
GROWTH_LENGTHS = (4096, 8192, 16384, 32768, 65536)
TILES = (32, 64, 128, 256)
TILE_CASES = [
    (2048, "causal & window(63)"),
    (8192, "causal & window(255)"),
    (8192, "window(256, 256)"),
    (8192, "causal & (window(1023) | sink(128))"),
    (4096, "causal"),
    (8192, "window(128, 128) | globals(64)"),
]
TORCH_WINDOW = ["PyTorch dense SDPA", "PyTorch band, products", "PyTorch band, SDPA", "HF Longformer"]
TORCH_BIG_BIRD = ["HF BigBird", "HF BigBird with projections"]


BIG_BIRD = patterns.recipes.bigbird(BIG_BIRD_TILE, RANDOM_TILES, seed=0)


class Contender:
    """Something to time. `run(keep)` does one forward and backward pass: its seconds and, if kept, its result."""

    def __init__(self, run: Callable[[bool], tuple[float, list | None]], temporary_mib: float | None = None):
        self.run, self.temporary_mib = run, temporary_mib
        self.first, self.result = run(True)  # loads, allocates
        self.repeats = FEW if self.first > SLOW else REPEATS
        self.seconds: list[float] = []


def jax_contender(attention: Callable, length: int) -> Contender:
    """Attention (q, k, v) -> out of JAX, compiled with its gradient."""
    arrays = [jnp.asarray(x) for x in draw_arrays(length)]

    def differentiate(q, k, v, d_out):
        out, backward = jax.vjp(attention, q, k, v)
        return out, *backward(d_out)

    compiled = jax.jit(differentiate).lower(*arrays).compile()

    def run(keep: bool) -> tuple[float, list | None]:
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*arrays))
        return time.perf_counter() - start, [np.asarray(x) for x in result] if keep else None

    return Contender(run, compiled.memory_analysis().temp_size_in_bytes / 2**20)


def torch_contender(torch: TorchProcess, name: str, length: int) -> Contender:
    """One of the contenders of `torch_contenders.py`."""

    def run(keep: bool) -> tuple[float, list | None]:
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            answer = torch.ask(do="attend", contender=name, length=length, save=file.name if keep else None)
            if "error" in answer:
                raise SystemExit(f"{name}: {answer['error']}")
            return answer["seconds"], [np.array(x) for x in np.load(file.name).values()] if keep else None

    return Contender(run)


def sparsejax_attention(impl: str, pattern: patterns.Pattern) -> Callable:
    """Our attention (q, k, v) -> out."""
    return lambda q, k, v: attend(q, k, v, pattern, impl=impl)


def tiled_attention(pattern: patterns.Pattern, tile: int) -> Callable:
    """`gather` with a tile of this size."""

    def attention(q, k, v):
        return gather.run(Request(q, k, v, pattern, WIDTH**-0.5, None, None, None, False), tile)[0]

    return attention


def jax_attention(**options) -> Callable:
    """JAX's own attention (q, k, v) -> out."""
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def take_turns(make: dict[str, Callable[[], Contender]], agree: bool = True) -> dict[str, dict]:
    """Times all contenders in turn; those that `agree` must compute what the first one computes."""
    contenders, errors = {}, {}
    for name, start in make.items():
        contenders[name] = start()
        print(f"  {name}: first run {contenders[name].first:.3f} s", flush=True)
    reference = next(iter(contenders.values())).result
    for name, each in contenders.items():
        if agree:
            errors[name] = max(float(abs(a - b).max()) for a, b in zip(each.result, reference, strict=True))
            if errors[name] > 1e-4:
                raise SystemExit(f"{name} computes something else: differs by {errors[name]:.2e}")
        each.result = None
    for repeat in range(REPEATS):
        for each in contenders.values():
            if repeat < each.repeats:
                each.seconds.append(each.run(False)[0])
    return {
        name: {
            "seconds": statistics.median(each.seconds),
            "runs": each.seconds,
            "temporary_mib": each.temporary_mib,
            "differs_by": errors.get(name),
        }
        for name, each in contenders.items()
    }


def measure_window(torch: TorchProcess | None, length: int) -> dict:
    """The window: `gather`, three dense ways of JAX, and PyTorch's."""
    mask = WINDOW.dense(length)
    ways = {
        "gather": sparsejax_attention("gather", WINDOW),
        "dense": sparsejax_attention("dense", WINDOW),
        "jax.nn, mask": jax_attention(mask=jnp.asarray(mask)),
        "jax.nn, local window": jax_attention(local_window_size=(REACH, REACH)),
    }
    make = {name: functools.partial(jax_contender, way, length) for name, way in ways.items()}
    if torch:
        make |= {name: functools.partial(torch_contender, torch, name, length) for name in TORCH_WINDOW}
    rows = take_turns(make)
    ratios = {"best dense JAX / gather": least(rows, list(ways)[1:]) / rows["gather"]["seconds"]}
    if torch:
        ratios["best PyTorch / gather"] = least(rows, TORCH_WINDOW) / rows["gather"]["seconds"]
    return {"pattern": str(WINDOW), "length": length, "contenders": rows, "ratios": ratios}


def measure_big_bird(torch: TorchProcess | None) -> dict:
    """BigBird: our random links are the same for all heads, theirs differ, so that only the work agrees."""
    length = BIG_BIRD_LENGTH
    make = {"gather": functools.partial(jax_contender, sparsejax_attention("gather", BIG_BIRD), length)}
    if torch:
        make |= {name: functools.partial(torch_contender, torch, name, length) for name in TORCH_BIG_BIRD}
    rows = take_turns(make, agree=False)
    ratios = {}
    if torch:
        ratios = {f"{name} / gather": rows[name]["seconds"] / rows["gather"]["seconds"] for name in TORCH_BIG_BIRD}
    return {"pattern": str(BIG_BIRD), "length": length, "contenders": rows, "ratios": ratios}


def measure_growth() -> dict:
    """The window at growing lengths, and the exponents of time and memory."""
    way = sparsejax_attention("gather", WINDOW)
    rows = take_turns({str(n): functools.partial(jax_contender, way, n) for n in GROWTH_LENGTHS}, agree=False)
    return {
        "pattern": str(WINDOW),
        "contenders": rows,
        "ratios": {f"exponent of {field}": fit_exponent(rows, field) for field in ("seconds", "temporary_mib")},
    }


def measure_tiles() -> list[dict]:
    """Patterns and lengths by the tile of `gather`."""
    found = []
    for length, text in TILE_CASES:
        print(f"  {text}, {length} tokens", flush=True)
        ways = {str(tile): tiled_attention(patterns.parse(text), tile) for tile in TILES}
        rows = take_turns({name: functools.partial(jax_contender, way, length) for name, way in ways.items()})
        ratios = {"best tile": float(min(rows, key=lambda name: rows[name]["seconds"]))}
        found.append({"pattern": text, "length": length, "contenders": rows, "ratios": ratios})
    return found


def least(rows: dict[str, dict], names: list[str]) -> float:
    """Seconds of the fastest of these contenders."""
    return min(rows[name]["seconds"] for name in names)


def fit_exponent(rows: dict[str, dict], field: str) -> float:
    """The slope of a line through the logarithms."""
    values = [row[field] for row in rows.values()]
    return float(np.polyfit(np.log([int(name) for name in rows]), np.log(values), 1)[0])


def print_table(part: dict) -> None:
    """What one part found."""
    table = Table("", "seconds", "temporary MiB", "differs by", title=f"{part['pattern']}, {part.get('length', '')}")
    for name, row in part["contenders"].items():
        memory, error = row["temporary_mib"], row["differs_by"]
        cells = ("" if memory is None else f"{memory:.1f}"), ("" if error is None else f"{error:.1e}")
        table.add_row(name, f"{row['seconds']:.3f}", *cells)
    Console(width=120).print(table)
    for name, ratio in part["ratios"].items():
        print(f"{name}: {ratio:.3g}", flush=True)


def main() -> None:
    """Prints a table for each part; with --out also writes what was measured."""
    parts = ("window", "big_bird", "growth", "tiles")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", help="a Python that has torch and transformers")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--length", type=int, default=WINDOW_LENGTH, help="of the part `window`: a multiple of 512")
    options = parser.parse_args()
    record = {"command": COMMAND, "python": platform.python_version(), "machine": platform.machine()}
    record |= {"cores": len(keep_to_cores()), "load_before": os.getloadavg()[0]}
    record |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    torch = TorchProcess(options.torch) if options.torch else None
    if torch:
        record["torch_side"] = torch.ask(do="versions")
    else:
        print("no --torch: PyTorch's contenders are left out")
    measures = {
        "window": functools.partial(measure_window, torch, options.length),
        "big_bird": functools.partial(measure_big_bird, torch),
        "growth": measure_growth,
        "tiles": measure_tiles,
    }
    for part in options.only:
        print(f"{part}:", flush=True)
        record[part] = measures[part]()
        for one in record[part] if isinstance(record[part], list) else [record[part]]:
            print_table(one)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
