"""Compares `gather` on a CPU with dense attention and with PyTorch, forward and backward.

    python scripts/measure_cpu_attention.py --torch TORCH_PYTHON [--out FILE.json] [--only PART ...]

The measured function is the core of one layer: 8 heads of width 64, batch size 1, float32, two cores. `gather, devices`
runs on one JAX device per core and shards the heads over them. TORCH_PYTHON is a Python interpreter with torch and
transformers; without it only JAX is measured. The parts of the measurement are `window`, `big_bird`, `growth` (by
length) and `tiles` (by tile size); parts of FILE.json that are not measured again stay. The contenders of a part
alternate; times are medians.
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
WINDOW_LENGTH, BIG_BIRD_LENGTH = 8192, 4096  # 4096 is the length of the published BigBird models
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


def attention_contender(attention: Callable, length: int) -> Contender:
    """Compiles attention (q, k, v) -> out of JAX together with its gradients."""
    *inputs, cotangent = (jnp.asarray(x) for x in draw_arrays(length))
    return jax_contender(attention, inputs, cotangent)


def torch_contender(torch: OtherProcess, name: str, length: int) -> Contender:
    """Returns a contender of `torch_contenders.py`."""
    return Contender(functools.partial(run_remotely, torch, contender=name, length=length))


def device_contender(devices: OtherProcess, pattern: patterns.Pattern, length: int) -> Contender:
    """Returns the contender of `device_contenders.py`."""
    fields = {"pattern": str(pattern), "length": length}
    memory = devices.request(do="memory", **fields)["mib"]
    return Contender(functools.partial(run_remotely, devices, **fields), memory)


def run_remotely(process: OtherProcess, keep: bool, **fields: object) -> tuple[float, list | None]:
    """Runs a contender in another process; returns its seconds and, if `keep`, its results."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        response = process.request(do="attend", **fields, save=file.name if keep else None)
        if "error" in response:
            raise SystemExit(f"{fields}: {response['error']}")
        return response["seconds"], [np.array(x) for x in np.load(file.name).values()] if keep else None


def sparsejax_attention(impl: str, pattern: patterns.Pattern) -> Callable:
    """Returns `attend` (q, k, v) -> out."""
    return lambda q, k, v: attend(q, k, v, pattern, impl=impl)


def tiled_attention(pattern: patterns.Pattern, tile: int) -> Callable:
    """Returns `gather` (q, k, v) -> out with this tile size."""

    def attention(q, k, v):
        return gather.run(AttentionCall(q, k, v, pattern, WIDTH**-0.5, None, None, None, False), tile)[0]

    return attention


def jax_attention(**options) -> Callable:
    """Returns `jax.nn.dot_product_attention` (q, k, v) -> out with these options."""
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def measure_window(devices: OtherProcess, torch: OtherProcess | None, length: int) -> dict:
    """Compares `gather` on the window with dense attention of JAX and with PyTorch."""
    mask = WINDOW.dense(length)
    attentions = {
        "gather": sparsejax_attention("gather", WINDOW),
        "dense": sparsejax_attention("dense", WINDOW),
        "jax.nn, mask": jax_attention(mask=jnp.asarray(mask)),
        "jax.nn, local window": jax_attention(local_window_size=(RADIUS, RADIUS)),
    }
    make = {name: functools.partial(attention_contender, run, length) for name, run in attentions.items()}
    make[DEVICES] = functools.partial(device_contender, devices, WINDOW, length)
    if torch:
        make |= {name: functools.partial(torch_contender, torch, name, length) for name in TORCH_WINDOW}
    rows = time_alternating(make)
    others = {"best dense JAX": min_seconds(rows, list(attentions)[1:])}
    if torch:
        others["best PyTorch"] = min_seconds(rows, TORCH_WINDOW)
    ratios = compare(others, rows)
    return {"pattern": str(WINDOW), "length": length, "contenders": rows, "ratios": ratios}


def measure_big_bird(devices: OtherProcess, torch: OtherProcess | None) -> dict:
    """Compares times only: random tiles are shared by all heads here and differ per head in transformers."""
    length = BIG_BIRD_LENGTH
    make = {"gather": functools.partial(attention_contender, sparsejax_attention("gather", BIG_BIRD), length)}
    make[DEVICES] = functools.partial(device_contender, devices, BIG_BIRD, length)
    if torch:
        make |= {name: functools.partial(torch_contender, torch, name, length) for name in TORCH_BIG_BIRD}
    rows = time_alternating(make, error=None)
    ratios = compare({name: rows[name]["seconds"] for name in TORCH_BIG_BIRD if name in rows}, rows)
    return {"pattern": str(BIG_BIRD), "length": length, "contenders": rows, "ratios": ratios}


def compare(others: dict[str, float], rows: dict[str, dict]) -> dict[str, float]:
    """Returns times relative to those of `gather`."""
    return {f"{name} / {ours}": time / rows[ours]["seconds"] for name, time in others.items() for ours in OURS}


def measure_growth() -> dict:
    """Measures the window at growing lengths, and fits the exponents of time and memory."""
    run = sparsejax_attention("gather", WINDOW)
    make = {str(n): functools.partial(attention_contender, run, n) for n in GROWTH_LENGTHS}
    rows = time_alternating(make, error=None)
    return {"pattern": str(WINDOW), "contenders": rows, "ratios": fit_exponents(rows)}


def measure_tiles() -> list[dict]:
    """Measures `gather` by tile size on several patterns and lengths."""
    results = []
    for length, text in TILE_CASES:
        print(f"  {text}, {length} tokens", flush=True)
        runs = {str(tile): tiled_attention(patterns.parse(text), tile) for tile in TILES}
        make = {name: functools.partial(attention_contender, run, length) for name, run in runs.items()}
        rows = time_alternating(make)
        ratios = {"best tile": float(min(rows, key=lambda name: rows[name]["seconds"]))}
        results.append({"pattern": text, "length": length, "contenders": rows, "ratios": ratios})
    return results


def min_seconds(rows: dict[str, dict], names: list[str]) -> float:
    """Returns the time of the fastest of these contenders."""
    return min(rows[name]["seconds"] for name in names)


def main() -> None:
    """Prints a table per part, and writes the measurements to `--out` after every part."""
    parts = ("window", "big_bird", "growth", "tiles")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", help="a Python interpreter with torch and transformers")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to measure; all by default")
    parser.add_argument("--length", type=int, default=WINDOW_LENGTH, help="tokens in `window`, a multiple of 512")
    options = parser.parse_args()
    facts = {"command": COMMAND, "python": platform.python_version(), "machine": platform.machine()}
    facts |= {"cores": len(pin_cores())}
    facts |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    devices = OtherProcess(sys.executable, "device_contenders.py", XLA_FLAGS=f"{DEVICE_FLAG}={facts['cores']}")
    torch = OtherProcess(options.torch) if options.torch else None
    if torch:
        facts["torch_side"] = torch.request(do="versions")
    else:
        print("no --torch: skipping PyTorch")
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
        for result in record[part] if isinstance(record[part], list) else [record[part]]:
            tokens = f", {result['length']} tokens" if "length" in result else ""
            print_table(result["pattern"] + tokens, result)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
