"""Patterns made of whole tiles: listed one by one, or drawn at random.

A draw is a pure function of (seed, layer, head, query tile): it is computed wherever it is needed, in NumPy and
inside kernels alike, and is the same in every step and after every restart.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, ClassVar

import numpy as np

from sparsejax.patterns.base import FOREVER, Pattern, PatternError, array_module, require
from sparsejax.patterns.layout import Bounds, merge_intervals, overlaps


class _Tiled(Pattern):
    """A pattern that is a list of key tiles for each query tile: `_lists`, and `allows` that agrees with it."""

    def _lists(self, t: int, s: int) -> tuple[tuple[int, int], np.ndarray]:
        """Height and width of its tiles in tokens; key tiles of each query tile, int [rows, n], -1 for none."""
        raise NotImplementedError

    def bounds(self, grid):
        (height, width), lists = self._lists(grid.t, grid.s)
        first, last = grid.row_bounds()
        low, high = first // height, np.minimum(last // height, len(lists) - 1)
        listed = np.maximum(high - low + 1, 0)  # how many of its own rows a row of the grid crosses
        row = np.repeat(np.arange(grid.rows), listed)
        own = np.arange(len(row)) - np.repeat(np.cumsum(listed) - listed, listed) + low[row]
        columns = lists[own]
        row, start = np.repeat(row, lists.shape[1]), columns.ravel().astype(np.int64) * width
        keep = start >= 0
        keys = _RowIntervals(row[keep], start[keep], start[keep] + width)
        # What all queries of a row see is listed in as many own rows as it crosses.
        whole = np.where(last // height < len(lists), listed, 0)
        return Bounds.exact(grid.touched(*keys.covered(np.minimum(listed, 1))), grid.filled(*keys.covered(whole)))


@dataclasses.dataclass(frozen=True)
class _RowIntervals:
    """Intervals of keys `[start, stop)` in rows, all int64 [n]."""

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def covered(self, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts, stops and rows of what at least `depth[row]` of a row's intervals cover, int64 [n]; 0 skips a row."""
        length = self.stop.max(initial=0) + 1  # of a row, laid end to end with a gap between
        edges = [np.zeros((0, 2), np.int64)]
        for one in np.unique(depth[depth > 0]).tolist():
            mine = depth[self.row] == one
            shift = self.row[mine] * length
            edges.append(overlaps(self.start[mine] + shift, self.stop[mine] + shift, one))
        start, stop = np.concatenate(edges).T
        rows = start // length
        return start - rows * length, stop - rows * length, rows


