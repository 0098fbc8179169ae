"""Times sparsejax's `gather` on CPU, forward and backward, beside dense attention and beside PyTorch.

    python scripts/measure_cpu_attention.py --torch TORCH_PYTHON [--out FILE.json] [--only PART ...]

One layer's core, 8 heads of 64, batch 1, float32, two cores. `gather, devices` has a device of JAX for each core, and
the heads spread over them. TORCH_PYTHON is a Python that has torch and transformers; without it only JAX is measured.
Parts: `window`, `big_bird`, `growth` with the length, `tiles`; FILE.json keeps those that are not measured.
The contenders of a part alternate; each number is a median.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from harness import Contender, fit_exponents, jax_contender, print_table, time_alternating
from protocol import BIG_BIRD_TILE, RADIUS, RANDOM_TILES, WIDTH, OtherProcess, draw_arrays, pin_cores

from sparsejax import patterns
from sparsejax.ops import attend, gather
from sparsejax.ops.call import AttentionCall

COMMAND = "python scripts/measure_cpu_attention.py --torch TORCH_PYTHON --out FILE.json"
WINDOW = patterns.parse(f"window({RADIUS}, {RADIUS})")
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
DEVICE_FLAG = "--xla_force_host_platform_device_count"
DEVICES = "gather, devices"
OURS = "gather", DEVICES


BIG_BIRD = patterns.recipes.bigbird(BIG_BIRD_TILE, RANDOM_TILES, seed=0)


def time_attention(attention: Callable, length: int) -> Contender:
    """Attention (q, k, v) -> out of JAX."""
    *inputs, cotangent = (jnp.asarray(x) for x in draw_arrays(length))
    return jax_contender(attention, inputs, cotangent)


def torch_contender(torch: OtherProcess, name: str, length: int) -> Contender:
    """One of the contenders of `torch_contenders.py`."""
    return Contender(functools.partial(ask, torch, contender=name, length=length))


def device_contender(devices: OtherProcess, pattern: patterns.Pattern, length: int) -> Contender:
    """Ours, of `device_contenders.py`."""
    what = {"pattern": str(pattern), "length": length}
    return Contender(functools.partial(ask, devices, **what), devices.request(do="memory", **what)["mib"])


def ask(process: OtherProcess, keep: bool, **what: object) -> tuple[float, list | None]:
    """One pass of another process: its seconds and, if kept, its result."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        answer = process.request(do="attend", **what, save=file.name if keep else None)
        if "error" in answer:
            raise SystemExit(f"{what}: {answer['error']}")
        return answer["seconds"], [np.array(x) for x in np.load(file.name).values()] if keep else None


def sparsejax_attention(impl: str, pattern: patterns.Pattern) -> Callable:
    """Our attention (q, k, v) -> out."""
    return lambda q, k, v: attend(q, k, v, pattern, impl=impl)


def tiled_attention(pattern: patterns.Pattern, tile: int) -> Callable:
    """`gather` with a tile of this size."""

    def attention(q, k, v):
        return gather.run(AttentionCall(q, k, v, pattern, WIDTH**-0.5, None, None, None, False), tile)[0]

    return attention


def jax_attention(**options) -> Callable:
    """JAX's own attention (q, k, v) -> out."""
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def measure_window(devices: OtherProcess, torch: OtherProcess | None, length: int) -> dict:
    """The window: `gather`, three dense ways of JAX, and PyTorch's."""
    mask = WINDOW.dense(length)
    ways = {
        "gather": sparsejax_attention("gather", WINDOW),
        "dense": sparsejax_attention("dense", WINDOW),
        "jax.nn, mask": jax_attention(mask=jnp.asarray(mask)),
        "jax.nn, local window": jax_attention(local_window_size=(RADIUS, RADIUS)),
    }
    make = {name: functools.partial(time_attention, way, length) for name, way in ways.items()}
    make[DEVICES] = functools.partial(device_contender, devices, WINDOW, length)
    if torch:
        make |= {name: functools.partial(torch_contender, torch, name, length) for name in TORCH_WINDOW}
    rows = time_alternating(make)
    others = {"best dense JAX": least(rows, list(ways)[1:])}
    if torch:
        others["best PyTorch"] = least(rows, TORCH_WINDOW)
    ratios = compare(others, rows)
    return {"pattern": str(WINDOW), "length": length, "contenders": rows, "ratios": ratios}


