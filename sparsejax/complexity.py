"""How the cost of each method grows with the length: the formula, the exact count, and what is measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import patterns
from sparsejax.ops import attend, selective_scan
from sparsejax.patterns import Pattern

# Lengths of the measurements: what is long for the one is short for the other.
LENGTHS = {"dense": (2048, 4096, 8192), "gather": (4096, 8192, 16384)}
LEAST_RUNS, LEAST_SECONDS = 3, 0.5  # of each
TABLE_LENGTH = 131_072  # of the table's pairs, if none is given
HEAD_WIDTH, CHANNELS, STATE = 32, 32, 16


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: a pattern, or a recurrence that scores no pairs.

    `formula` is the number of pairs in n, "~" where the edges of the sequence are left out. In the text of `pattern`
    {root} stands for the square root of n, rounded down; None is a selective scan.
    """

    name: str
    formula: str
    pattern: str | None
    impl: str = "gather"

    def parse(self, n: int) -> Pattern | None:
        """The pattern over n tokens."""
        return None if self.pattern is None else patterns.parse(self.pattern.format(root=math.isqrt(n)))


METHODS = [
    Method("dense", "n²", "full", "dense"),
    Method("dense, causal", "n(n + 1) / 2", "causal", "dense"),
    Method("window", "256 n - 32,640", "causal & window(255)"),
    Method("dilated", "64 n - 8,064", "causal & dilated(63, stride=4)"),
    Method("strided", "~1.5 n √n", "causal & (window({root}) | strided({root}))"),
    Method("fixed", "~4.5 n √n", "causal & (chunk({root}) | fixed({root}, 8))"),
    Method("Longformer", "~(257 + 2·4) n", "window(128, 128) | globals(4)"),
    Method("BigBird", "~(193 + 2·64 + 3·64) n", "window(96, 96) | globals(64) | random(3, tile=64, seed=0)"),
    Method("chunk", "257 n / 2", "causal & chunk(256)"),
    Method("SSM", "0, and n steps of a state", None),
]


@dataclasses.dataclass(frozen=True)
class Growth:
    """Time and memory of a forward and backward pass at each length (tokens, seconds, bytes), and n^what they fit."""

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    memory: tuple[int, ...]

    @property
    def time_exponent(self) -> float:
        """The slope of time over length, both as logarithms."""
        return fit_exponent(self.lengths, self.seconds)

    @property
    def memory_exponent(self) -> float:
        """The slope of memory over length, both as logarithms."""
        return fit_exponent(self.lengths, self.memory)


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of the power law c·n^p that fits best, by least squares of logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def tabulate(n: int, growth: dict[str, Growth] | None = None) -> list[tuple[str, ...]]:
    """The rows of the table at n tokens, after one of headings; with the exponents if `growth` has them, by name."""
    causal = patterns.parse("causal").pairs(n)
    rows = [("method", "pattern", "pairs", f"pairs, n = {n:,}", "of dense causal")]
    for method in METHODS:
        pattern = method.parse(n)
        pairs = 0 if pattern is None else pattern.pairs(n)
        share = f"1/{causal / pairs:,.2f}" if 0 < pairs < causal else f"{pairs / causal:,.2f}"
        rows.append((method.name, str(pattern or "-"), method.formula, f"{pairs:,}", share))
    if growth is None:
        return rows
    each = [growth[method.name] for method in METHODS]
    exponents = [(f"n^{one.time_exponent:.2f}", f"n^{one.memory_exponent:.2f}") for one in each]
    return [(*row, *more) for row, more in zip(rows, [("time", "memory"), *exponents], strict=True)]


def measure(method: Method, lengths: Sequence[int] = ()) -> Growth:
    """Runs one head of `attend`, or `selective_scan`, forward and backward on this machine, at each length.

    The time is the least of some runs, the memory is what the compiled program sets aside beside its arguments.
    Without lengths, those of `LENGTHS`.
    """
    seconds, memory, lengths = [], [], lengths or LENGTHS[method.impl]
    for n in lengths:
        function, arrays = _scan(n) if method.pattern is None else _attention(method, n)
        run = jax.jit(jax.grad(function, tuple(range(len(arrays))))).lower(*arrays).compile()
        memory.append(run.memory_analysis().temp_size_in_bytes)
        seconds.append(_time(run, arrays))
    return Growth(tuple(lengths), tuple(seconds), tuple(memory))


def _attention(method: Method, n: int) -> tuple[Callable, list]:
    pattern = method.parse(n)
    arrays = [_draw(seed, 1, n, 1, HEAD_WIDTH) for seed in range(3)]
    return lambda q, k, v: jnp.square(attend(q, k, v, pattern, impl=method.impl)).sum(), arrays


def _scan(n: int) -> tuple[Callable, list]:
    x, B, C = _draw(0, 1, n, CHANNELS), _draw(1, 1, n, STATE), _draw(2, 1, n, STATE)
    dt, A = jnp.full_like(x, 0.01), -jnp.ones((CHANNELS, STATE))
    return lambda *arrays: jnp.square(selective_scan(*arrays)[0]).sum(), [x, dt, A, B, C]


def _draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _time(run: Callable, arrays: list) -> float:
    times = []
    while len(times) < LEAST_RUNS or sum(times) < LEAST_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(time.perf_counter() - start)
    return min(times)
