"""Warnings about a schedule before it runs: what its patterns cannot do over a sequence of a given length.

All warnings are derived from the methods of the patterns, so that they cover new patterns too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from sparsejax.patterns import receptive_field
from sparsejax.patterns.base import FOREVER, MAX_POSITION, Pattern
from sparsejax.patterns.drawing import format_ranges

PROBES = 64  # positions that a global token must attend to and be attended to from

Layers = Sequence[tuple[str, Pattern]]


def lint_schedule(layers: Layers, n: int) -> list[str]:
    """Warnings about a schedule, one line each, naming the layers.

    Args:
      layers: Name and pattern of each layer in order; numbered from 0.
      n: Sequence length in tokens.
    """
    if n < 1 or not layers:
        return []
    return [
        *_short_receptive_field(layers, n),
        *_redundant_layers(layers, n),
        *_causal_globals(layers, n),
        *_dense_layers(layers, n),
    ]


def _short_receptive_field(layers: Layers, n: int) -> Iterator[str]:
    """A position that does not receive all inputs that it could, and whether more such layers would help."""
    stack = [pattern for _, pattern in layers]
    ahead = receptive_field.looks_ahead(stack)
    # The last position has the longest way to go, but it may be special (a global token), unlike one in the middle.
    possible = {position: n if ahead else position + 1 for position in sorted({n // 2, n - 1})}
    sizes = {position: int(receptive_field.sizes(stack, n, position)[-1]) for position in possible}
    position = max(possible, key=lambda p: (possible[p] - sizes[p], p))
    if sizes[position] == possible[position]:
        return
    reached, settled = receptive_field.limit(stack, n, position)
    names, size = _name_layers(layers, range(len(layers))), int(reached.sum())
    if size == possible[position]:
        depth = receptive_field.layers_to_cover(stack, n, position)
        remedy = f"{depth:,} layers of this schedule would reach all"
    elif not settled:
        remedy = f"{receptive_field.MAX_LAYERS:,} layers of this schedule would not reach all"
    else:
        remedy = "more layers add nothing" if size == sizes[position] else f"more layers reach at most {size:,}"
    yield f"{names}: position {position:,} receives {sizes[position]:,} of {possible[position]:,} inputs; {remedy}"
    if settled and size < possible[position]:
        yield from _closed_set(names, np.flatnonzero(reached), position)


def _closed_set(names: str, reached: np.ndarray, position: int) -> Iterator[str]:
    """The structure of the set of positions (int [n], ascending) that a position never leaves."""
    stride = math.gcd(*(reached - position).tolist())
    if stride > 1:
        yield (
            f"{names}: position {position:,} only receives inputs at distances that are multiples of {stride};"
            " residues never mix"
        )
    elif len(reached) == reached[-1] - reached[0] + 1:
        yield (
            f"{names}: position {position:,} only receives inputs {reached[0]:,} to {reached[-1]:,}, through any number"
            " of layers"
        )


def _redundant_layers(layers: Layers, n: int) -> Iterator[str]:
    """Final layers that add nothing to the receptive field of the last position.

    Schedules with a layer that attends to everything are exempt: there the other layers serve another purpose.
    """
    stack = [pattern for _, pattern in layers]
    if any(receptive_field.sizes([pattern], n)[-1] == n for pattern in set(stack)):
        return
    sizes = receptive_field.sizes(stack, n)
    first = int(np.flatnonzero(sizes == sizes[-1])[0])
    if first < len(layers):
        size = f"all {n:,}" if sizes[-1] == n else f"{sizes[-1]:,}"
        names = _name_layers(layers, range(first, len(layers)))
        yield f"{names}: no effect on the receptive field of the last position, which already has {size} inputs"


def _causal_globals(layers: Layers, n: int) -> Iterator[str]:
    """Global tokens in a causal layer: they carry nothing of what comes after them."""
    for pattern, numbers in _distinct(layers):
        terms = {term for head in pattern.by_head() for term in _terms(head)}
        if any(_has_globals(term, n) for term in terms) and not receptive_field.looks_ahead([pattern]):
            yield f"{_name_layers(layers, numbers)}: causal global tokens relay nothing of what follows them"


def _has_globals(pattern: Pattern, n: int) -> bool:
    """Whether the pattern consists of global tokens: they attend to all, all attend to them, and nothing else."""
    positions = np.arange(n)
    probes = np.unique(np.linspace(0, n - 1, PROBES, dtype=np.int64))
    queries = pattern.allows(positions[:, None], probes[None], n, n).all(axis=1)
    keys = pattern.allows(probes[:, None], positions[None], n, n).all(axis=0)
    count = int((queries & keys).sum())
    return 0 < count < n and pattern.pairs(n) == n * n - (n - count) ** 2


def _dense_layers(layers: Layers, n: int) -> Iterator[str]:
    """Patterns that leave out keys of longer sequences but none of this length."""
    for pattern, numbers in _distinct(layers):
        for head in dict.fromkeys(pattern.by_head()):
            dense = n * n if receptive_field.looks_ahead([head]) else n * (n + 1) // 2
            # No argument of a pattern is this large, so that only a pattern that keeps all keys keeps this one.
            forgets = head.last_query(np.array([2 * MAX_POSITION])) < FOREVER
            if n > 1 and forgets and head.pairs(n) == dense:
                yield f"{_name_layers(layers, numbers)}: {head} is dense over {n:,} tokens"


def _distinct(layers: Layers) -> Iterator[tuple[Pattern, list[int]]]:
    """Each distinct pattern with the numbers of its layers."""
    for pattern in dict.fromkeys(pattern for _, pattern in layers):
        yield pattern, [number for number, (_, other) in enumerate(layers) if other == pattern]


def _terms(pattern: Pattern) -> Iterator[Pattern]:
    """The named patterns that an expression joins."""
    terms = getattr(pattern, "terms", None)
    yield from [pattern] if terms is None else itertools.chain.from_iterable(_terms(term) for term in terms)


def _name_layers(layers: Layers, numbers: Sequence[int]) -> str:
    """`layer 3 (local)`, or `layers 0-2, 4 (local, full)`."""
    names = ", ".join(dict.fromkeys(layers[number][0] for number in numbers))
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(format_ranges(list(numbers)))} ({names})"
