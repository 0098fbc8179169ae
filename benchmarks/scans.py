"""How fast are the scans of `sparsejax.ops` on a CPU, forward and backward, compared with plain implementations?

Cases: `mamba`, 512 channels with a state of 16; `ssd`, 8 heads of width 64 with a state of 64; `ssd_128`, a state of
128; `lightning`, `ssd` with dt = 1 and B and C per head. Batch size 1, float32, two cores. The plain implementations
are one `jax.lax.scan` and one `jax.lax.associative_scan` over all positions. The parts of the benchmark are the cases,
`chunks` (sparsejax by chunk) and `growth` (sparsejax by length).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import (
    HEADS,
    WIDTH,
    Contender,
    Save,
    add_parts,
    fit_exponents,
    jax_contender,
    pin_cores,
    race,
    relative_error,
    run_parts,
)
from sparsejax.ops import selective_scan, ssd

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


def measure_case(case: str, length: int, quick: bool) -> dict:
    """Compares the scan of sparsejax with the two plain implementations."""
    scans = {"sparsejax": our_scan(case), "lax.scan": sequential, "associative_scan": associative}
    make = {name: functools.partial(scan_contender, scan, case, length) for name, scan in scans.items()}
    rows = race(make, relative_error, quick)
    ratios = {
        f"{name} / sparsejax, {field}": rows[name][field] / rows["sparsejax"][field]
        for name in ("lax.scan", "associative_scan")
        for field in ("seconds", "temporary_mib")
    }
    title = f"{case}, {length} positions"
    return {"title": title, "length": length, "contenders": rows, "ratios": ratios}


def measure_growth(case: str, lengths: Sequence[int], quick: bool) -> dict:
    """Measures the scan of sparsejax at growing lengths, and fits the exponents of time and memory."""
    scan = our_scan(case)
    rows = race({str(n): functools.partial(scan_contender, scan, case, n) for n in lengths}, None, quick)
    return {"title": f"{case} by length", "contenders": rows, "ratios": fit_exponents(rows)}


def measure_chunks(case: str, length: int, quick: bool) -> dict:
    """Measures the scan of sparsejax by chunk, and computes the size of the saved states, one per chunk."""
    scan = our_scan(case)
    chunked = {str(chunk): functools.partial(scan, chunk=chunk) for chunk in CHUNKS}
    make = {name: functools.partial(scan_contender, scan, case, length) for name, scan in chunked.items()}
    rows = race(make, relative_error, quick)
    state_mib = draw_inputs(case, 1)[0][-1].nbytes / 2**20
    for name, row in rows.items():
        row["states_mib"] = -(-length // int(name)) * state_mib
    best = min(rows, key=lambda name: rows[name]["seconds"])
    ratios = {"fastest chunk": int(best), "MiB of one state per position": length * state_mib}
    title = f"{case} by chunk, {length} positions"
    return {"title": title, "length": length, "contenders": rows, "ratios": ratios}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_parts(parser, (*CASES, "chunks", "growth"))
    parser.add_argument(
        "--length", type=int, default=LENGTH, help=f"positions, except in `growth`; defaults to {LENGTH}"
    )


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures the parts."""
    pin_cores()
    length, lengths = (64, (64, 128)) if options.quick else (options.length, GROWTH_LENGTHS)
    measures = {case: lambda case=case: [measure_case(case, length, options.quick)] for case in CASES}
    measures["chunks"] = lambda: [measure_chunks(case, length, options.quick) for case in CASES]
    measures["growth"] = lambda: [measure_growth(case, lengths, options.quick) for case in CASES]
    run_parts(measures, options.only, save)
