"""Growth of the cost of each method with the sequence length: formula, exact count and measurement."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import patterns
from sparsejax.ops import (
    Index,
    Selection,
    attend,
    attend_hashed,
    hash_buckets,
    hashed_pairs,
    moba,
    nsa,
    nsa_pairs,
    select_indexed,
    selective_scan,
    ssd,
    top_tokens,
)
from sparsejax.ops.blocks import make_blocks, make_windows
from sparsejax.patterns import Pattern

LENGTHS = {"dense": (2048, 4096, 8192)}  # measured lengths by implementation
OTHER_LENGTHS = (4096, 8192, 16384)  # measured lengths of other implementations
MIN_RUNS, MIN_SECONDS = 3, 0.5  # per measurement
TABLE_LENGTH = 131_072  # default length of the pairs in the table
HEAD_WIDTH, CHANNELS, STATE = 32, 32, 16
ROUNDS, HASH_CHUNK, BUCKETS = 4, 64, 128  # of LSH attention; a chunk attends to itself and to the preceding one
LENGTH, STRIDE, BLOCK, SELECTED, WINDOW = 32, 16, 64, 16, 512  # of NSA: windows and their stride, blocks, the window
KEYS, MOBA_BLOCK, MSA_BLOCK = 512, 64, 128  # of the other selections: keys per query, and keys per block
CAUSAL = patterns.Causal()


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      name: Name of the method.
      formula: Number of pairs as a function of n; "~" means that the edges of the sequence are neglected.
      pattern: Text of the pattern, where {root} stands for the integer square root of n; None without a pattern.
      impl: Implementation of `attend`, or a key of `OTHERS`.
    """

    name: str
    formula: str
    pattern: str | None
    impl: str = "gather"

    def parse(self, n: int) -> Pattern | None:
        """The pattern for n tokens."""
        return None if self.pattern is None else patterns.parse(self.pattern.format(root=math.isqrt(n)))

    def pairs(self, n: int) -> int:
        """Number of pairs over n tokens: those scored to choose keys, and those attended; of LSH with masked ones."""
        if self.impl in COUNTS:
            return COUNTS[self.impl](n)
        pattern = self.parse(n)
        return 0 if pattern is None else pattern.pairs(n)


METHODS = [
    Method("dense", "n²", "full", "dense"),
    Method("dense, causal", "n(n + 1) / 2", "causal", "dense"),
    Method("window", "256 n - 32,640", "causal & window(255)"),
    Method("dilated", "256 n - 130,560", "causal & dilated(255, stride=4)"),
    Method("strided", "~1.5 n√n", "causal & (window({root}) | strided({root}))", "segment"),
    Method("fixed", "~n√n", "causal & (chunk({root}) | fixed({root}, 1))", "segment"),
    Method("Longformer", "~(257 + 2·4) n", "window(128, 128) | globals(4)"),
    Method("BigBird", "640 n - 73,728", str(patterns.recipes.bigbird(64, 3, seed=0))),
    Method("chunk", "257 n / 2", "causal & chunk(256)"),
    Method("Reformer", "512 n, and a sort", None, "lsh"),
    Method("top-k", "n(n + 1) / 2 + 512 n - 130,816", None, "top_k"),
    Method("DSA", "n(n + 1) / 2 + 512 n - 130,816", None, "dsa"),
    Method("MSA", "n(n + 1) / 2 + 448.5 n - 98,304", None, "msa"),
    Method("MoBA", "n²/128 + 480 n - 114,688", None, "moba"),
    Method("NSA", "~n²/32 + 1,504 n - 655,360", None, "nsa"),
    Method("SSM", "0, and n steps of a state", None, "scan"),
    Method("linear", "0, and n steps of a state", None, "ssd"),
]


@dataclasses.dataclass(frozen=True)
class Growth:
    """Time in seconds and memory in bytes of a forward and backward pass, by length in tokens."""

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    memory: tuple[int, ...]

    @property
    def time_exponent(self) -> float:
        """Exponent of the power law of time."""
        return fit_exponent(self.lengths, self.seconds)

    @property
    def memory_exponent(self) -> float:
        """Exponent of the power law of memory."""
        return fit_exponent(self.lengths, self.memory)


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of the power law c·n^p, fitted by least squares of logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def tabulate(n: int, growth: dict[str, Growth] | None = None) -> list[tuple[str, ...]]:
    """The heading and the rows of the table at n tokens, with the exponents of `growth`, by name of the method."""
    causal = patterns.parse("causal").pairs(n)
    rows: list[tuple[str, ...]] = [("method", "pattern", "pairs", f"pairs, n = {n:,}", "of dense causal")]
    for method in METHODS:
        pattern, pairs = method.parse(n), method.pairs(n)
        share = f"1/{causal / pairs:,.2f}" if 0 < pairs < causal else f"{pairs / causal:,.2f}"
        rows.append((method.name, str(pattern or "-"), method.formula, f"{pairs:,}", share))
    if growth is None:
        return rows
    measured = [growth[method.name] for method in METHODS]
    exponents = [(f"n^{growth.time_exponent:.2f}", f"n^{growth.memory_exponent:.2f}") for growth in measured]
    return [(*row, *columns) for row, columns in zip(rows, [("time", "memory"), *exponents], strict=True)]


