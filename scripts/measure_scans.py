"""Compares the scans of `sparsejax.ops` with plain implementations on a CPU, forward and backward.

    python scripts/measure_scans.py [--out FILE.json] [--only PART ...] [--length N]

Cases: `mamba`, 512 channels with a state of 16; `ssd`, 8 heads of width 64 with a state of 64; `ssd_128`, a state of
128; `lightning`, `ssd` with dt = 1 and B and C per head. Batch size 1, float32, two cores. The plain implementations
are one `jax.lax.scan` and one `jax.lax.associative_scan` over all positions. The parts of the measurement are the
cases, `chunks` (sparsejax by chunk) and `growth` (sparsejax by length). The contenders of a part alternate; times are
medians.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from harness import Contender, fit_exponents, jax_contender, print_table, relative_error, time_alternating
from protocol import HEADS, WIDTH, pin_cores

from sparsejax.ops import selective_scan, ssd

COMMAND = "python scripts/measure_scans.py --out FILE.json"
LENGTH = 4096
GROWTH_LENGTHS = (1024, 2048, 4096, 8192, 16384)
CHUNKS = (16, 32, 64, 128)
CHANNELS, STATE = 512, 16
CASES = {"mamba": STATE, "ssd": 64, "ssd_128": 128, "lightning": 64}  # state size per channel or head


def draw_inputs(case: str, length: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Draws x, dt, A, B, C and the initial state, and the cotangents of the output and the final state."""
    random = np.random.default_rng(0)
    n = CASES[case]

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    def step_sizes(*shape: int) -> np.ndarray:
        return np.exp(random.uniform(np.log(1e-3), np.log(1e-1), shape)).astype(np.float32)

    if case == "mamba":
        A = -np.broadcast_to(np.arange(1, n + 1, dtype=np.float32), (CHANNELS, n))
        inputs = [normal(1, length, CHANNELS), step_sizes(1, length, CHANNELS), A]
        inputs += [normal(1, length, n), normal(1, length, n), normal(1, CHANNELS, n)]
    else:
        lightning = case == "lightning"
        dt = np.ones((1, length, HEADS), np.float32) if lightning else step_sizes(1, length, HEADS)
        A = -(0.5 ** np.arange(1, HEADS + 1)) if lightning else -np.arange(1, HEADS + 1)
        weights = [normal(1, length, HEADS if lightning else 1, n) / n**0.5 for _ in range(2)]
        inputs = [normal(1, length, HEADS, WIDTH), dt, A.astype(np.float32), *weights, normal(1, HEADS, WIDTH, n)]
    cotangents = [normal(*inputs[0].shape), normal(*inputs[-1].shape)]
    return [jnp.asarray(a) for a in inputs], [jnp.asarray(a) for a in cotangents]


