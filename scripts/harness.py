"""Times contenders in alternation, so that other load on the machine affects all of them, and tabulates the result."""

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

REPEATS, SLOW_REPEATS = 7, 3  # timed runs after the first; SLOW_REPEATS if the first takes longer than SLOW seconds
SLOW = 5.0
PAUSE = 0.5  # seconds before a run: the threads of the previous contender spin for a while
TOLERANCE = 1e-4  # between results


class Contender:
    """A function to time. `run(keep)` runs it forward and backward; returns seconds and, if kept, results."""

    def __init__(self, run: Callable[[bool], tuple[float, list | None]], temporary_mib: float | None = None):
        self.run, self.temporary_mib = run, temporary_mib
        self.first, self.result = run(True)  # loads and allocates
        self.repeats = SLOW_REPEATS if self.first > SLOW else REPEATS
        self.seconds: list[float] = []


def jax_contender(function: Callable, inputs: Sequence[jax.Array], cotangents: Any) -> Contender:
    """A JAX function, compiled together with its gradients; `cotangents` have the structure of its outputs."""

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


def absolute_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute error."""
    return float(np.abs(actual - expected).max())


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute error relative to the largest expected entry."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def time_alternating(
    make: dict[str, Callable[[], Contender]], error: Callable | None = absolute_error
) -> dict[str, dict]:
    """Times all contenders in alternation.

    Args:
      make: constructors of the contenders by name.
      error: compares the results with those of the first contender; None skips the comparison.
    """
    contenders, errors = {}, {}
    for name, start in make.items():
        contenders[name] = start()
        print(f"  {name}: first run {contenders[name].first:.3f} s", flush=True)
    reference = next(iter(contenders.values())).result
    for name, contender in contenders.items():
        if error is not None:
            errors[name] = max(error(a, b) for a, b in zip(contender.result, reference, strict=True))
            if not errors[name] <= TOLERANCE:
                raise SystemExit(f"{name}: result differs from the reference by {errors[name]:.2e}")
        contender.result = None
    for repeat in range(REPEATS):
        for contender in contenders.values():
            if repeat < contender.repeats:
                time.sleep(PAUSE)
                contender.seconds.append(contender.run(False)[0])
    return {
        name: {
            "seconds": statistics.median(contender.seconds),
            "runs": contender.seconds,
            "temporary_mib": contender.temporary_mib,
            "differs_by": errors.get(name),
        }
        for name, contender in contenders.items()
    }


def fit_exponents(rows: dict[str, dict], fields: Sequence[str] = ("seconds", "temporary_mib")) -> dict[str, float]:
    """Fits time and memory of rows by length as powers of the length."""
    lengths = [int(name) for name in rows]
    return {f"exponent of {field}": fit_exponent(lengths, [row[field] for row in rows.values()]) for field in fields}


def print_table(title: str, part: dict) -> None:
    """Prints the contenders of a part and their ratios."""
    table = Table("", "seconds", "temporary MiB", "differs by", title=title)
    for name, row in part["contenders"].items():
        memory, error = row["temporary_mib"], row["differs_by"]
        cells = ("" if memory is None else f"{memory:.1f}"), ("" if error is None else f"{error:.1e}")
        table.add_row(name, f"{row['seconds']:.3f}", *cells)
    Console(width=120).print(table)
    for name, ratio in part["ratios"].items():
        print(f"{name}: {ratio:.3g}", flush=True)
