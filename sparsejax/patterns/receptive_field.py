"""Reach: which inputs can influence which positions through a stack of layers.

A layer is a pattern here: what a position takes from the others. Every layer also keeps the position itself, by its
residual connection, and a pattern with heads takes what any head sees. Reach is then a product of boolean matrices.
`matrix` computes it as such, for small n. The other functions walk backward from one position, tile by tile: a step
marks all keys of the marked positions. Marks only sizes, so each position is followed once through each pattern,
however many layers there are, and the work is proportional to the live tiles of the patterns and never to n * n.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sparsejax.patterns.base import Pattern, PatternError
from sparsejax.patterns.layout import COUNT_AT_ONCE, Spans, group_tiles, tile_masks

MOST_LAYERS = 1000  # how deep a repeated schedule is followed


def trace(layers: Sequence[Pattern], n: int, position: int | None = None) -> np.ndarray:
    """The receptive field of one output, layer by layer.

    Args:
      layers: the patterns of the layers, the first one sees the inputs.
      n: tokens of the sequence.
      position: the output, counted from 0; the last one if None.

    Returns:
      bool [layers + 1, n]: row l marks the positions of the stream before layer l (so row 0 the inputs, and the last
      row the position alone) that can influence the output.
    """
    marked = [np.arange(n) == _check(n, position), *_walk(layers[::-1], n, position)]
    return np.stack(marked[::-1])


def sizes(layers: Sequence[Pattern], n: int, position: int | None = None) -> np.ndarray:
    """How many inputs can influence a position (the last one if None) after the first l layers: int64 [layers + 1]."""
    _check(n, position)
    numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(layers))}
    backward = [numbers[pattern] for pattern in layers][::-1]
    counts = np.ones(len(layers) + 1, np.int64)
    walked: list[tuple[list[int], list[int]]] = []
    for depth in range(len(layers), 0, -1):
        rest = backward[len(layers) - depth :]
        # A walk that begins like a longer one, as all do in a schedule that repeats itself, was done with it.
        sizes = next((sizes for longer, sizes in walked if longer[:depth] == rest), None)
        if sizes is None:
            sizes = [int(marked.sum()) for marked in _walk(layers[depth - 1 :: -1], n, position)]
            walked.append((rest, sizes))
        counts[depth] = sizes[depth - 1]
    return counts


def limit(
    layers: Sequence[Pattern], n: int, position: int | None = None, most: int = MOST_LAYERS
) -> tuple[np.ndarray, bool]:
    """The inputs that can influence a position (the last one if None) however often the schedule is repeated.

    Returns:
      bool [n], and whether more layers would add nothing; if False, `most` layers were not enough to tell.
    """
    before, unchanged = np.arange(n) == _check(n, position), 0
    for marked in itertools.islice(_walk(itertools.cycle(layers[::-1]), n, position), most):
        unchanged = unchanged + 1 if np.array_equal(marked, before) else 0
        before = marked
        if marked.all() or unchanged == len(layers):
            return marked, True
    return before, not layers


def layers_to_cover(layers: Sequence[Pattern], n: int, position: int | None = None, most: int = MOST_LAYERS) -> int | None:
    """The fewest layers, the schedule being repeated and cut off anywhere, that let a position see all it may.

    That is all n inputs, or its own past if no layer looks ahead. None if no number of layers up to `most` does. The
    position is the last one if None.
    """
    wanted = n if looks_ahead(layers) else _check(n, position) + 1
    if wanted == 1 or limit(layers, n, position, most)[0].sum() < wanted:
        return 0 if wanted == 1 else None
    period = next(p for p in range(1, len(layers) + 1) if list(layers) == list(layers[:p]) * (len(layers) // p))
    fewest = most + 1
    for last in range(period):  # which layer of the period is the last one
        backward = itertools.cycle([layers[(last - i) % period] for i in range(period)])
        walk = itertools.islice(enumerate(_walk(backward, n, position)), fewest - 1)
        found = (number + 1 for number, marked in walk if number % period == last and marked.sum() == wanted)
        fewest = min(next(found, fewest), fewest)
    return fewest if fewest <= most else None


def matrix(layers: Sequence[Pattern], n: int) -> np.ndarray:
    """Which output can be influenced by which input, bool [n, n] (outputs, inputs), for small n."""
    return list(matrices(layers, n))[-1]


def matrices(layers: Iterable[Pattern], n: int) -> Iterator[np.ndarray]:
    """`matrix` for no layer, the first one, the first two and so on."""
    reached = np.eye(n, dtype=bool)
    yield reached
    for pattern in layers:
        sees = pattern.dense(n).reshape(-1, n, n).any(axis=0)
        reached = reached | (sees.astype(np.float32) @ reached.astype(np.float32) > 0)
        yield reached


def unreachable_pairs(layers: Sequence[Pattern], n: int) -> int:
    """How many pairs (output, input) no path joins, for small n; if no layer looks ahead, of those in the past."""
    unreachable = ~matrix(layers, n)
    return int(unreachable.sum() if looks_ahead(layers) else np.tril(unreachable).sum())


def looks_ahead(layers: Iterable[Pattern]) -> bool:
    """Whether a layer may see positions past its own."""
    return any(pattern.lookahead() > 0 for pattern in layers)


def _check(n: int, position: int | None) -> int:
    position = n - 1 if position is None else position
    if not 0 <= position < n:
        raise PatternError(f"reach needs 0 <= position < n, got position {position} and n = {n}")
    return position


def _walk(layers: Iterable[Pattern], n: int, position: int | None) -> Iterator[np.ndarray]:
    """The marked positions, bool [n], after each of the layers, which are given from the last to the first."""
    marked = np.arange(n) == _check(n, position)
    followed: dict[Pattern, np.ndarray] = {}  # the positions whose keys in this pattern are marked already
    for pattern in layers:
        queries = marked.copy()
        for head in [pattern] if pattern.heads is None else {pattern.for_head(i) for i in range(pattern.heads)}:
            new = queries & np.logical_not(followed.get(head, False))
            if new.any():
                _links(head, n).mark_keys(new, marked)
            followed[head] = queries
        yield marked.copy()


@functools.lru_cache(maxsize=16)
def _links(pattern: Pattern, n: int) -> _Links:
    return _Links(pattern, n)


class _Links:
    """A pattern without heads over n tokens, laid out so that the keys of marked queries are found fast."""

    def __init__(self, pattern: Pattern, n: int):
        self._pattern = pattern
        self._layout = pattern.layout(n)
        self._rows = self._layout.rows
        partial = ~self._layout.full
        _, same = group_tiles(pattern, self._layout.grid, self._rows[partial], self._layout.columns[partial])
        self._group = np.full(len(partial), -1)
        self._group[partial] = same

    def mark_keys(self, queries: np.ndarray, marked: np.ndarray) -> None:
        """Marks in `marked` (bool [n], in place) every key that one of the `queries` (bool [n]) sees."""
        layout = self._layout
        wanted, keys = _in_tiles(queries, layout.grid.tile[0]), _in_tiles(marked, layout.grid.tile[1])
        rows = np.flatnonzero(wanted.any(axis=1))
        live = Spans.union(layout.starts[rows], layout.starts[rows + 1], len(layout.columns)).members()
        keys[layout.columns[live[layout.full[live]]]] = True
        partial = live[~layout.full[live]]
        partial = partial[~keys[layout.columns[partial]].all(axis=1)]
        self._mark_partial(partial, wanted, keys)
        marked |= keys.ravel()[: len(marked)]

    def _mark_partial(self, tiles: np.ndarray, wanted: np.ndarray, keys: np.ndarray) -> None:
        """Marks in `keys` what the wanted queries see in partial tiles; equal tiles wanted alike are seen alike."""
        rows, columns = self._rows[tiles], self._layout.columns[tiles]
        bits = np.packbits(wanted, axis=1)
        _, kind = np.unique(bits.view(f"V{bits.shape[1]}").ravel(), return_inverse=True)
        each = self._group[tiles] * len(kind) + kind.ravel()[rows]
        _, first, same = np.unique(each, return_index=True, return_inverse=True)
        seen = np.zeros((len(first), keys.shape[1]), bool)
        for start in range(0, len(first), COUNT_AT_ONCE):
            part = first[start : start + COUNT_AT_ONCE]
            allowed = tile_masks(self._pattern, self._layout.grid, rows[part], columns[part])
            seen[start : start + COUNT_AT_ONCE] = (allowed & wanted[rows[part], :, None]).any(axis=1)
        np.logical_or.at(keys, columns, seen[same.ravel()])


def _in_tiles(marks: np.ndarray, size: int) -> np.ndarray:
    """A copy of marks, bool [n], as bool [tiles, size]; what the last tile has past the end is not marked."""
    return np.pad(marks, (0, -len(marks) % size)).reshape(-1, size)
