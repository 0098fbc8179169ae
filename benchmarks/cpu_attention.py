"""How fast is `gather` on a CPU, forward and backward, compared with dense attention and with PyTorch?

The measured function is the core of one layer: 8 heads of width 64, batch size 1, float32, two cores. `gather, devices`
runs on one JAX device per core and shards the heads over them. TORCH_PYTHON is a Python interpreter with torch and
transformers; without it only JAX is measured. The parts of the benchmark are `window`, `big_bird`, `growth` (by length)
and `tiles` (by tile size).
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import (
    BIG_BIRD_TILE,
    RADIUS,
    RANDOM_TILES,
    WIDTH,
    Contender,
    OtherProcess,
    Save,
    add_parts,
    draw_arrays,
    fit_exponents,
    jax_contender,
    pin_cores,
    race,
    run_parts,
)
from sparsejax import patterns
from sparsejax.ops import attend, gather
from sparsejax.ops.call import AttentionCall

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
    """Returns a contender of `benchmarks.workers.torch`."""
    return Contender(functools.partial(run_remotely, torch, contender=name, length=length))


def device_contender(devices: OtherProcess, pattern: patterns.Pattern, length: int) -> Contender:
    """Returns the contender of `benchmarks.workers.devices`."""
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


def measure_window(devices: OtherProcess, torch: OtherProcess | None, length: int, quick: bool) -> dict:
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
    rows = race(make, quick=quick)
    others = {"best dense JAX": min_seconds(rows, list(attentions)[1:])}
    if torch:
        others["best PyTorch"] = min_seconds(rows, TORCH_WINDOW)
    ratios = compare(others, rows)
    return result_of(WINDOW, length, rows, ratios)


def measure_big_bird(devices: OtherProcess, torch: OtherProcess | None, length: int, quick: bool) -> dict:
    """Compares times only: random tiles are shared by all heads here and differ per head in transformers."""
    make = {"gather": functools.partial(attention_contender, sparsejax_attention("gather", BIG_BIRD), length)}
    make[DEVICES] = functools.partial(device_contender, devices, BIG_BIRD, length)
    if torch:
        make |= {name: functools.partial(torch_contender, torch, name, length) for name in TORCH_BIG_BIRD}
    rows = race(make, None, quick)
    ratios = compare({name: rows[name]["seconds"] for name in TORCH_BIG_BIRD if name in rows}, rows)
    return result_of(BIG_BIRD, length, rows, ratios)


def compare(others: dict[str, float], rows: dict[str, dict]) -> dict[str, float]:
    """Returns times relative to those of `gather`."""
    return {f"{name} / {ours}": time / rows[ours]["seconds"] for name, time in others.items() for ours in OURS}


def measure_growth(lengths: Sequence[int], quick: bool) -> dict:
    """Measures the window at growing lengths, and fits the exponents of time and memory."""
    run = sparsejax_attention("gather", WINDOW)
    make = {str(n): functools.partial(attention_contender, run, n) for n in lengths}
    rows = race(make, None, quick)
    return result_of(WINDOW, None, rows, fit_exponents(rows))


def measure_tiles(cases: Sequence[tuple[int, str]], quick: bool) -> list[dict]:
    """Measures `gather` by tile size on several patterns and lengths."""
    results = []
    for length, text in cases:
        print(f"  {text}, {length} tokens", flush=True)
        runs = {str(tile): tiled_attention(patterns.parse(text), tile) for tile in TILES}
        make = {name: functools.partial(attention_contender, run, length) for name, run in runs.items()}
        rows = race(make, quick=quick)
        ratios = {"best tile": float(min(rows, key=lambda name: rows[name]["seconds"]))}
        results.append(result_of(text, length, rows, ratios))
    return results


def min_seconds(rows: dict[str, dict], names: list[str]) -> float:
    """Returns the time of the fastest of these contenders."""
    return min(rows[name]["seconds"] for name in names)


def result_of(pattern: object, length: int | None, rows: dict[str, dict], ratios: dict[str, float]) -> dict:
    """Returns the result of a part."""
    title = str(pattern) if length is None else f"{pattern}, {length} tokens"
    return {"title": title, "pattern": str(pattern), "length": length, "contenders": rows, "ratios": ratios}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--torch", metavar="TORCH_PYTHON", help="a Python interpreter with torch and transformers")
    add_parts(parser, ("window", "big_bird", "growth", "tiles"))


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures the parts."""
    window, big_bird, growth, tiles = WINDOW_LENGTH, BIG_BIRD_LENGTH, GROWTH_LENGTHS, TILE_CASES
    if options.quick:
        window, big_bird, growth, tiles = 1024, 1024, (1024, 2048), TILE_CASES[:1]
    cores = pin_cores()
    devices = OtherProcess(sys.executable, "benchmarks.workers.devices", XLA_FLAGS=f"{DEVICE_FLAG}={len(cores)}")
    torch = OtherProcess(options.torch, "benchmarks.workers.torch") if options.torch else None
    if torch is None:
        print("no --torch: skipping PyTorch")
    facts = {"torch_side": torch.request(do="versions") if torch else None}
    measures = {
        "window": lambda: [measure_window(devices, torch, window, options.quick)],
        "big_bird": lambda: [measure_big_bird(devices, torch, big_bird, options.quick)],
        "growth": lambda: [measure_growth(growth, options.quick)],
        "tiles": lambda: measure_tiles(tiles, options.quick),
    }
    run_parts(measures, options.only, lambda record: save(facts | record))
