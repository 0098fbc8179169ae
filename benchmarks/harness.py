"""The shared parts of benchmarks: cases and inputs, timing in alternation, other processes, tables and facts.

Workers that run under another Python interpreter import this module too, so it imports JAX, sparsejax and rich only
where they are used.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "triton")

# Sizes of the CPU benchmarks, shared with the contenders in other processes.
THREADS = 2
HEADS, WIDTH = 8, 64
RADIUS = 256  # keys on either side of a query
BIG_BIRD_TILE, RANDOM_TILES = 64, 3
LEFT, SINK = 4095, 128  # the mask of the layouts: causal & (window(LEFT) | sink(SINK))

REPETITIONS, QUICK_REPETITIONS = 7, 2  # timed runs
SLOW, SLOW_REPETITIONS = 5.0, 3  # timed runs if the first takes longer than SLOW seconds
PAUSE = 0.5  # seconds before a run: the threads of the previous contender spin for a while
TOLERANCE = 1e-4  # between results of contenders

Save = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention call on arrays of shape [1, t, heads, width].

    Attributes:
      heads: Number of query heads and of key/value heads.
      options: Whether the call has softcap, sink logits and segments.
      tile: Tokens per query tile and per key tile; the kernel chooses by default.
      choice: Number of blocks that each query chooses per key/value head, and keys per block; None for all keys. With
        `options`, blocks are counted from the start of each segment.
    """

    pattern: str
    t: int = 16_384
    heads: tuple[int, int] = (16, 16)
    width: int = 128
    dtype: str = "bfloat16"
    options: bool = False
    tile: int | None = None
    choice: tuple[int, int] | None = None

    def __str__(self):
        pattern = self.pattern if len(self.pattern) < 90 else f"{self.pattern[:87]}..."
        heads = f"{self.heads[0]}" if self.heads[0] == self.heads[1] else f"{self.heads[0]}:{self.heads[1]}"
        dtype = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        tile = "" if self.tile is None else f", tile {self.tile}"
        options = ", softcap, sink, segments" if self.options else ""
        choice = "" if self.choice is None else ", {:,} chosen blocks of {}".format(*self.choice)
        return f"{pattern}, {self.t:,} x {heads} heads of {self.width}{dtype}{tile}{options}{choice}"


def draw_arrays(length: int) -> list[np.ndarray]:
    """Draws queries, keys, values and the cotangent of the output, each [1, length, HEADS, WIDTH]."""
    random = np.random.default_rng(0)
    return [random.standard_normal((1, length, HEADS, WIDTH), np.float32) for _ in range(4)]


def pin_cores() -> list[int]:
    """Pins this process and its children to THREADS cores; call it before a thread pool starts."""
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    os.sched_setaffinity(0, cores)
    return cores


def describe_machine() -> dict[str, Any]:
    """Returns the command line, the date, the machine with its load, and the versions of Python and of packages."""
    installed = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {p: installed[p] for p in PACKAGES if p in installed},
    }


# Timing.


def timed(work: Callable[[], object]) -> float:
    """Calls a function; returns the seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(
    runs: Mapping[Any, Callable[[], float]], repetitions: int, pause: float = 0.0
) -> dict[Any, dict[str, Any]]:
    """Repeats runs in alternation, so that other load on the machine affects all of them.

    Args:
      runs: Functions that return their seconds, by name.
      repetitions: Number of calls of each function; SLOW_REPETITIONS at most if the first takes longer than SLOW.
      pause: Seconds to wait before each call.

    Returns:
      Per name the median `seconds` and those of all `runs`.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions):
        for name, run in runs.items():
            if repetition < SLOW_REPETITIONS or seconds[name][0] <= SLOW:
                time.sleep(pause)
                seconds[name].append(run())
    return {name: {"seconds": statistics.median(values), "runs": values} for name, values in seconds.items()}


class Contender:
    """A function to time. `run(keep)` runs it forward and backward; returns seconds and, if kept, results."""

    def __init__(self, run: Callable[[bool], tuple[float, list | None]], temporary_mib: float | None = None):
        self.run, self.temporary_mib = run, temporary_mib
        self.first, self.result = run(True)  # loads and allocates


