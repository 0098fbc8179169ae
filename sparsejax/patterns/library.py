"""The patterns by name. Each is one class; `NAMES` is what the text form knows.

Alone, none of them knows of time: `window`, `strided`, `chunk` and the rest look ahead as far as back, and
`causal & pattern` is their causal form.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from sparsejax.patterns.base import FARTHEST, FOREVER, Pattern, PatternError, Shift, require
from sparsejax.patterns.tiled import BigBirdRandom, Random, Tiles
from sparsejax.patterns.layout import Bounds, TileGrid


@dataclasses.dataclass(frozen=True)
class Full(Pattern):
    """Every query looks at every key (Vaswani et al. 2017, arXiv:1706.03762)."""

    name: ClassVar[str] = "full"

    def allows(self, q, k, t=None, s=None):
        return (q >= 0) & (k >= 0)

    def bounds(self, grid):
        return grid.in_every_row(np.array([0]), np.array([grid.s]))

    def signature(self, grid, q0, k0):
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
        return from_ranges(grid, any_key=(0 * first, last + 1), every_key=(0 * first, first + 1))

    def signature(self, grid, q0, k0):
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
        require(self, left=0, right=0)

    def allows(self, q, k, t=None, s=None):
        return (k >= q - self.left) & (k <= q + self.right)

    def bounds(self, grid):
        first, last = grid.row_bounds()
        return from_ranges(
            grid,
            any_key=(first - self.left, last + self.right + 1),
            every_key=(last - self.left, first + self.right + 1),
        )

    def signature(self, grid, q0, k0):
        return [k0 - q0]

    def last_query(self, k):
        return k + self.left

    def lookahead(self):
        return self.right


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """A query looks at itself and at every `stride`-th key from there (Sparse Transformer, arXiv:1904.10509).

    The column head of the paper's strided pattern. Its row head is `window(stride)`; merged into one head they
    are `causal & (window(stride) | strided(stride))`.
    """

    name: ClassVar[str] = "strided"
    stride: int

    def __post_init__(self):
        require(self, stride=1)

    def allows(self, q, k, t=None, s=None):
        return (q - k) % self.stride == 0

    def bounds(self, grid):
        return _every(grid, self.stride, before=grid.t // self.stride, after=(grid.moved + grid.s) // self.stride)

    def signature(self, grid, q0, k0):
        return [(k0 - q0) % self.stride]

    def last_query(self, k):
        return np.full_like(k, FOREVER)


@dataclasses.dataclass(frozen=True)
class Dilated(Pattern):
    """A window with gaps: itself, `left` keys before and `right` after it, each `stride` from the next (Longformer).

    arXiv:2004.05150, section 3.1. It spans `left * stride` positions back and `right * stride` ahead.
    """

    name: ClassVar[str] = "dilated"
    left: int
    right: int = 0
    stride: int = dataclasses.field(kw_only=True)

    def __post_init__(self):
        require(self, left=0, right=0, stride=1)

    def allows(self, q, k, t=None, s=None):
        ahead = k - q
        far = (ahead >= -self.left * self.stride) & (ahead <= self.right * self.stride)
        return far & (ahead % self.stride == 0)

    def bounds(self, grid):
        return _every(grid, self.stride, before=self.left, after=self.right)

    def signature(self, grid, q0, k0):
        return [k0 - q0]

    def last_query(self, k):
        return k + self.left * self.stride

    def lookahead(self):
        return self.right * self.stride


@dataclasses.dataclass(frozen=True)
class Fixed(Pattern):
    """Every query looks at the last `c` keys of each span of `l` (Sparse Transformer, arXiv:1904.10509).

    The column head of the paper's fixed pattern. Its row head is `chunk(l)`; merged into one head they are
    `causal & (chunk(l) | fixed(l, c))`.
    """

    name: ClassVar[str] = "fixed"
    l: int  # noqa: E741 (the paper's name)
    c: int

    def __post_init__(self):
        require(self, l=1, c=1)
        if self.c > self.l:
            raise PatternError(f"fixed: c must be at most l = {self.l}, got {self.c}")

    def allows(self, q, k, t=None, s=None):
        return (k % self.l >= self.l - self.c) & (q >= 0)

    def bounds(self, grid):
        stop = np.arange(1, -(-grid.s // self.l) + 1) * self.l
        return grid.in_every_row(stop - self.c, stop)

    def signature(self, grid, q0, k0):
        return [k0 % self.l]

    def last_query(self, k):
        return np.where(k % self.l >= self.l - self.c, FOREVER, -1)


@dataclasses.dataclass(frozen=True)
class Chunk(Pattern):
    """A query looks at the keys of its own chunk of `size` positions (Llama 4's local layers)."""

    name: ClassVar[str] = "chunk"
    size: int

    def __post_init__(self):
        require(self, size=1)

    def allows(self, q, k, t=None, s=None):
        return q // self.size == k // self.size

    def bounds(self, grid):
        first, last = (position // self.size * self.size for position in grid.row_bounds())
        one_chunk = np.where(first == last, self.size, 0)
        return from_ranges(grid, any_key=(first, last + self.size), every_key=(first, first + one_chunk))

    def signature(self, grid, q0, k0):
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
        require(self, n=1)

    def allows(self, q, k, t=None, s=None):
        return (k < self.n) & (q >= 0)

    def bounds(self, grid):
        return grid.in_every_row(np.array([0]), np.array([self.n]))

    def signature(self, grid, q0, k0):
        return [np.minimum(k0, self.n)]

    def last_query(self, k):
        return np.where(k < self.n, FOREVER, -1)

    def lookahead(self):
        return self.n - 1


@dataclasses.dataclass(frozen=True)
class Prefix(Pattern):
    """The first `n` tokens look at one another; `causal | prefix(n)` is T5's prefix model (arXiv:1910.10683)."""

    name: ClassVar[str] = "prefix"
    n: int

    def __post_init__(self):
        require(self, n=1)

    def allows(self, q, k, t=None, s=None):
        return (q < self.n) & (k < self.n)

    def bounds(self, grid):
        first, last = grid.row_bounds()
        none = np.zeros_like(first)
        any_key, every_key = (np.where(row < self.n, self.n, 0) for row in (first, last))
        return from_ranges(grid, any_key=(none, any_key), every_key=(none, every_key))

    def signature(self, grid, q0, k0):
        return [np.minimum(q0, self.n), np.minimum(k0, self.n)]

    def last_query(self, k):
        return np.where(k < self.n, self.n - 1, -1)

    def lookahead(self):
        return self.n - 1


@dataclasses.dataclass(frozen=True)
class GlobalKeys(Pattern):
    """Every query looks at the global tokens: one side of `globals`.

    `ids` is a number n, for the first n positions (the last -n, if negative), or the positions themselves;
    negative ones count from the end, of the queries and of the keys alike.
    """

    name: ClassVar[str] = "global_keys"
    ids: int | tuple[int, ...]

    def __post_init__(self):
        if isinstance(self.ids, list | tuple):
            if not all(isinstance(i, int) and not isinstance(i, bool) and abs(i) <= FARTHEST for i in self.ids):
                raise PatternError(f"{self.name}: ids must be integers of at most 2**30, got {list(self.ids)!r}")
            object.__setattr__(self, "ids", tuple(sorted(set(self.ids))))
        else:
            require(self, ids=-FARTHEST)

    def check(self, t, s):
        length = min(t, s)
        first, last = self._span()
        if last >= length or first < -length:
            worst = last if last >= length else first
            raise PatternError(f"{self.name}: token {worst} lies outside of a sequence of {length}")

    def allows(self, q, k, t=None, s=None):
        return self._is_global(k, s) & (q >= 0)

    def bounds(self, grid):
        ids = self._inside(grid.s)
        return grid.in_every_row(ids, ids + 1)

    def signature(self, grid, q0, k0):
        return [self._phase(k0, grid.s, grid.tile[1])]

    def last_query(self, k):
        if self._span()[0] < 0:
            return np.full_like(k, FOREVER)
        return np.where(self._is_global(k, None), FOREVER, -1)

    def lookahead(self):
        first, last = self._span()
        return math.inf if first <= last else -math.inf

    def _span(self) -> tuple[int, int]:
        """The least and the greatest id; (0, -1) if there are none."""
        if isinstance(self.ids, int):
            return (0, self.ids - 1) if self.ids >= 0 else (self.ids, -1)
        return (self.ids[0], self.ids[-1]) if self.ids else (0, -1)

    def _inside(self, length: int) -> np.ndarray:
        """The global positions of a sequence of `length`, ascending, int64 [n]."""
        if isinstance(self.ids, int):
            every = np.arange(length)
            return every[: self.ids] if self.ids >= 0 else every[self.ids :]
        ids = np.unique(np.array([i if i >= 0 else i + length for i in self.ids], np.int64))
        return ids[(ids >= 0) & (ids < length)]

    def _phase(self, first: np.ndarray, length: int, size: int) -> np.ndarray:
        """What fixes which positions of tiles of `size` are global, given the first of each."""
        if not isinstance(self.ids, int):
            return first
        return np.minimum(first, self.ids) if self.ids >= 0 else np.maximum(first, length + self.ids - size)

    def _is_global(self, position, length):
        if length is None and self._span()[0] < 0:
            raise PatternError(f"{self}: ids that count from the end need the lengths t and s")
        if isinstance(self.ids, int):
            return position < self.ids if self.ids >= 0 else position >= length + self.ids
        found = position < 0  # positions are never negative: all False, in the shape and module of the input
        for i in self.ids:
            found = found | (position == (i if i >= 0 else i + length))
        return found


@dataclasses.dataclass(frozen=True)
class GlobalQueries(GlobalKeys):
    """The global tokens look at every key: the other side of `globals`; `ids` as in `global_keys`."""

    name: ClassVar[str] = "global_queries"

    def allows(self, q, k, t=None, s=None):
        return self._is_global(q, t) & (k >= 0)

    def bounds(self, grid):
        first, last = grid.row_bounds()
        ids = self._inside(grid.t)
        inside = np.searchsorted(ids, last, side="right") - np.searchsorted(ids, first)
        any_key, every_key = np.where(inside > 0, grid.s, 0), np.where(inside == last - first + 1, grid.s, 0)
        return from_ranges(grid, any_key=(0 * first, any_key), every_key=(0 * first, every_key))

    def signature(self, grid, q0, k0):
        return [self._phase(q0, grid.t, grid.tile[0])]

    def last_query(self, k):
        first, last = self._span()
        return np.full_like(k, FOREVER if first < 0 else last)


@dataclasses.dataclass(frozen=True)
class Globals(GlobalKeys):
    """Global tokens look at every key and every query looks at them (Longformer's symmetric globals).

    `ids` is a number n, for the first n positions (the last -n, if negative), or the positions themselves;
    negative ones count from the end, of the queries and of the keys alike.
    """

    name: ClassVar[str] = "globals"

    def allows(self, q, k, t=None, s=None):
        return self._is_global(q, t) | self._is_global(k, s)

    def bounds(self, grid):
        # A tile is full when all its queries or all its keys are global: if one of each is not, they do not meet.
        rows, columns = (side.bounds(grid) for side in self._sides())
        return Bounds.exact(rows.live_most | columns.live_most, rows.full_most | columns.full_most)

    def signature(self, grid, q0, k0):
        return [part for side in self._sides() for part in side.signature(grid, q0, k0)]

    def last_query(self, k):
        return np.maximum(*(side.last_query(k) for side in self._sides()))

    def _sides(self) -> tuple[Pattern, Pattern]:
        return GlobalQueries(self.ids), GlobalKeys(self.ids)


def from_ranges(grid: TileGrid, any_key: tuple, every_key: tuple) -> Bounds:
    """Bounds of a pattern whose rows are intervals.

    `any_key`: per query tile the keys `[start, stop)` that at least one of its queries sees, without a gap;
    `every_key`: those that all of them see.
    """
    return Bounds.exact(live=grid.touched(*any_key), full=grid.filled(*every_key))


def _every(grid: TileGrid, stride: int, before: int, after: int) -> Bounds:
    """Bounds of a pattern whose queries see every `stride`-th key, so many `before` and `after` their own."""
    first, last = grid.row_bounds()
    # The queries of a tile that is at least as high as the stride leave no key out between their farthest.
    dense = last - first + 1 >= stride
    ranges = first[dense] - before * stride, last[dense] + after * stride + 1, np.flatnonzero(dense)
    rows, starts, stops = _comb(grid, np.flatnonzero(~dense), stride, before, after)
    live = grid.touched(*ranges) | grid.touched(starts, stops, rows)
    if stride == 1:
        return Bounds.exact(live, grid.filled(last - before, first + after + 1))
    # Two queries in a row have no key in common; a single one's keys do not touch one another.
    single = first[rows] == last[rows]
    return Bounds.exact(live, grid.filled(starts[single], stops[single], rows[single]))


def _comb(grid: TileGrid, rows: np.ndarray, stride: int, before: int, after: int) -> tuple[np.ndarray, ...]:
    """For each of the rows the intervals of keys that its queries see: int64 [n] rows, starts and stops."""
    first, last = (bound[rows] for bound in grid.row_bounds())
    low = np.maximum(-before, -(last // stride))
    high = np.minimum(after, (grid.moved + grid.s - 1 - first) // stride)
    count = np.maximum(high - low + 1, 0)
    index = np.repeat(np.arange(len(rows)), count)
    step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + low[index]
    return rows[index], first[index] + step * stride, last[index] + step * stride + 1


LIBRARY = (Full, Causal, Window, Dilated, Strided, Fixed, Chunk, Sink, Prefix, Globals, GlobalKeys, GlobalQueries)
NAMES: dict[str, type[Pattern]] = {cls.name: cls for cls in (*LIBRARY, Tiles, Random, BigBirdRandom, Shift)}
