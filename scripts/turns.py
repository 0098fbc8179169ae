"""Contenders that take turns, so that what else the machine does befalls all of them; what they need, as a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from sparsejax.complexity import fit_exponent

REPEATS, FEW = 7, 3  # runs after the first; a contender whose first run takes longer than SLOW seconds has FEW
SLOW = 5.0
PAUSE = 0.5  # seconds before a turn: the threads of the one before spin for a while
TOLERANCE = 1e-4  # between results


class Contender:
    """Something to time. `run(keep)` does one forward and backward pass: its seconds and, if kept, its result."""

    def __init__(self, run: Callable[[bool], tuple[float, list | None]], temporary_mib: float | None = None):
        self.run, self.temporary_mib = run, temporary_mib
        self.first, self.result = run(True)  # loads, allocates
        self.repeats = FEW if self.first > SLOW else REPEATS
        self.seconds: list[float] = []


def jax_contender(function: Callable, inputs: Sequence[jax.Array], cotangents: Any) -> Contender:
    """A function of JAX, compiled with its gradients; `cotangents` are like its outputs."""

    def differentiate(inputs, cotangents):
        outputs, backward = jax.vjp(function, *inputs)
        return outputs, backward(cotangents)

    inputs = tuple(inputs)
    compiled = jax.jit(differentiate).lower(inputs, cotangents).compile()

    def run(keep: bool) -> tuple[float, list | None]:
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(inputs, cotangents))
        seconds = time.perf_counter() - start
        return seconds, [np.asarray(x) for x in jax.tree.leaves(result)] if keep else None

    return Contender(run, compiled.memory_analysis().temp_size_in_bytes / 2**20)


def absolute(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(found - expected).max())


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest entry."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def take_turns(make: dict[str, Callable[[], Contender]], apart: Callable | None = absolute) -> dict[str, dict]:
    """Times all contenders in turn. They must compute what the first one computes, if it is said how far is `apart`."""
    contenders, errors = {}, {}
    for name, start in make.items():
        contenders[name] = start()
        print(f"  {name}: first run {contenders[name].first:.3f} s", flush=True)
    reference = next(iter(contenders.values())).result
    for name, each in contenders.items():
        if apart is not None:
            errors[name] = max(apart(a, b) for a, b in zip(each.result, reference, strict=True))
            if not errors[name] <= TOLERANCE:
                raise SystemExit(f"{name} computes something else: differs by {errors[name]:.2e}")
        each.result = None
    for repeat in range(REPEATS):
        for each in contenders.values():
            if repeat < each.repeats:
                time.sleep(PAUSE)
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


def fit_exponents(rows: dict[str, dict], fields: Sequence[str] = ("seconds", "temporary_mib")) -> dict[str, float]:
    """The exponents of time and memory, of rows by length."""
    lengths = [int(name) for name in rows]
    return {f"exponent of {field}": fit_exponent(lengths, [row[field] for row in rows.values()]) for field in fields}


def print_table(title: str, part: dict) -> None:
    """The contenders of a part, and what it found."""
    table = Table("", "seconds", "temporary MiB", "differs by", title=title)
    for name, row in part["contenders"].items():
        memory, error = row["temporary_mib"], row["differs_by"]
        cells = ("" if memory is None else f"{memory:.1f}"), ("" if error is None else f"{error:.1e}")
        table.add_row(name, f"{row['seconds']:.3f}", *cells)
    Console(width=120).print(table)
    for name, ratio in part["ratios"].items():
        print(f"{name}: {ratio:.3g}", flush=True)
