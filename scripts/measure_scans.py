"""Times the scans of `sparsejax.ops` on CPU, forward and backward, beside the same written plainly.

    python scripts/measure_scans.py [--out FILE.json] [--only PART ...] [--length N]

`mamba` is 512 channels with a state of 16, `ssd` 8 heads of 64 with a state of 64, `ssd_128` with one of 128,
`lightning` the first with dt = 1 and B and C for each head. Batch 1, float32, two cores. Plainly is one
`jax.lax.scan` over the positions, and one `jax.lax.associative_scan`. Parts: each of these; `growth` of ours with the
length; `chunks`, ours by the chunk. The contenders of a part alternate; each number is a median.
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
CASES = {"mamba": STATE, "ssd": 64, "ssd_128": 128, "lightning": 64}  # and the numbers of a state


def draw_inputs(case: str, length: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """x, dt, A, B, C and a first state, and the cotangents of output and last state."""
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
    """The decays and what is added to the state, [b, t, ...state]: of Mamba for x [b, t, d], else of SSD."""
    if x.ndim == 3:
        return jnp.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None]
    B = jnp.repeat(B, x.shape[2] // B.shape[2], axis=2)
    return jnp.exp(dt * A)[..., None, None], (dt[..., None] * x)[..., None] * B[:, :, :, None]


def read_out(states, C):
    """[b, t, ...] from the states of all positions."""
    if states.ndim == 4:
        return jnp.einsum("btdn,btn->btd", states, C)
    return jnp.einsum("bthpn,bthn->bthp", states, jnp.repeat(C, states.shape[2] // C.shape[2], axis=2))


def associative(x, dt, A, B, C, state):
    """All states at once, by `jax.lax.associative_scan`."""
    decay, added = discretise(x, dt, A, B)
    added = added.at[:, 0].add(decay[:, 0] * state)

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    states = jax.lax.associative_scan(join, (decay, added), axis=1)[1]
    return read_out(states, C), states[:, -1]


def sequential(x, dt, A, B, C, state):
    """One position after the other, by `jax.lax.scan`."""

    def advance(state, position):
        x, dt, B, C = (a[:, None] for a in position)
        decay, added = discretise(x, dt, A, B)
        state = decay[:, 0] * state + added[:, 0]
        return state, read_out(state[:, None], C)[:, 0]

    state, y = jax.lax.scan(advance, state, [jnp.swapaxes(a, 0, 1) for a in (x, dt, B, C)])
    return jnp.swapaxes(y, 0, 1), state


def our_scan(case: str) -> Callable:
    """The one of `sparsejax.ops`."""
    return selective_scan if case == "mamba" else ssd


def time_scan(scan: Callable, case: str, length: int) -> Contender:
    """A scan, compiled with its gradients."""
    inputs, cotangents = draw_inputs(case, length)
    return jax_contender(scan, inputs, tuple(cotangents))


def race(make: dict[str, Callable[[], Contender]], error: Callable | None = relative_error) -> dict:
    """What the contenders need, and the machine's load before and after."""
    load = os.getloadavg()[0]
    rows = time_alternating(make, error)
    return {"load": [load, os.getloadavg()[0]], "contenders": rows}


def measure_case(case: str, length: int) -> dict:
    """Ours, and the two plain ways."""
    ways = {"sparsejax": our_scan(case), "lax.scan": sequential, "associative_scan": associative}
    found = race({name: functools.partial(time_scan, way, case, length) for name, way in ways.items()})
    rows = found["contenders"]
    ratios = {
        f"{name} / sparsejax, {field}": rows[name][field] / rows["sparsejax"][field]
        for name in ("lax.scan", "associative_scan")
        for field in ("seconds", "temporary_mib")
    }
    return {"title": f"{case}, {length} positions", "length": length, **found, "ratios": ratios}


def measure_growth(case: str) -> dict:
    """Ours at growing lengths, and the exponents of time and memory."""
    way = our_scan(case)
    lengths = {str(n): functools.partial(time_scan, way, case, n) for n in GROWTH_LENGTHS}
    found = race(lengths, error=None)
    return {"title": f"{case} by length", **found, "ratios": fit_exponents(found["contenders"])}


def measure_chunks(case: str, length: int) -> dict:
    """Ours by the chunk, and the bytes of the states alone that are kept."""
    way = our_scan(case)
    make = {str(c): functools.partial(time_scan, functools.partial(way, chunk=c), case, length) for c in CHUNKS}
    found = race(make)
    state_mib = draw_inputs(case, 1)[0][-1].nbytes / 2**20
    for name, row in found["contenders"].items():
        row["states_mib"] = -(-length // int(name)) * state_mib
    best = min(found["contenders"], key=lambda name: found["contenders"][name]["seconds"])
    ratios = {"fastest chunk": int(best), "MiB of a state at each position": length * state_mib}
    return {"title": f"{case} by chunk, {length} positions", "length": length, **found, "ratios": ratios}


def main() -> None:
    """Prints a table for each part; with --out also writes what was measured, as it goes."""
    parts = (*CASES, "chunks", "growth")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--length", type=int, default=LENGTH, help="of all parts but `growth`")
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
        for one in record[part] if isinstance(record[part], list) else [record[part]]:
            print_table(one["title"], one)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
