"""Advice on a schedule before it runs: what its patterns cannot do over a sequence of a given length.

Everything is found out from what the patterns say of themselves, so that a new pattern is advised on like the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from sparsejax.patterns.drawing import name_ranges
from sparsejax.patterns.library import FARTHEST, FOREVER
from sparsejax.patterns.base import Pattern
from sparsejax.patterns.receptive_field import MOST_LAYERS, layers_to_cover, sizes, looks_ahead, limit

PROBES = 64  # positions that a token must see, and be seen from, to be looked at as a global one

Named = Sequence[tuple[str, Pattern]]


def lint_schedule(layers: Named, n: int) -> list[str]:
    """Warnings about a schedule, one line each, that name the layers they are about.

    Args:
      layers: name and pattern of each layer, in order; numbered from 0.
      n: tokens of a sequence.
    """
    if n < 1 or not layers:
        return []
    return [*_short_reach(layers, n), *_late_layers(layers, n), *_causal_globals(layers, n), *_dense_layers(layers, n)]


def _short_reach(layers: Named, n: int) -> Iterator[str]:
    """A position that does not see all it may, and whether more layers like these would help."""
    stack = [pattern for _, pattern in layers]
    ahead = looks_ahead(stack)
    # The last position has the longest way to go; but it can be a token of its own kind, as an ordinary one is not.
    possible = {position: n if ahead else position + 1 for position in sorted({n // 2, n - 1})}
    sizes = {position: int(sizes(stack, n, position)[-1]) for position in possible}
    position = max(possible, key=lambda place: (possible[place] - sizes[place], place))
    if sizes[position] == possible[position]:
        return
    reached, settled = limit(stack, n, position)
    every, size = _name_layers(layers, range(len(layers))), int(reached.sum())
    if size == possible[position]:
        needed = layers_to_cover(stack, n, position)
        remedy = f"it takes {needed:,} layers of this schedule"
    elif not settled:
        remedy = f"{MOST_LAYERS:,} layers of this schedule are too few"
    else:
        remedy = "and at no depth more" if size == sizes[position] else f"and at any depth {size:,}"
    yield (
        f"{every}: position {position:,} is reached by {sizes[position]:,} of the {possible[position]:,} inputs that it"
        f" could see; {remedy}"
    )
    if settled and size < possible[position]:
        yield from _closed_set(every, np.flatnonzero(reached), position)


def _closed_set(every: str, reached: np.ndarray, position: int) -> Iterator[str]:
    """What the set (int [n], ascending) looks like that a position never gets out of."""
    stride = math.gcd(*(reached - position).tolist())
    if stride > 1:
        yield (
            f"{every}: position {position:,} is only ever reached from multiples of {stride} away:"
            " positions of different residues never mix"
        )
    elif len(reached) == reached[-1] - reached[0] + 1:
        yield f"{every}: none ever leaves its chunk, for position {position:,} tokens {reached[0]:,} to {reached[-1]:,}"


def _late_layers(layers: Named, n: int) -> Iterator[str]:
    """Last layers that show the last position nothing new.

    In a schedule with a layer that sees everything by itself this is no news: there the others are for something else.
    """
    stack = [pattern for _, pattern in layers]
    if any(sizes([pattern], n)[-1] == n for pattern in set(stack)):
        return
    sizes = sizes(stack, n)
    first = int(np.flatnonzero(sizes == sizes[-1])[0])
    if first < len(layers):
        seen = "all" if sizes[-1] == n else "the same"
        late = _name_layers(layers, range(first, len(layers)))
        yield f"{late}: nothing new is seen: {seen} {sizes[-1]:,} inputs reach the last position without"


def _causal_globals(layers: Named, n: int) -> Iterator[str]:
    """Global tokens in a layer that looks at the past only: they cannot carry what comes after them."""
    for pattern, numbers in _each(layers):
        count = sum(_count_globals(part, n) for head in _heads(pattern) for part in set(_parts(head)))
        if count and not looks_ahead([pattern]):
            yield (
                f"{_name_layers(layers, numbers)}: global tokens in a causal layer see only what is before them:"
                " they relay nothing of the rest"
            )


def _count_globals(pattern: Pattern, n: int) -> int:
    """How many global tokens the pattern is made of: they see all and all see them, and it has no other pairs."""
    places = np.arange(n)
    probes = np.unique(np.linspace(0, n - 1, PROBES, dtype=np.int64))
    sees = pattern.allows(places[:, None], probes[None], n, n).all(axis=1)
    seen = pattern.allows(probes[:, None], places[None], n, n).all(axis=0)
    count = int((sees & seen).sum())
    return count if 0 < count < n and pattern.pairs(n) == n * n - (n - count) ** 2 else 0


def _dense_layers(layers: Named, n: int) -> Iterator[str]:
    """Patterns that leave keys out in a longer sequence, but not in this one."""
    for pattern, numbers in _each(layers):
        for head in dict.fromkeys(_heads(pattern)):
            dense = n * n if looks_ahead([head]) else n * (n + 1) // 2
            # No pattern has a number this large, so that such a key is forgotten unless all keys are kept.
            forgets = head.last_query(np.array([2 * FARTHEST])) < FOREVER
            if n > 1 and forgets and head.pairs(n) == dense:
                yield f"{_name_layers(layers, numbers)}: {head} leaves nothing out of {n:,} tokens: it is dense"


def _each(layers: Named) -> Iterator[tuple[Pattern, list[int]]]:
    """Each distinct pattern with the numbers of its layers."""
    for pattern in dict.fromkeys(pattern for _, pattern in layers):
        yield pattern, [number for number, (_, other) in enumerate(layers) if other == pattern]


def _heads(pattern: Pattern) -> list[Pattern]:
    return [pattern] if pattern.heads is None else [pattern.for_head(i) for i in range(pattern.heads)]


def _parts(pattern: Pattern) -> Iterator[Pattern]:
    """The named patterns that an expression joins."""
    terms = getattr(pattern, "terms", None)
    yield from [pattern] if terms is None else itertools.chain.from_iterable(_parts(term) for term in terms)


def _name_layers(layers: Named, numbers: Sequence[int]) -> str:
    """`layer 3 (local)`, or `layers 0-2, 4 (local, full)`."""
    shown = ", ".join(name_ranges(list(numbers)))
    names = ", ".join(dict.fromkeys(layers[number][0] for number in numbers))
    return f"{'layer' if len(numbers) == 1 else 'layers'} {shown} ({names})"
