"""The patterns by name. Each is one class; `NAMES` is what the text form knows."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from sparsejax.patterns.pattern import Pattern, PatternError
from sparsejax.patterns.tiles import Bounds, TileGrid

FOREVER = np.iinfo(np.int64).max
FARTHEST = 2**30  # sums of two positions stay within the int32 of a compiled program, where overflow is silent


def _require(pattern: Pattern, **least: int) -> None:
    for field, low in least.items():
        value = getattr(pattern, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise PatternError(f"{pattern.name}: {field} must be an integer >= {low}, got {value!r}")
        if value > FARTHEST:
            raise PatternError(f"{pattern.name}: {field} must be at most 2**30, got {value}")


@dataclasses.dataclass(frozen=True)
class Full(Pattern):
    """Every query looks at every key (Vaswani et al. 2017, arXiv:1706.03762)."""

    name: ClassVar[str] = "full"

    def allows(self, q, k, t=None, s=None):
        return (q >= 0) & (k >= 0)

    def bounds(self, grid):
        none = np.zeros(grid.rows, np.int64)
        return _from_ranges(grid, any_key=(none, none + grid.s), every_key=(none, none + grid.s))

    def signature(self, q0, k0):
        return []

    def last_query(self, k):
        return np.full_like(k, FOREVER)

    def lookahead(self):
        return math.inf


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
    """A query looks at itself and at everything before it."""

    name: ClassVar[str] = "causal"

    def allows(self, q, k, t=None, s=None):
        return k <= q

    def bounds(self, grid):
        first, last = grid.row_bounds()
        return _from_ranges(grid, any_key=(0 * first, last + 1), every_key=(0 * first, first + 1))

    def signature(self, q0, k0):
        return [k0 - q0]

    def last_query(self, k):
        return np.full_like(k, FOREVER)

    def lookahead(self):
        return 0


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
    """A query looks at itself, `left` keys before it and `right` keys after it (Longformer, arXiv:2004.05150)."""

    name: ClassVar[str] = "window"
    left: int
    right: int = 0

    def __post_init__(self):
        _require(self, left=0, right=0)

    def allows(self, q, k, t=None, s=None):
        return (k >= q - self.left) & (k <= q + self.right)

    def bounds(self, grid):
        first, last = grid.row_bounds()
        return _from_ranges(
            grid,
            any_key=(first - self.left, last + self.right + 1),
            every_key=(last - self.left, first + self.right + 1),
        )

    def signature(self, q0, k0):
        return [k0 - q0]

    def last_query(self, k):
        return k + self.left

    def lookahead(self):
        return self.right


@dataclasses.dataclass(frozen=True)
class Chunk(Pattern):
    """A query looks at the keys of its own chunk of `size` positions (Llama 4's local layers)."""

    name: ClassVar[str] = "chunk"
    size: int

    def __post_init__(self):
        _require(self, size=1)

    def allows(self, q, k, t=None, s=None):
        return q // self.size == k // self.size

    def bounds(self, grid):
        first, last = (position // self.size * self.size for position in grid.row_bounds())
        one_chunk = np.where(first == last, self.size, 0)
        return _from_ranges(grid, any_key=(first, last + self.size), every_key=(first, first + one_chunk))

    def signature(self, q0, k0):
        return [q0 % self.size, k0 - q0]

    def last_query(self, k):
        return k // self.size * self.size + self.size - 1

    def lookahead(self):
        return self.size - 1


@dataclasses.dataclass(frozen=True)
class Sink(Pattern):
    """Every query looks at the first `n` keys (StreamingLLM, arXiv:2309.17453)."""

    name: ClassVar[str] = "sink"
    n: int

    def __post_init__(self):
        _require(self, n=1)

    def allows(self, q, k, t=None, s=None):
        return (k < self.n) & (q >= 0)

    def bounds(self, grid):
        first, _ = grid.row_bounds()
        keys = (0 * first, 0 * first + self.n)
        return _from_ranges(grid, any_key=keys, every_key=keys)

    def signature(self, q0, k0):
        return [np.minimum(k0, self.n)]

    def last_query(self, k):
        return np.where(k < self.n, FOREVER, -1)

    def lookahead(self):
        return self.n - 1


@dataclasses.dataclass(frozen=True)
class Globals(Pattern):
    """Global tokens look at every key and every query looks at them (Longformer's symmetric globals).

    `ids` is a number n, for the first n positions, or the positions themselves; negative ones count from the
    end, of the queries and of the keys alike.
    """

    name: ClassVar[str] = "globals"
    ids: int | tuple[int, ...]

    def __post_init__(self):
        if isinstance(self.ids, list | tuple):
            if not all(isinstance(i, int) and not isinstance(i, bool) and abs(i) <= FARTHEST for i in self.ids):
                raise PatternError(f"globals: ids must be integers of at most 2**30, got {list(self.ids)!r}")
            object.__setattr__(self, "ids", tuple(sorted(set(self.ids))))
        else:
            _require(self, ids=0)

    def allows(self, q, k, t=None, s=None):
        return self._is_global(q, t) | self._is_global(k, s)

    def bounds(self, grid):
        q_any, q_all = self._tiles(*grid.row_bounds(), grid.t)
        k_any, k_all = self._tiles(*grid.column_bounds(), grid.s)
        rows = np.arange(grid.rows)
        # A tile is full when all its queries or all its keys are global: if one of each is not, they do not meet.
        return Bounds.exact(
            live=_whole_rows(grid, q_any) | grid.product(rows, k_any),
            full=_whole_rows(grid, q_all) | grid.product(rows, k_all),
        )

    def signature(self, q0, k0):
        if isinstance(self.ids, int):
            return [np.minimum(q0, self.ids), np.minimum(k0, self.ids)]
        return [q0, k0]

    def last_query(self, k):
        first, last = self._span()
        if first < 0:
            return np.full_like(k, FOREVER)
        return np.where(self._is_global(k, None), FOREVER, last)

    def lookahead(self):
        first, last = self._span()
        return math.inf if first <= last else -math.inf

    def _span(self) -> tuple[int, int]:
        """The least and the greatest id; (0, -1) if there are none."""
        if isinstance(self.ids, int):
            return 0, self.ids - 1
        return (self.ids[0], self.ids[-1]) if self.ids else (0, -1)

    def _positions(self, length: int | None) -> np.ndarray:
        """The global positions, int64 [n], of a sequence of `length`, some perhaps outside of it."""
        if isinstance(self.ids, int):
            return np.arange(self.ids if length is None else min(self.ids, length))
        if length is None and self._span()[0] < 0:
            raise PatternError(f"{self}: ids that count from the end need the lengths t and s")
        return np.array([i if i >= 0 else i + length for i in self.ids], np.int64)

    def _is_global(self, position, length):
        if isinstance(self.ids, int):
            return position < self.ids
        found = position < 0  # positions are never negative: all False, in the shape and module of the input
        for i in self._positions(length).tolist():
            found = found | (position == i)
        return found

    def _tiles(self, first, last, length) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the tiles `[first, last]` with any global position, and of those with only such."""
        ids = np.unique(self._positions(length))
        inside = np.searchsorted(ids, last, side="right") - np.searchsorted(ids, first)
        return np.flatnonzero(inside > 0), np.flatnonzero(inside == last - first + 1)


def _from_ranges(grid: TileGrid, any_key: tuple, every_key: tuple) -> Bounds:
    """Bounds of a pattern whose rows are intervals.

    `any_key`: per query tile the keys `[start, stop)` that at least one of its queries sees, without a gap;
    `every_key`: those that all of them see.
    """
    return Bounds.exact(live=grid.touched(*any_key), full=grid.filled(*every_key))


def _whole_rows(grid: TileGrid, rows: np.ndarray):
    start = np.zeros(grid.rows, np.int64)
    stop = np.zeros(grid.rows, np.int64)
    stop[rows] = grid.s
    return grid.touched(start, stop)


NAMES: dict[str, type[Pattern]] = {cls.name: cls for cls in (Full, Causal, Window, Chunk, Sink, Globals)}