def measure(method: Method, lengths: Sequence[int] = ()) -> Growth:
    """Measures one head, forward and backward, on this machine.

    Args:
      method: The method.
      lengths: Lengths in tokens; defaults to those of its implementation.

    Returns:
      The shortest time of several runs, and the temporary memory of the compiled program.
    """
    seconds, memory, lengths = [], [], lengths or LENGTHS.get(method.impl, OTHER_LENGTHS)
    for n in lengths:
        pattern = method.parse(n)
        function, arrays = OTHERS[method.impl](n) if pattern is None else _attention(pattern, method.impl, n)
        run = jax.jit(jax.grad(function, tuple(range(len(arrays))))).lower(*arrays).compile()
        analysis = run.memory_analysis()
        assert analysis is not None  # all supported platforms have it
        memory.append(analysis.temp_size_in_bytes)
        seconds.append(_time(run, arrays))
    return Growth(tuple(lengths), tuple(seconds), tuple(memory))


def _attention(pattern: Pattern, impl: str, n: int) -> tuple[Callable, list]:
    arrays = [_draw(seed, 1, n, 1, HEAD_WIDTH) for seed in range(3)]
    return lambda q, k, v: jnp.square(attend(q, k, v, pattern, impl=impl)).sum(), arrays


def _scan(n: int) -> tuple[Callable, list]:
    x, B, C = _draw(0, 1, n, CHANNELS), _draw(1, 1, n, STATE), _draw(2, 1, n, STATE)
    dt, A = jnp.full_like(x, 0.01), -jnp.ones((CHANNELS, STATE))
    return lambda *arrays: jnp.square(selective_scan(*arrays)[0]).sum(), [x, dt, A, B, C]


def _ssd(n: int) -> tuple[Callable, list]:
    """Lightning attention: the decay is constant."""
    v, k, q = (_draw(seed, 1, n, 1, HEAD_WIDTH) for seed in range(3))
    steps, rates = jnp.ones((1, n, 1)), jnp.full(1, -0.05)
    return lambda v, k, q: jnp.square(ssd(v, steps, rates, k, q)[0]).sum(), [v, k, q]


def _lsh(n: int) -> tuple[Callable, list]:
    qk, v = _draw(0, 1, n, 1, HEAD_WIDTH), _draw(1, 1, n, 1, HEAD_WIDTH)
    rotations = _draw(2, 1, HEAD_WIDTH, ROUNDS, BUCKETS // 2)

    def attention(qk: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.square(attend_hashed(qk, v, hash_buckets(qk, rotations, (BUCKETS,)), chunk=HASH_CHUNK)).sum()

    return attention, [qk, v]


def _nsa(n: int) -> tuple[Callable, list]:
    """Means of windows, and the same keys and values in all branches."""
    windows, blocks = make_windows(n, LENGTH, STRIDE), make_blocks(n, BLOCK)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        means = (windows.split(x).mean(axis=2) for x in (k, v))
        distant, selection = nsa(q, *means, windows, blocks, SELECTED, CAUSAL)
        near = attend(q, k, v, CAUSAL & patterns.Window(WINDOW - 1), impl="gather")
        return jnp.square(distant + attend(q, k, v, CAUSAL, impl="gather", selection=selection) + near).sum()

    return attention, [_draw(seed, 1, n, 1, HEAD_WIDTH) for seed in range(3)]


def _selected(select: Callable[[jax.Array, jax.Array], Selection], n: int) -> tuple[Callable, list]:
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.square(attend(q, k, v, CAUSAL, impl="gather", selection=select(q, k))).sum()

    return attention, [_draw(seed, 1, n, 1, HEAD_WIDTH) for seed in range(3)]


def _indexed(block: int, n: int) -> tuple[Callable, list]:
    """Keys, or blocks of keys with that of the query, by an index head as wide as the attention."""
    index = Index(_draw(3, 1, n, 1, HEAD_WIDTH), _draw(4, 1, n, HEAD_WIDTH), relu=False)
    blocks, local = make_blocks(n, block), int(block > 1)
    return _selected(lambda *_: select_indexed(index, KEYS // block, CAUSAL, blocks=blocks, local=local), n)


OTHERS = {
    "top_k": functools.partial(_selected, lambda q, k: top_tokens(q, k, KEYS, CAUSAL)),
    "dsa": functools.partial(_indexed, 1),
    "msa": functools.partial(_indexed, MSA_BLOCK),
    "moba": functools.partial(_selected, lambda q, k: moba(q, k, MOBA_BLOCK, KEYS // MOBA_BLOCK, CAUSAL)),
    "nsa": _nsa,
    "scan": _scan,
    "ssd": _ssd,
    "lsh": _lsh,
}


def _attended(n: int, block: int = 1) -> int:
    """Keys of the chosen blocks, with that of the query, over n queries."""
    t = np.arange(n)
    return int((t % block + 1 + np.minimum(t // block, KEYS // block - 1) * block).sum())


COUNTS: dict[str, Callable[[int], int]] = {
    "lsh": lambda n: hashed_pairs(n, ROUNDS, HASH_CHUNK),
    "nsa": lambda n: nsa_pairs(n, LENGTH, STRIDE, BLOCK, SELECTED, WINDOW),
    "moba": lambda n: int((np.arange(n) // MOBA_BLOCK).sum()) + _attended(n, MOBA_BLOCK),
    "msa": lambda n: CAUSAL.pairs(n) + _attended(n, MSA_BLOCK),
    **dict.fromkeys(("top_k", "dsa"), lambda n: CAUSAL.pairs(n) + _attended(n)),
}


def _draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _time(run: Callable, arrays: list) -> float:
    times: list[float] = []
    while len(times) < MIN_RUNS or sum(times) < MIN_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(time.perf_counter() - start)
    return min(times)