def measure_big_bird(devices: OtherProcess, torch: OtherProcess | None) -> dict:
    """BigBird: our random links are the same for all heads, theirs differ, so that only the work agrees."""
    length = BIG_BIRD_LENGTH
    make = {"gather": functools.partial(time_attention, sparsejax_attention("gather", BIG_BIRD), length)}
    make[DEVICES] = functools.partial(device_contender, devices, BIG_BIRD, length)
    if torch:
        make |= {name: functools.partial(torch_contender, torch, name, length) for name in TORCH_BIG_BIRD}
    rows = time_alternating(make, error=None)
    ratios = compare({name: rows[name]["seconds"] for name in TORCH_BIG_BIRD if name in rows}, rows)
    return {"pattern": str(BIG_BIRD), "length": length, "contenders": rows, "ratios": ratios}


def compare(others: dict[str, float], rows: dict[str, dict]) -> dict[str, float]:
    """Seconds of the others over ours."""
    return {f"{name} / {own}": seconds / rows[own]["seconds"] for name, seconds in others.items() for own in OURS}


def measure_growth() -> dict:
    """The window at growing lengths, and the exponents of time and memory."""
    way = sparsejax_attention("gather", WINDOW)
    rows = time_alternating({str(n): functools.partial(time_attention, way, n) for n in GROWTH_LENGTHS}, error=None)
    return {
        "pattern": str(WINDOW),
        "contenders": rows,
        "ratios": fit_exponents(rows),
    }


def measure_tiles() -> list[dict]:
    """Patterns and lengths by the tile of `gather`."""
    found = []
    for length, text in TILE_CASES:
        print(f"  {text}, {length} tokens", flush=True)
        ways = {str(tile): tiled_attention(patterns.parse(text), tile) for tile in TILES}
        rows = time_alternating({name: functools.partial(time_attention, way, length) for name, way in ways.items()})
        ratios = {"best tile": float(min(rows, key=lambda name: rows[name]["seconds"]))}
        found.append({"pattern": text, "length": length, "contenders": rows, "ratios": ratios})
    return found


def least(rows: dict[str, dict], names: list[str]) -> float:
    """Seconds of the fastest of these contenders."""
    return min(rows[name]["seconds"] for name in names)


def main() -> None:
    """Prints a table for each part; with --out also writes what was measured."""
    parts = ("window", "big_bird", "growth", "tiles")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", help="a Python that has torch and transformers")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--length", type=int, default=WINDOW_LENGTH, help="of the part `window`: a multiple of 512")
    options = parser.parse_args()
    facts = {"command": COMMAND, "python": platform.python_version(), "machine": platform.machine()}
    facts |= {"cores": len(pin_cores())}
    facts |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    devices = OtherProcess(sys.executable, "device_contenders.py", XLA_FLAGS=f"{DEVICE_FLAG}={facts['cores']}")
    torch = OtherProcess(options.torch) if options.torch else None
    if torch:
        facts["torch_side"] = torch.request(do="versions")
    else:
        print("no --torch: PyTorch's contenders are left out")
    measures = {
        "window": functools.partial(measure_window, devices, torch, options.length),
        "big_bird": functools.partial(measure_big_bird, devices, torch),
        "growth": measure_growth,
        "tiles": measure_tiles,
    }
    record = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for part in options.only:
        print(f"{part}:", flush=True)
        record[f"{part}_on"] = facts | {"load_before": os.getloadavg()[0]}
        record[part] = measures[part]()
        for one in record[part] if isinstance(record[part], list) else [record[part]]:
            print_table(f"{one['pattern']}, {one.get('length', '')}", one)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