@dataclasses.dataclass(frozen=True)
class Tiles(_Tiled):
    """Any layout: `rows[i]` lists the key tiles, from 0, that query tile i looks at.

    A tile has `tile` tokens a side; if not given, queries and keys are each cut into as many tiles as there are
    rows, the last of them perhaps smaller.
    """

    name: ClassVar[str] = "tiles"
    rows: tuple[tuple[int, ...], ...]
    tile: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        rows = self.rows
        if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, list | tuple) for row in rows):
            raise PatternError(f"tiles: rows must be lists of key tiles, one for each query tile, got {rows!r}")
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for row in rows for i in row):
            raise PatternError("tiles: key tiles must be integers >= 0")
        object.__setattr__(self, "rows", tuple(tuple(sorted(set(row))) for row in rows))
        worst = max((i for row in self.rows for i in row), default=0)
        if self.tile is not None:
            require(self, tile=1)
        elif worst >= len(rows):
            raise PatternError(f"tiles: key tile {worst} of {len(rows)}; the first is 0")

    def check(self, t, s):
        if self.tile is not None:
            width = -(-s // self.tile)
            worst = max((i for row in self.rows for i in row), default=0)
            if worst >= width or len(self.rows) > -(-t // self.tile):
                raise PatternError(f"tiles: tiles of {self.tile} that lie outside of a sequence of {min(t, s)}")

    def allows(self, q, k, t=None, s=None):
        height, width = self._sides(t, s)
        return _is_listed(q // height, k // width, self.rows)

    def last_query(self, k):
        if self.tile is None:
            return np.full_like(k, FOREVER)
        rows = {column: row for row, columns in enumerate(self.rows) for column in columns}
        last = np.array([rows.get(column, -1) for column in range(max(rows, default=0) + 1)], np.int64)
        row = np.append(last, -1)[np.minimum(k // self.tile, len(last))]
        return np.where(row < 0, -1, (row + 1) * self.tile - 1)

    def _sides(self, t: int | None, s: int | None) -> tuple[int, int]:
        if self.tile is not None:
            return self.tile, self.tile
        if t is None or s is None:
            raise PatternError("tiles: without `tile`, how large one is depends on the lengths t and s")
        return max(1, -(-t // len(self.rows))), max(1, -(-s // len(self.rows)))

    def _lists(self, t, s):
        return self._sides(t, s), _pad(self.rows)


@dataclasses.dataclass(frozen=True)
class Random(_Tiled):
    """Each query tile looks at `r` key tiles, drawn uniformly without replacement (BigBird, arXiv:2007.14062).

    `reach`: only key tiles at most so many tokens from the query tile, start to start. `apart`: only those at least
    so many tiles from it (1: not itself; 2: nor its neighbours). `ends`: not the first and last so many tiles. A
    row with fewer than `r` to draw from takes them all. Without `reach`, the draw depends on the number of keys.
    """

    name: ClassVar[str] = "random"
    r: int
    tile: int = dataclasses.field(kw_only=True)
    seed: int = dataclasses.field(kw_only=True)
    reach: int | None = dataclasses.field(default=None, kw_only=True)
    apart: int = dataclasses.field(default=0, kw_only=True)
    ends: int = dataclasses.field(default=0, kw_only=True)
    layer: int = dataclasses.field(default=0, kw_only=True)
    head: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self):
        require(self, r=1, tile=1, seed=0, apart=0, ends=0, layer=0, head=0)
        if self.reach is not None:
            require(self, reach=0)

    def check(self, t, s):
        columns = -(-s // self.tile) - 2 * self.ends
        columns = columns if self.reach is None else min(columns, 2 * (self.reach // self.tile) + 1)
        most = columns - max(2 * self.apart - 1, 0)
        if self.r > most:
            raise PatternError(f"random: {self.r} tiles of {self.tile} do not fit: {max(most, 0)} to draw from")

    def allows(self, q, k, t=None, s=None):
        if s is None:
            raise PatternError(f"{self}: what is drawn depends on the number of keys s")
        row, column = q // self.tile, k // self.tile
        return functools.reduce(operator.or_, (column == drawn for drawn in self._draw(row, s)))

    def last_query(self, k):
        if self.reach is None:
            return np.full_like(k, FOREVER)
        return (k // self.tile + self.reach // self.tile + 1) * self.tile - 1

    def lookahead(self):
        return super().lookahead() if self.reach is None else (self.reach // self.tile + 1) * self.tile - 1

    def _lists(self, t, s):
        rows = np.arange(-(-t // self.tile))
        return (self.tile, self.tile), np.stack(self._draw(rows, s), axis=-1)

    def _draw(self, row: Any, s: int) -> list[Any]:
        """The `r` key tiles of query tiles `row`: integers of the same shape, -1 for none (Floyd's algorithm)."""
        xp = array_module(row)
        far = FOREVER if self.reach is None else self.reach // self.tile
        far = min(far, -(-s // self.tile))
        low, stop = xp.maximum(row - far, self.ends), xp.minimum(row + far + 1, -(-s // self.tile) - self.ends)
        gap, gap_stop = (xp.clip(row + side, low, xp.maximum(stop, low)) for side in (1 - self.apart, self.apart))
        gap_size = xp.maximum(gap_stop - gap, 0)
        count = stop - low - gap_size  # to draw from
        drawn: list[Any] = []
        for i in range(self.r):
            top = count - self.r + i
            pick = self._number(xp, row, i) % xp.maximum(top + 1, 1).astype(np.uint32)
            pick = pick.astype(top.dtype)
            for earlier in drawn:
                pick = xp.where(earlier == pick, top, pick)
            pick = xp.where(count > self.r, pick, i)
            drawn.append(pick)
        columns = (xp.where(low + pick >= gap, low + pick + gap_size, low + pick) for pick in drawn)
        return [xp.where(i < count, column, -1) for i, column in enumerate(columns)]

    def _number(self, xp: Any, row: Any, i: int) -> Any:
        """A random uint32 for each row: a counter, keyed and mixed (the finaliser of MurmurHash3)."""
        key = np.random.SeedSequence([self.seed, self.layer, self.head]).generate_state(1)[0]
        with np.errstate(over="ignore"):
            x = (xp.asarray(row) * self.r + i).astype(np.uint32) + key
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
            return x ^ (x >> np.uint32(16))


@dataclasses.dataclass(frozen=True)
class BigBirdRandom(_Tiled):
    """The random tiles that the released BigBird models were trained with, head `head` of `among` drawn together.

    The released code draws them with NumPy's legacy generator, seeded with the number of the layer. Where the
    sequence has 1,024, 3,072 or 4,096 tokens it draws only from the first 1,024, for `longest` tokens, and cuts
    the plan; for other lengths it draws from the first `2 r + 5` tiles if there are more. The first and the last
    row have none, as they are global. In evaluation the released code does not draw: every row has tile 0 `r`
    times, see `recipes.bigbird`. Matches transformers 5.23 (`modeling_big_bird.py`, training mode).
    """

    name: ClassVar[str] = "bigbird_random"
    r: int
    tile: int = dataclasses.field(kw_only=True)
    seed: int = dataclasses.field(kw_only=True)
    head: int = dataclasses.field(default=0, kw_only=True)
    among: int = dataclasses.field(default=1, kw_only=True)
    longest: int = dataclasses.field(default=4096, kw_only=True)

    def __post_init__(self):
        require(self, r=1, tile=1, seed=0, head=0, among=self.head + 1, longest=1)
        if self.seed >= 2**32:
            raise PatternError(f"{self.name}: seed must be below 2**32, got {self.seed}")

    def check(self, t, s):
        if min(t, s) <= (2 * self.r + 5) * self.tile:
            most = (2 * self.r + 5) * self.tile
            raise PatternError(f"{self.name}: the released models look at everything up to {most} tokens")

    def allows(self, q, k, t=None, s=None):
        if s is None:
            raise PatternError(f"{self}: what is drawn depends on the number of keys s")
        return _is_listed(q // self.tile, k // self.tile, self._plan(s))

    def _lists(self, t, s):
        return (self.tile, self.tile), _pad(self._plan(s))

    def _plan(self, s: int) -> tuple[tuple[int, ...], ...]:
        length = -(-s // self.tile) * self.tile
        heads = released_plan(length, self.tile, self.r, self.among, self.seed, self.longest)
        return ((), *heads[self.head], ())[: length // self.tile]


@functools.lru_cache(maxsize=64)
def released_plan(
    length: int, tile: int, r: int, heads: int, seed: int, longest: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each head, for each query tile but the first and the last, the key tiles that BigBird's code draws."""
    rng = np.random.RandomState(seed)
    tiles = length // tile
    if length in (1024, 3072, 4096):
        # Later rows are drawn and cut, because each head goes on from where the one before left the generator.
        drawn = [
            [_draw_early(rng, i, longest // tile, tile, r) for i in range(1, longest // tile - 1)] for _ in range(heads)
        ]
        return tuple(tuple(rows[: tiles - 2]) for rows in drawn)
    plan: list[list[list[int]]] = [[[] for _ in range(tiles)] for _ in range(heads)]
    for rows, keys, count in _stages(tiles, r):
        for row in rows:
            for head in range(heads):
                plan[head][row] += _draw_apart(rng, row, keys, count)
    return tuple(tuple(map(tuple, rows[1:-1])) for rows in plan)


def _draw_early(rng: np.random.RandomState, row: int, tiles: int, tile: int, r: int) -> tuple[int, ...]:
    """One row drawn from the first 1,024 tokens (all, if the tiles are large) without its neighbourhood."""
    last = 1024 // tile - 1 if 2 * tile < 1024 else tiles - 1
    middle = np.arange(1, tiles - 1)
    if row <= 2:
        options = middle[row + 1 : last]
    elif row >= tiles - 3 or row - 2 > last:
        options = middle[:last]
    elif row + 1 == last:
        options = middle[: row - 2]
    else:
        options = np.concatenate([middle[: row - 2], middle[row + 1 : last]])
    return tuple(rng.permutation(options)[:r].tolist())


def _stages(tiles: int, r: int) -> list[tuple[range, range, int]]:
    """Which rows draw how many tiles from which, in the order in which the generator is asked."""
    if tiles > 2 * r + 5:
        near = 2 * r + 5
        return [(range(1, near), range(near), r), (range(near, tiles), range(near), r)]
    if tiles > r + 5:
        near, few, rest = r + 5, r // 2, r - r // 2
        late = range(near, tiles)
        first = [(range(1, near), range(near), few)] if few else []
        cross = [(late, range(near), few)] if few else []
        return [*first, (range(1, near), late, rest), *cross, (late, late, rest)]
    return [(range(1, tiles), range(tiles), r)]


def _draw_apart(rng: np.random.RandomState, row: int, keys: range, count: int) -> list[int]:
    """`count` of the key tiles, none next to the row's own and none at an end."""
    out = {row - 1, row, row + 1, 0, keys.stop - 1}
    out |= {keys.stop - 2} if row == 1 else set()
    out |= {1} if row == keys.stop - 2 else set()
    return [i for i in rng.permutation(np.arange(keys.start, keys.stop)).tolist() if i not in out][:count]


def _is_listed(row: Any, column: Any, lists: tuple[tuple[int, ...], ...]) -> Any:
    """Whether `column` is in `lists[row]`; without a table, so that it can be used inside a kernel."""
    found = (row < 0) & (column < 0)  # False, in the broadcast shape
    for i, columns in enumerate(lists):
        starts, stops = merge_intervals(np.array(columns, np.int64), np.array(columns, np.int64) + 1)
        here = row == i
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            found = found | (here & (column >= start) & (column < stop))
    return found


def _pad(lists: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Lists as one array, int64 [rows, longest], filled up with -1."""
    longest = max(map(len, lists), default=0)
    return np.array([[*row, *[-1] * (longest - len(row))] for row in lists], np.int64).reshape(len(lists), longest)