def jax_contender(function: Callable, inputs: Sequence[Any], cotangents: Any) -> Contender:
    """A JAX function, compiled together with its gradients; `cotangents` have the structure of its outputs."""
    import jax

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


def race(
    make: Mapping[str, Callable[[], Contender]],
    error: Callable[[np.ndarray, np.ndarray], float] | None = absolute_error,
    quick: bool = False,
    pause: float = PAUSE,
) -> dict[str, dict[str, Any]]:
    """Times contenders in alternation.

    Args:
      make: Constructors of the contenders, by name.
      error: Compares the results with those of the first contender; None skips the comparison.
      quick: Whether to repeat less, without pauses.
      pause: Seconds before each run.
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
    runs = {name: lambda contender=contender: contender.run(False)[0] for name, contender in contenders.items()}
    return {
        name: row | {"temporary_mib": contenders[name].temporary_mib, "differs_by": errors.get(name)}
        for name, row in alternate(runs, *((QUICK_REPETITIONS,) if quick else (REPETITIONS, pause))).items()
    }


def fit_exponents(rows: dict[str, dict], fields: Sequence[str] = ("seconds", "temporary_mib")) -> dict[str, float]:
    """Fits time and memory of rows by length as powers of the length."""
    from sparsejax.complexity import fit_exponent

    lengths = [int(name) for name in rows]
    return {f"exponent of {field}": fit_exponent(lengths, [row[field] for row in rows.values()]) for field in fields}


# Parts of a benchmark.


def add_parts(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """Adds `--only`."""
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to measure; all by default")


def run_parts(measures: Mapping[str, Callable[[], list[dict]]], only: Sequence[str], save: Save) -> None:
    """Measures parts; prints the contenders and ratios of their results, and saves the record after every part."""
    record: dict[str, list[dict]] = {}
    for part in only:
        print(f"{part}:", flush=True)
        record[part] = measures[part]()
        for result in record[part]:
            print_rows([{"": name} | row for name, row in result["contenders"].items()], result["title"])
            for name, ratio in result["ratios"].items():
                print(f"{name}: {ratio:.3g}", flush=True)
        save(record)


# Other processes.


class OtherProcess:
    """A worker module under another Python interpreter; its docstring lists the requests."""

    def __init__(self, python: str, module: str, **variables: str):
        quiet = {"OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        environment = os.environ | quiet | variables
        self.process = subprocess.Popen([python, "-m", module], stdin=pipe, stdout=pipe, text=True, env=environment)

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def request(self, **fields: object) -> dict:
        """Sends a request and returns the response, `{"error": ...}` if it fails or the process died."""
        try:
            self.process.stdin.write(json.dumps(fields) + "\n")
            self.process.stdin.flush()
            response = self.process.stdout.readline()
        except BrokenPipeError:
            response = ""
        return json.loads(response) if response else {"error": f"{self.process.args[-1]} ended"}


def serve(actions: Mapping[str, Callable[..., dict]], errors: tuple[type[Exception], ...] = ()) -> None:
    """Serves requests of an `OtherProcess`, one JSON line each, until standard input ends.

    Args:
      actions: Functions of the fields of a request, by its field `do`.
      errors: Exceptions that become the response `{"error": ...}`.
    """
    responses, sys.stdout = sys.stdout, sys.stderr  # output of libraries is not a response
    for line in sys.stdin:
        request = json.loads(line)
        try:
            response = actions[request.pop("do")](**request)
        except errors as error:
            response = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(response), file=responses, flush=True)


# Tables.


def print_rows(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Prints rows with the same keys as a table; lists are left out."""
    from rich.console import Console
    from rich.table import Table

    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(format_cell(row.get(name)) for name in columns))
    Console(width=150).print(table)


def format_cell(value: object) -> str:
    """Formats a value with three significant digits; None is empty."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_markdown(heading: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """Writes a Markdown table; all columns but the first `text_columns` are aligned to the right."""
    marks = ["---"] * text_columns + ["---:"] * (len(heading) - text_columns)
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (heading, marks, *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
