"""The named patterns, one class each. `NAMES` lists the names that the text form knows.

None of them implies causality: `window`, `strided`, `chunk` and the others also attend to later keys, and
`causal & pattern` is their causal form.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from sparsejax.patterns.algebra import Shift
from sparsejax.patterns.base import FOREVER, MAX_POSITION, Mask, Pattern, PatternError, Positions, format_value, require
from sparsejax.patterns.layout import TileGrid, from_ranges
from sparsejax.patterns.spans import Bounds
from sparsejax.patterns.tiled import BigBirdRandom, Random, Tiles


@dataclasses.dataclass(frozen=True)
class Full(Pattern):
    """Every query attends to every key (Vaswani et al. 2017, arXiv:1706.03762)."""

    name: ClassVar[str] = "full"

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return (q >= 0) & (k >= 0)

    def bounds(self, grid: TileGrid) -> Bounds:
        return grid.in_every_row(np.array([0]), np.array([grid.s]))

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return []


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
    """A query attends to itself and to every earlier key."""

    name: ClassVar[str] = "causal"

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return k <= q

    def bounds(self, grid: TileGrid) -> Bounds:
        first, last = grid.row_bounds()
        return from_ranges(grid, any_key=(0 * first, last + 1), every_key=(0 * first, first + 1))

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [k0 - q0]

    def lookahead(self) -> float:
        return 0


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
    """A query attends to itself, `left` keys before it and `right` keys after it (Longformer, arXiv:2004.05150)."""

    name: ClassVar[str] = "window"
    left: int
    right: int = 0

    def __post_init__(self) -> None:
        require(self, left=0, right=0)

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return (k >= q - self.left) & (k <= q + self.right)

    def bounds(self, grid: TileGrid) -> Bounds:
        first, last = grid.row_bounds()
        return from_ranges(
            grid,
            any_key=(first - self.left, last + self.right + 1),
            every_key=(last - self.left, first + self.right + 1),
        )

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [k0 - q0]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return k + self.left

    def lookahead(self) -> float:
        return self.right


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """A query attends to every `stride`-th key before and after it, and to itself.

    This is the column head of the strided pattern of Sparse Transformer (arXiv:1904.10509). The row head is
    `window(stride)`; both merged into one head are `causal & (window(stride) | strided(stride))`.
    """

    name: ClassVar[str] = "strided"
    stride: int

    def __post_init__(self) -> None:
        require(self, stride=1)

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return (q - k) % self.stride == 0

    def bounds(self, grid: TileGrid) -> Bounds:
        return _strided_bounds(
            grid, self.stride, before=grid.t // self.stride, after=(grid.offset + grid.s) // self.stride
        )

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [(k0 - q0) % self.stride]


@dataclasses.dataclass(frozen=True)
class Dilated(Pattern):
    """A dilated window: the query itself, `left` keys before and `right` keys after it, `stride` apart.

    It spans `left * stride` positions back and `right * stride` ahead. Longformer, arXiv:2004.05150, section 3.1.
    """

    name: ClassVar[str] = "dilated"
    left: int
    right: int = 0
    stride: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        require(self, left=0, right=0, stride=1)
        for side in ("left", "right"):
            if getattr(self, side) * self.stride > MAX_POSITION:
                raise PatternError(f"dilated.{side}", f"{getattr(self, side)} * stride = {self.stride} exceeds 2**30")

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        ahead = k - q
        far = (ahead >= -self.left * self.stride) & (ahead <= self.right * self.stride)
        return far & (ahead % self.stride == 0)

    def bounds(self, grid: TileGrid) -> Bounds:
        return _strided_bounds(grid, self.stride, before=self.left, after=self.right)

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [k0 - q0]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return k + self.left * self.stride

    def lookahead(self) -> float:
        return self.right * self.stride


@dataclasses.dataclass(frozen=True)
class Fixed(Pattern):
    """Every query attends to the last `c` keys of each block of `l` keys (Sparse Transformer, arXiv:1904.10509).

    This is the column head of the paper's fixed pattern. The row head is `chunk(l)`; both merged into one head are
    `causal & (chunk(l) | fixed(l, c))`.
    """

    name: ClassVar[str] = "fixed"
    l: int  # noqa: E741 (the paper's name)
    c: int

    def __post_init__(self) -> None:
        require(self, l=1, c=1)
        if self.c > self.l:
            raise PatternError("fixed.c", f"{self.c} exceeds l = {self.l}")

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return (k % self.l >= self.l - self.c) & (q >= 0)

    def bounds(self, grid: TileGrid) -> Bounds:
        stop = np.arange(1, -(-grid.s // self.l) + 1) * self.l
        return grid.in_every_row(stop - self.c, stop)

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [k0 % self.l]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return np.where(k % self.l >= self.l - self.c, FOREVER, -1)


@dataclasses.dataclass(frozen=True)
class Chunk(Pattern):
    """A query attends to the keys of its chunk of `size` positions (the local layers of Llama 4)."""

    name: ClassVar[str] = "chunk"
    size: int

    def __post_init__(self) -> None:
        require(self, size=1)

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return q // self.size == k // self.size

    def bounds(self, grid: TileGrid) -> Bounds:
        first, last = (position // self.size * self.size for position in grid.row_bounds())
        shared = np.where(first == last, self.size, 0)
        return from_ranges(grid, any_key=(first, last + self.size), every_key=(first, first + shared))

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [q0 % self.size, k0 - q0]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return k // self.size * self.size + self.size - 1

    def lookahead(self) -> float:
        return self.size - 1


@dataclasses.dataclass(frozen=True)
class Sink(Pattern):
    """Every query attends to the first `n` keys (StreamingLLM, arXiv:2309.17453)."""

    name: ClassVar[str] = "sink"
    n: int

    def __post_init__(self) -> None:
        require(self, n=1)

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return (k < self.n) & (q >= 0)

    def bounds(self, grid: TileGrid) -> Bounds:
        return grid.in_every_row(np.array([0]), np.array([self.n]))

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [np.minimum(k0, self.n)]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return np.where(k < self.n, FOREVER, -1)

    def lookahead(self) -> float:
        return self.n - 1


@dataclasses.dataclass(frozen=True)
class Prefix(Pattern):
    """The first `n` tokens attend to one another; `causal | prefix(n)` is the prefix LM of T5 (arXiv:1910.10683)."""

    name: ClassVar[str] = "prefix"
    n: int

    def __post_init__(self) -> None:
        require(self, n=1)

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return (q < self.n) & (k < self.n)

    def bounds(self, grid: TileGrid) -> Bounds:
        first, last = grid.row_bounds()
        none = np.zeros_like(first)
        any_key, every_key = (np.where(row < self.n, self.n, 0) for row in (first, last))
        return from_ranges(grid, any_key=(none, any_key), every_key=(none, every_key))

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [np.minimum(q0, self.n), np.minimum(k0, self.n)]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return np.where(k < self.n, self.n - 1, -1)

    def lookahead(self) -> float:
        return self.n - 1


@dataclasses.dataclass(frozen=True)
class GlobalKeys(Pattern):
    """Every query attends to the global tokens: one side of `globals`.

    `ids` is either a number n, for the first n positions (the last -n if negative), or a list of positions. Negative
    positions count from the end, of the queries and of the keys alike.
    """

    name: ClassVar[str] = "global_keys"
    ids: int | tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.ids, list | tuple):
            if not all(isinstance(i, int) and not isinstance(i, bool) and abs(i) <= MAX_POSITION for i in self.ids):
                raise PatternError(
                    f"{self.name}.ids", f"{format_value(tuple(self.ids))} are not all integers of at most 2**30"
                )
            object.__setattr__(self, "ids", tuple(sorted(set(self.ids))))
        else:
            require(self, ids=-MAX_POSITION)

    def check(self, t: int, s: int) -> None:
        length = min(t, s)
        first, last = self._span()
        if last >= length or first < -length:
            worst = last if last >= length else first
            raise PatternError(f"{self.name}.ids", f"token {worst} is outside a sequence of {length} tokens")

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return self._is_global(k, s) & (q >= 0)

    def bounds(self, grid: TileGrid) -> Bounds:
        ids = self._inside(grid.s)
        return grid.in_every_row(ids, ids + 1)

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [self._phase(k0, grid.s, grid.tile[1])]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        if self._span()[0] < 0:
            return np.full_like(k, FOREVER)
        return np.where(self._is_global(k, None), FOREVER, -1)

    def lookahead(self) -> float:
        first, last = self._span()
        return math.inf if first <= last else -math.inf

    def _span(self) -> tuple[int, int]:
        """The smallest and the largest id; (0, -1) without ids."""
        if isinstance(self.ids, int):
            return (0, self.ids - 1) if self.ids >= 0 else (self.ids, -1)
        return (self.ids[0], self.ids[-1]) if self.ids else (0, -1)

    def _inside(self, length: int) -> np.ndarray:
        """The global positions of a sequence of `length` tokens in ascending order, int64 [n]."""
        if isinstance(self.ids, int):
            every = np.arange(length)
            return every[: self.ids] if self.ids >= 0 else every[self.ids :]
        ids = np.unique(np.array([i if i >= 0 else i + length for i in self.ids], np.int64))
        return ids[(ids >= 0) & (ids < length)]

    def _phase(self, first: np.ndarray, length: int, size: int) -> np.ndarray:
        """Integers that determine which positions of tiles of `size` tokens are global, given the first ones."""
        if not isinstance(self.ids, int):
            return first
        return np.minimum(first, self.ids) if self.ids >= 0 else np.maximum(first, length + self.ids - size)

    def _is_global(self, position: Positions, length: int | None) -> Mask:
        if length is None:
            if self._span()[0] < 0:
                raise PatternError("t, s", f"required by {self}, whose negative ids count from the end")
            length = 0
        if isinstance(self.ids, int):
            return position < self.ids if self.ids >= 0 else position >= length + self.ids
        mask = position < 0  # all False, in the shape and array library of the input
        for i in self.ids:
            mask = mask | (position == (i if i >= 0 else i + length))
        return mask


@dataclasses.dataclass(frozen=True)
class GlobalQueries(GlobalKeys):
    """The global tokens attend to every key: the other side of `globals`. `ids` is as in `global_keys`."""

    name: ClassVar[str] = "global_queries"

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return self._is_global(q, t) & (k >= 0)

    def bounds(self, grid: TileGrid) -> Bounds:
        first, last = grid.row_bounds()
        ids = self._inside(grid.t)
        inside = np.searchsorted(ids, last, side="right") - np.searchsorted(ids, first)
        any_key, every_key = np.where(inside > 0, grid.s, 0), np.where(inside == last - first + 1, grid.s, 0)
        return from_ranges(grid, any_key=(0 * first, any_key), every_key=(0 * first, every_key))

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [self._phase(q0, grid.t, grid.tile[0])]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        first, last = self._span()
        return np.full_like(k, FOREVER if first < 0 else last)


@dataclasses.dataclass(frozen=True)
class Globals(GlobalKeys):
    """The global tokens attend to every key and every query attends to them (Longformer); `ids` as in `global_keys`."""

    name: ClassVar[str] = "globals"

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return self._is_global(q, t) | self._is_global(k, s)

    def bounds(self, grid: TileGrid) -> Bounds:
        # A tile is full if all its queries or all its keys are global: one of each that is not is a pair not allowed.
        rows, columns = (side.bounds(grid) for side in self._sides())
        return Bounds.exact(rows.live_upper | columns.live_upper, rows.full_upper | columns.full_upper)

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [part for side in self._sides() for part in side.signature(grid, q0, k0)]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return np.maximum(*(side.last_query(k) for side in self._sides()))

    def _sides(self) -> tuple[Pattern, Pattern]:
        return GlobalQueries(self.ids), GlobalKeys(self.ids)


def _strided_bounds(grid: TileGrid, stride: int, before: int, after: int) -> Bounds:
    """Bounds of a pattern whose queries attend to `before` keys before and `after` keys after them, `stride` apart."""
    first, last = grid.row_bounds()
    # The queries of a tile at least as high as the stride attend to every key between their first and last.
    dense = last - first + 1 >= stride
    ranges = first[dense] - before * stride, last[dense] + after * stride + 1, np.flatnonzero(dense)
    rows, starts, stops = _comb(grid, np.flatnonzero(~dense), stride, before, after)
    live = grid.touched(*ranges) | grid.touched(starts, stops, rows)
    if stride == 1:
        return Bounds.exact(live, grid.filled(last - before, first + after + 1))
    # Adjacent queries share no key, and the keys of a single query do not touch.
    single = first[rows] == last[rows]
    return Bounds.exact(live, grid.filled(starts[single], stops[single], rows[single]))


def _comb(grid: TileGrid, rows: np.ndarray, stride: int, before: int, after: int) -> tuple[np.ndarray, ...]:
    """The intervals of keys to which the queries of the rows attend: rows, starts and stops, int64 [n] each."""
    first, last = (bound[rows] for bound in grid.row_bounds())
    low = np.maximum(-before, np.maximum(-(last // stride), -((last - grid.offset) // stride)))
    high = np.minimum(after, (grid.offset + grid.s - 1 - first) // stride)
    count = np.maximum(high - low + 1, 0)
    index = np.repeat(np.arange(len(rows)), count)
    step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + low[index]
    return rows[index], first[index] + step * stride, last[index] + step * stride + 1


NAMES: dict[str, type[Pattern]] = {
    cls.name: cls
    for cls in (
        Full,
        Causal,
        Window,
        Dilated,
        Strided,
        Fixed,
        Chunk,
        Sink,
        Prefix,
        Globals,
        GlobalKeys,
        GlobalQueries,
        Tiles,
        Random,
        BigBirdRandom,
        Shift,
    )
}