def discretise(x, dt, A, B):
    """Returns decays and inputs of the state, [b, t, ...state]: of Mamba for x [b, t, d], of SSD for x [b, t, h, p]."""
    if x.ndim == 3:
        return jnp.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None]
    B = jnp.repeat(B, x.shape[2] // B.shape[2], axis=2)
    return jnp.exp(dt * A)[..., None, None], (dt[..., None] * x)[..., None] * B[:, :, :, None]


def read_out(states, C):
    """Returns the outputs, [b, t, ...], of the states of all positions."""
    if states.ndim == 4:
        return jnp.einsum("btdn,btn->btd", states, C)
    return jnp.einsum("bthpn,bthn->bthp", states, jnp.repeat(C, states.shape[2] // C.shape[2], axis=2))


def associative(x, dt, A, B, C, state):
    """Scans with one `jax.lax.associative_scan`, which keeps all states."""
    decay, added = discretise(x, dt, A, B)
    added = added.at[:, 0].add(decay[:, 0] * state)

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    states = jax.lax.associative_scan(join, (decay, added), axis=1)[1]
    return read_out(states, C), states[:, -1]


def sequential(x, dt, A, B, C, state):
    """Scans position by position with `jax.lax.scan`."""

    def advance(state, position):
        x, dt, B, C = (a[:, None] for a in position)
        decay, added = discretise(x, dt, A, B)
        state = decay[:, 0] * state + added[:, 0]
        return state, read_out(state[:, None], C)[:, 0]

    state, y = jax.lax.scan(advance, state, [jnp.swapaxes(a, 0, 1) for a in (x, dt, B, C)])
    return jnp.swapaxes(y, 0, 1), state


def our_scan(case: str) -> Callable:
    """Returns the scan of `sparsejax.ops` for a case."""
    return selective_scan if case == "mamba" else ssd


def scan_contender(scan: Callable, case: str, length: int) -> Contender:
    """Compiles a scan together with its gradients."""
    inputs, cotangents = draw_inputs(case, length)
    return jax_contender(scan, inputs, tuple(cotangents))


def race(make: dict[str, Callable[[], Contender]], error: Callable | None = relative_error) -> dict:
    """Times the contenders; returns their rows, and the load average of the machine before and after."""
    load = os.getloadavg()[0]
    rows = time_alternating(make, error)
    return {"load": [load, os.getloadavg()[0]], "contenders": rows}


def measure_case(case: str, length: int) -> dict:
    """Compares the scan of sparsejax with the two plain implementations."""
    scans = {"sparsejax": our_scan(case), "lax.scan": sequential, "associative_scan": associative}
    result = race({name: functools.partial(scan_contender, scan, case, length) for name, scan in scans.items()})
    rows = result["contenders"]
    ratios = {
        f"{name} / sparsejax, {field}": rows[name][field] / rows["sparsejax"][field]
        for name in ("lax.scan", "associative_scan")
        for field in ("seconds", "temporary_mib")
    }
    return {"title": f"{case}, {length} positions", "length": length, **result, "ratios": ratios}


def measure_growth(case: str) -> dict:
    """Measures the scan of sparsejax at growing lengths, and fits the exponents of time and memory."""
    scan = our_scan(case)
    result = race({str(n): functools.partial(scan_contender, scan, case, n) for n in GROWTH_LENGTHS}, error=None)
    return {"title": f"{case} by length", **result, "ratios": fit_exponents(result["contenders"])}


def measure_chunks(case: str, length: int) -> dict:
    """Measures the scan of sparsejax by chunk, and computes the size of the saved states, one per chunk."""
    scan = our_scan(case)
    chunked = {str(chunk): functools.partial(scan, chunk=chunk) for chunk in CHUNKS}
    result = race({name: functools.partial(scan_contender, scan, case, length) for name, scan in chunked.items()})
    rows = result["contenders"]
    state_mib = draw_inputs(case, 1)[0][-1].nbytes / 2**20
    for name, row in rows.items():
        row["states_mib"] = -(-length // int(name)) * state_mib
    best = min(rows, key=lambda name: rows[name]["seconds"])
    ratios = {"fastest chunk": int(best), "MiB of one state per position": length * state_mib}
    return {"title": f"{case} by chunk, {length} positions", "length": length, **result, "ratios": ratios}


def main() -> None:
    """Prints a table per part, and writes the measurements to `--out` after every part."""
    parts = (*CASES, "chunks", "growth")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to measure; all by default")
    parser.add_argument("--length", type=int, default=LENGTH, help="positions, except in `growth`")
    options = parser.parse_args()
    record = {"command": COMMAND, "python": platform.python_version(), "machine": platform.machine()}
    record |= {"cores": len(pin_cores()), "load_before": os.getloadavg()}
    record |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    measures = {case: functools.partial(measure_case, case, options.length) for case in CASES}
    measures["chunks"] = lambda: [measure_chunks(case, options.length) for case in CASES]
    measures["growth"] = lambda: [measure_growth(case) for case in CASES]
    for part in options.only:
        print(f"{part}:", flush=True)
        record[part] = measures[part]()
        for result in record[part] if isinstance(record[part], list) else [record[part]]:
            print_table(result["title"], result)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
