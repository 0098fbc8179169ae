"""Receptive fields: which inputs can influence which outputs through a stack of layers.

A layer is given by its pattern. Every layer also keeps each position through its residual connection, and a layer whose
pattern has heads combines what any head attends to. A receptive field is then a product of boolean matrices, which
`matrix` computes as such for small n. The other functions walk backward from one position, tile by tile: a step marks
all keys of the marked positions. Marks only grow, so each position is followed once per distinct pattern whatever the
depth, and the work is proportional to the live tiles of the patterns, never to n * n.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sparsejax.patterns.base import Pattern, PatternError
from sparsejax.patterns.layout import TILES_AT_ONCE, group_tiles, tile_masks
from sparsejax.patterns.spans import Spans

MAX_LAYERS = 1000  # depth to which a repeated schedule is followed


def trace(layers: Sequence[Pattern], n: int, position: int | None = None) -> np.ndarray:
    """The receptive field of one output, layer by layer.

    Args:
      layers: The patterns of the layers from input to output.
      n: Sequence length in tokens.
      position: The output, counted from 0; defaults to the last position.

    Returns:
      bool [layers + 1, n]. Row l marks the positions before layer l that can influence the output: row 0 the inputs,
      the last row the position alone.
    """
    marked = [np.arange(n) == _check(n, position), *_walk(layers[::-1], n, position)]
    return np.stack(marked[::-1])


def sizes(layers: Sequence[Pattern], n: int, position: int | None = None) -> np.ndarray:
    """Number of inputs that can influence a position after each layer.

    Args:
      layers: The patterns of the layers from input to output.
      n: Sequence length in tokens.
      position: The output, counted from 0; defaults to the last position.

    Returns:
      int64 [layers + 1]: the sizes after the first 0, 1, ... layers.
    """
    _check(n, position)
    numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(layers))}
    backward = [numbers[pattern] for pattern in layers][::-1]
    counts = np.ones(len(layers) + 1, np.int64)
    walks: list[tuple[list[int], list[int]]] = []
    for depth in range(len(layers), 0, -1):
        remaining = backward[len(layers) - depth :]
        # A walk that begins like a longer walk, as in a schedule that repeats itself, was already taken.
        walked = next((walked for longer, walked in walks if longer[:depth] == remaining), None)
        if walked is None:
            walked = [int(marked.sum()) for marked in _walk(layers[depth - 1 :: -1], n, position)]
            walks.append((remaining, walked))
        counts[depth] = walked[depth - 1]
    return counts


def limit(
    layers: Sequence[Pattern], n: int, position: int | None = None, max_layers: int = MAX_LAYERS
) -> tuple[np.ndarray, bool]:
    """The inputs that can influence a position if the schedule is repeated without end.

    Returns:
      bool [n], and whether more layers add nothing. If False, `max_layers` layers did not decide.
    """
    before, unchanged = np.arange(n) == _check(n, position), 0
    for marked in itertools.islice(_walk(itertools.cycle(layers[::-1]), n, position), max_layers):
        unchanged = unchanged + 1 if np.array_equal(marked, before) else 0
        before = marked
        if marked.all() or unchanged == len(layers):
            return marked, True
    return before, not layers


def layers_to_cover(
    layers: Sequence[Pattern], n: int, position: int | None = None, max_layers: int = MAX_LAYERS
) -> int | None:
    """The fewest layers through which a position receives every input that it can: all n, or its past if causal.

    The schedule is repeated and may be cut anywhere.

    Returns:
      The number of layers; None if it exceeds `max_layers`.
    """
    required = n if looks_ahead(layers) else _check(n, position) + 1
    if required == 1 or limit(layers, n, position, max_layers)[0].sum() < required:
        return 0 if required == 1 else None
    period = next(p for p in range(1, len(layers) + 1) if list(layers) == list(layers[:p]) * (len(layers) // p))
    fewest = max_layers + 1
    for last in range(period):  # the layer of the period at which the stack ends
        backward = itertools.cycle([layers[(last - i) % period] for i in range(period)])
        walk = itertools.islice(enumerate(_walk(backward, n, position)), fewest - 1)
        depths = (number + 1 for number, marked in walk if number % period == last and marked.sum() == required)
        fewest = min(next(depths, fewest), fewest)
    return fewest if fewest <= max_layers else None


def matrix(layers: Sequence[Pattern], n: int) -> np.ndarray:
    """Which output depends on which input, bool [outputs, inputs], for small n."""
    return list(matrices(layers, n))[-1]


def matrices(layers: Iterable[Pattern], n: int) -> Iterator[np.ndarray]:
    """`matrix` of the first 0, 1, ... layers."""
    reached = np.eye(n, dtype=bool)
    yield reached
    for pattern in layers:
        mask = pattern.dense(n).reshape(-1, n, n).any(axis=0)
        reached = reached | (mask.astype(np.float32) @ reached.astype(np.float32) > 0)
        yield reached


def unreachable_pairs(layers: Sequence[Pattern], n: int) -> int:
    """Number of pairs (output, input) that no path joins, for small n; of causal layers, the pairs in the past."""
    unreachable = ~matrix(layers, n)
    return int(unreachable.sum() if looks_ahead(layers) else np.tril(unreachable).sum())


def looks_ahead(layers: Iterable[Pattern]) -> bool:
    """Whether a layer may attend to later positions."""
    return any(pattern.lookahead() > 0 for pattern in layers)


def _check(n: int, position: int | None) -> int:
    position = n - 1 if position is None else position
    if not 0 <= position < n:
        raise PatternError("position", f"{position} is outside a sequence of {n} tokens")
    return position


def _walk(layers: Iterable[Pattern], n: int, position: int | None) -> Iterator[np.ndarray]:
    """The marked positions, bool [n], before each of the layers, from the last layer to the first."""
    marked = np.arange(n) == _check(n, position)
    followed: dict[Pattern, np.ndarray] = {}  # the positions whose keys in this pattern are already marked
    for pattern in layers:
        queries = marked.copy()
        for head in set(pattern.by_head()) if not marked.all() else ():
            new = queries & np.logical_not(followed.get(head, False))
            if new.any():
                _links(head, n).mark_keys(new, marked)
            followed[head] = queries
        yield marked.copy()


@functools.lru_cache(maxsize=256)
def _links(pattern: Pattern, n: int) -> _Links:
    return _Links(pattern, n)


class _Links:
    """A pattern without heads over n tokens, prepared for finding the keys of marked queries."""

    def __init__(self, pattern: Pattern, n: int):
        (layout,) = pattern.layouts(n)
        self._pattern, self._layout, self._rows = pattern, layout, layout.rows
        partial = ~layout.full
        self._group = np.full(len(partial), -1)
        _, self._group[partial] = group_tiles(pattern, layout.grid, self._rows[partial], layout.columns[partial])

    def mark_keys(self, queries: np.ndarray, marked: np.ndarray) -> None:
        """Marks in `marked` (bool [n], in place) every key to which one of the `queries` (bool [n]) attends."""
        layout = self._layout
        active, keys = _in_tiles(queries, layout.grid.tile[0]), _in_tiles(marked, layout.grid.tile[1])
        rows = np.flatnonzero(active.any(axis=1))
        live = Spans.union(layout.starts[rows], layout.starts[rows + 1], len(layout.columns)).members()
        keys[layout.columns[live[layout.full[live]]]] = True
        partial = live[~layout.full[live]]
        partial = partial[~keys[layout.columns[partial]].all(axis=1)]
        self._mark_partial(partial, active, keys)
        marked |= keys.ravel()[: len(marked)]

    def _mark_partial(self, tiles: np.ndarray, active: np.ndarray, keys: np.ndarray) -> None:
        """Marks in `keys` the keys of active queries in partial tiles, once per distinct tile and set of queries."""
        rows, columns = self._rows[tiles], self._layout.columns[tiles]
        bits = np.packbits(active, axis=1)
        _, kind = np.unique(bits.view(f"V{bits.shape[1]}").ravel(), return_inverse=True)
        cases = self._group[tiles] * len(kind) + kind.ravel()[rows]
        _, first, case = np.unique(cases, return_index=True, return_inverse=True)
        attended = np.zeros((len(first), keys.shape[1]), bool)
        for start in range(0, len(first), TILES_AT_ONCE):
            batch = first[start : start + TILES_AT_ONCE]
            masks = tile_masks(self._pattern, self._layout.grid, rows[batch], columns[batch])
            attended[start : start + TILES_AT_ONCE] = (masks & active[rows[batch], :, None]).any(axis=1)
        np.logical_or.at(keys, columns, attended[case.ravel()])


def _in_tiles(marks: np.ndarray, size: int) -> np.ndarray:
    """A copy of marks, bool [n], as bool [tiles, size], padded with False."""
    return np.pad(marks, (0, -len(marks) % size)).reshape(-1, size)
