"""Patterns made of whole tiles, listed explicitly or drawn at random.

A draw is a pure function of (seed, layer, head, query tile). NumPy and kernels compute it alike, and it is the same in
every step and after every restart.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sparsejax.patterns.base import (
    FOREVER,
    MAX_POSITION,
    Mask,
    Pattern,
    PatternError,
    Positions,
    array_module,
    format_value,
    require,
)
from sparsejax.patterns.layout import MAX_LIVE_TILES, TileGrid
from sparsejax.patterns.spans import Bounds, cover, merge_intervals

UNROLLED = 64  # draws of `random` per query tile up to which each is compared with all earlier ones
TABLE = 2**26  # bytes of the table of what is drawn if there are more draws
MAX_PLAN = 2**26  # cost of one plan of `bigbird_random`, in shuffled tiles: a few seconds
DRAW_COST = 200  # of a draw, apart from the tiles that it shuffles


class _Tiled(Pattern):
    """A pattern given by the key tiles of each query tile: `_lists`, with which `allows` must agree."""

    def _lists(self, t: int, s: int) -> tuple[tuple[int, int], np.ndarray]:
        """Height and width of a tile in tokens, and the key tiles of each query tile, int [rows, n], padded with -1."""
        raise NotImplementedError

    def bounds(self, grid: TileGrid) -> Bounds:
        (height, width), lists = self._lists(grid.t, grid.s)
        first, last = grid.row_bounds()
        low, high = first // height, np.minimum(last // height, len(lists) - 1)
        listed = np.maximum(high - low + 1, 0)  # number of rows of the pattern that a row of the grid crosses
        row = np.repeat(np.arange(grid.rows), listed)
        crossed = np.arange(len(row)) - np.repeat(np.cumsum(listed) - listed, listed) + low[row]
        columns = lists[crossed]
        row, start = np.repeat(row, lists.shape[1]), columns.ravel().astype(np.int64) * width
        keep = start >= 0
        keys = _RowIntervals(row[keep], start[keep], start[keep] + width)
        # A key to which all queries of a grid row attend is listed in every row that the grid row crosses.
        whole = np.where(last // height < len(lists), listed, 0)
        return Bounds.exact(grid.touched(*keys.covered(np.minimum(listed, 1))), grid.filled(*keys.covered(whole)))


@dataclasses.dataclass(frozen=True)
class _RowIntervals:
    """Intervals of keys `[start, stop)` by row, int64 [n] each."""

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def covered(self, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts, stops and rows of the keys that at least `depth[row]` intervals cover; depth 0 skips a row."""
        length = self.stop.max(initial=0) + 1  # of a row; rows are laid end to end with gaps between them
        edges = [np.zeros((0, 2), np.int64)]
        for level in np.unique(depth[depth > 0]).tolist():
            selected = depth[self.row] == level
            shift = self.row[selected] * length
            edges.append(cover(self.start[selected] + shift, self.stop[selected] + shift, level))
        start, stop = np.concatenate(edges).T
        rows = start // length
        return start - rows * length, stop - rows * length, rows


@dataclasses.dataclass(frozen=True)
class Tiles(_Tiled):
    """Any layout: `rows[i]` lists the key tiles, counted from 0, to which query tile i attends.

    Tiles have `tile` by `tile` tokens. By default queries and keys are each cut into as many tiles as there are rows;
    the last tile may be smaller.
    """

    name: ClassVar[str] = "tiles"
    rows: tuple[tuple[int, ...], ...]
    tile: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        rows = self.rows
        if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, list | tuple) for row in rows):
            raise PatternError("tiles.rows", f"{format_value(rows)} is not a list of key tiles per query tile")
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for row in rows for i in row):
            raise PatternError("tiles.rows", "contains a key tile that is not an integer >= 0")
        object.__setattr__(self, "rows", tuple(tuple(sorted(set(row))) for row in rows))
        if self.tile is not None:
            require(self, tile=1)
            if (max(self._last_column(), len(rows)) + 1) * self.tile > MAX_POSITION:
                raise PatternError("tiles.rows", f"key tile {self._last_column()} of {self.tile} tokens exceeds 2**30")
        elif self._last_column() >= len(rows):
            raise PatternError("tiles.rows", f"key tile {self._last_column()} exceeds the last, {len(rows) - 1}")

    def check(self, t: int, s: int) -> None:
        if self.tile is None:
            return
        if self._last_column() >= -(-s // self.tile) or len(self.rows) > -(-t // self.tile):
            raise PatternError("tiles.rows", f"a tile of {self.tile} is outside a sequence of {min(t, s)} tokens")

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        height, width = self._sides(t, s)
        return _is_listed(q // height, k // width, self.rows)

    def last_query(self, k: np.ndarray) -> np.ndarray:
        if self.tile is None:
            return np.full_like(k, FOREVER)
        rows = {column: row for row, columns in enumerate(self.rows) for column in columns} | {FOREVER: -1}
        listed = np.array(sorted(rows), np.int64)
        last = np.array([rows[column] for column in listed.tolist()], np.int64)
        index, column = np.searchsorted(listed, k // self.tile), k // self.tile
        row = np.where(listed[index] == column, last[index], -1)
        return np.where(row < 0, -1, (row + 1) * self.tile - 1)

    def _last_column(self) -> int:
        return max((i for row in self.rows for i in row), default=0)

    def _sides(self, t: int | None, s: int | None) -> tuple[int, int]:
        if self.tile is not None:
            return self.tile, self.tile
        if t is None or s is None:
            raise PatternError("t, s", "required by tiles without tile=, whose size depends on the lengths")
        return max(1, -(-t // len(self.rows))), max(1, -(-s // len(self.rows)))

    def _lists(self, t: int, s: int) -> tuple[tuple[int, int], np.ndarray]:
        return self._sides(t, s), _pad(self.rows)


@dataclasses.dataclass(frozen=True)
class Random(_Tiled):
    """Each query tile attends to `r` key tiles, drawn uniformly without replacement (BigBird, arXiv:2007.14062).

    A query tile with fewer than `r` candidates attends to all of them. Without `reach`, the draw depends on the number
    of keys.

    Attributes:
      r: Key tiles per query tile.
      tile: Tokens of a tile.
      seed: Seed of the draw.
      reach: Largest distance in tokens between the starts of the query tile and a candidate.
      apart: Smallest distance in tiles of a candidate (1 excludes the query tile, 2 also its neighbours).
      ends: Number of tiles at either end of the sequence that are no candidates.
      layer: Layer of the draw; draws of different layers differ.
      head: Head of the draw; draws of different heads differ.
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

    def __post_init__(self) -> None:
        require(self, r=1, tile=1, seed=0, apart=0, ends=0, layer=0, head=0)
        if self.reach is not None:
            require(self, reach=0)

    def check(self, t: int, s: int) -> None:
        columns = -(-s // self.tile) - 2 * self.ends
        columns = columns if self.reach is None else min(columns, 2 * (self.reach // self.tile) + 1)
        most = columns - max(2 * self.apart - 1, 0)
        if self.r > most:
            raise PatternError("random.r", f"{self.r} exceeds the {max(most, 0)} candidate tiles of {self.tile} tokens")
        self._count_rows(t)

    def _count_rows(self, t: int) -> int:
        rows = -(-t // self.tile)
        if rows * self.r > MAX_LIVE_TILES:
            raise PatternError("random.r", f"{self.r} tiles per query tile are {rows * self.r} tiles, more than 2**26")
        return rows

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        if s is None:
            raise PatternError("s", f"required by {self}, whose draw depends on the number of keys")
        row, column = q // self.tile, k // self.tile
        if min(self.r, -(-s // self.tile)) <= UNROLLED or array_module(q, k) is not np:
            return functools.reduce(operator.or_, (column == drawn for drawn in self._draw(row, s)))
        rows, index = np.unique(row, return_inverse=True)
        drawn = np.stack(self._draw(rows, s), axis=-1)
        return _is_listed(index.reshape(np.shape(row)), column, [row[row >= 0] for row in drawn])

    def last_query(self, k: np.ndarray) -> np.ndarray:
        if self.reach is None:
            return np.full_like(k, FOREVER)
        return (k // self.tile + self.reach // self.tile + 1) * self.tile - 1

    def lookahead(self) -> float:
        return super().lookahead() if self.reach is None else (self.reach // self.tile + 1) * self.tile - 1

    def _lists(self, t: int, s: int) -> tuple[tuple[int, int], np.ndarray]:
        return (self.tile, self.tile), np.stack(self._draw(np.arange(self._count_rows(t)), s), axis=-1)

    def _draw(self, row: Any, s: int) -> list[Any]:
        """The `r` key tiles of query tiles `row` by Floyd's algorithm: integers of the same shape, -1 for no tile.

        There are no more of them than key tiles.
        """
        xp, tiles = array_module(row), max(1, -(-s // self.tile))
        draws = min(self.r, tiles)
        several = draws > UNROLLED and xp is np
        if several and row.size > max(1, TABLE // tiles):
            parts = np.array_split(row, -(-row.size * tiles // TABLE))
            return [np.concatenate(drawn) for drawn in zip(*(self._draw(part, s) for part in parts), strict=True)]
        far = tiles if self.reach is None else min(self.reach // self.tile, tiles)
        ends = min(self.ends, tiles)
        low, stop = xp.maximum(row - far, ends), xp.minimum(row + far + 1, -(-s // self.tile) - ends)
        gap, gap_stop = (xp.clip(row + side, low, xp.maximum(stop, low)) for side in (1 - self.apart, self.apart))
        gap_size = xp.maximum(gap_stop - gap, 0)
        count = stop - low - gap_size  # candidates
        taken = np.zeros((row.size, tiles) if several else (0, 0), bool)
        drawn: list[Any] = []
        for i in range(draws):
            top = count - self.r + i
            pick = self._number(xp, row, i) % xp.maximum(top + 1, 1).astype(np.uint32)
            pick = pick.astype(top.dtype)
            if several:
                pick = np.where(taken[np.arange(row.size), pick], top, pick)
                taken[np.arange(row.size), np.maximum(pick, 0)] = True
            elif i > UNROLLED:  # in one operation, so that the program of JAX grows linearly
                pick = xp.where((xp.stack(drawn) == pick).any(axis=0), top, pick)
            else:
                for earlier in drawn:
                    pick = xp.where(earlier == pick, top, pick)
            pick = xp.where(count > self.r, pick, i)
            drawn.append(pick)
        columns = (xp.where(low + pick >= gap, low + pick + gap_size, low + pick) for pick in drawn)
        return [xp.where(i < count, column, -1) for i, column in enumerate(columns)]

    def _number(self, xp: Any, row: Any, i: int) -> Any:
        """A random uint32 per row: a keyed counter, mixed by the finalizer of MurmurHash3."""
        key = np.random.SeedSequence([self.seed, self.layer, self.head]).generate_state(1)[0]
        with np.errstate(over="ignore"):
            x = (xp.asarray(row) * self.r + i).astype(np.uint32) + key
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
            return x ^ (x >> np.uint32(16))


@dataclasses.dataclass(frozen=True)
class BigBirdRandom(_Tiled):
    """The random tiles with which the released BigBird models were trained.

    The released code draws them with NumPy's legacy generator, seeded with the number of the layer. For sequences of
    1,024, 3,072 or 4,096 tokens it draws from the first 1,024 tokens, for `longest` tokens, and truncates the plan; for
    other lengths it draws from the first `2 r + 5` tiles if there are more. The first and the last row are global and
    have no random tiles. In evaluation the released code does not draw: every row has tile 0 `r` times; see
    `recipes.bigbird`. Matches transformers 5.23 (`modeling_big_bird.py`, training mode).

    Attributes:
      r: Key tiles per query tile.
      tile: Tokens of a tile.
      seed: Seed of the draw: the number of the layer.
      head: Head among the `among` heads that are drawn together.
      among: Number of heads that are drawn together.
      longest: Longest sequence of the model, in tokens.
    """

    name: ClassVar[str] = "bigbird_random"
    r: int
    tile: int = dataclasses.field(kw_only=True)
    seed: int = dataclasses.field(kw_only=True)
    head: int = dataclasses.field(default=0, kw_only=True)
    among: int = dataclasses.field(default=1, kw_only=True)
    longest: int = dataclasses.field(default=4096, kw_only=True)

    def __post_init__(self) -> None:
        require(self, r=1, tile=1, seed=0, head=0, longest=1)
        require(self, among=self.head + 1)

    def check(self, t: int, s: int) -> None:
        dense = (2 * self.r + 5) * self.tile
        if min(t, s) <= dense:
            raise PatternError("bigbird_random", f"the released models use full attention up to {dense} tokens")
        self._padded_length(s)

    def _padded_length(self, s: int) -> int:
        """The tokens of the tiles of a sequence. A plan whose draws take more than seconds is an error."""
        length = -(-s // self.tile) * self.tile
        rows = max(length, self.longest) // self.tile
        if self.among * rows * (2 * self.r + DRAW_COST) > MAX_PLAN:
            raise PatternError("bigbird_random", f"draws {self.r} of {rows} tiles for {self.among} heads; use random")
        return length

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        if s is None:
            raise PatternError("s", f"required by {self}, whose draw depends on the number of keys")
        return _is_listed(q // self.tile, k // self.tile, self._plan(s))

    def _lists(self, t: int, s: int) -> tuple[tuple[int, int], np.ndarray]:
        return (self.tile, self.tile), _pad(self._plan(s))

    def _plan(self, s: int) -> tuple[tuple[int, ...], ...]:
        length = self._padded_length(s)
        heads = released_plan(length, self.tile, self.r, self.among, self.seed, self.longest)
        return ((), *heads[self.head], ())[: length // self.tile]


@functools.lru_cache(maxsize=64)
def released_plan(
    length: int, tile: int, r: int, heads: int, seed: int, longest: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The key tiles that the code of BigBird draws, per head and per query tile except the first and the last."""
    rng = np.random.RandomState(seed)
    tiles = length // tile
    if length in (1024, 3072, 4096):
        # Rows beyond the sequence are drawn and dropped: each head continues with the previous head's generator.
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
    """Draws one row from the first 1,024 tokens (from all tokens if tiles are large), excluding its neighbourhood."""
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
    """Rows, candidate key tiles and number of draws, in the order in which the generator is used."""
    if tiles > 2 * r + 5:
        near = 2 * r + 5
        return [(range(1, near), range(near), r), (range(near, tiles), range(near), r)]
    if tiles > r + 5:
        near, few, many = r + 5, r // 2, r - r // 2
        late = range(near, tiles)
        first = [(range(1, near), range(near), few)] if few else []
        cross = [(late, range(near), few)] if few else []
        return [*first, (range(1, near), late, many), *cross, (late, late, many)]
    return [(range(1, tiles), range(tiles), r)]


def _draw_apart(rng: np.random.RandomState, row: int, keys: range, count: int) -> list[int]:
    """Draws `count` of the key tiles, excluding the neighbourhood of the row and the ends."""
    excluded = {row - 1, row, row + 1, 0, keys.stop - 1}
    excluded |= {keys.stop - 2} if row == 1 else set()
    excluded |= {1} if row == keys.stop - 2 else set()
    return [i for i in rng.permutation(np.arange(keys.start, keys.stop)).tolist() if i not in excluded][:count]


def _is_listed(row: Any, column: Any, lists: Sequence[Any]) -> Any:
    """Whether `column` is in `lists[row]`. With JAX it uses no lookup table, so that kernels can evaluate it."""
    if array_module(row, column) is np:
        listed = np.concatenate([np.zeros(0, np.int64), *(np.asarray(columns, np.int64) for columns in lists)])
        size = listed.max(initial=-1) + 1
        listed += np.repeat(np.arange(len(lists)), list(map(len, lists))) * size
        listed = np.append(np.unique(listed), FOREVER)
        inside = (row >= 0) & (row < len(lists)) & (column >= 0) & (column < size)
        number = np.where(inside, row * np.int64(size) + column, -1)
        return listed[np.searchsorted(listed, number)] == number
    mask = (row < 0) & (column < 0)  # all False, in the broadcast shape
    for i, columns in enumerate(lists):
        starts, stops = merge_intervals(np.array(columns, np.int64), np.array(columns, np.int64) + 1)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            mask = mask | ((row == i) & (column >= start) & (column < stop))
    return mask


def _pad(lists: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Lists as one array, int64 [rows, longest], padded with -1."""
    longest = max(map(len, lists), default=0)
    return np.array([[*row, *[-1] * (longest - len(row))] for row in lists], np.int64).reshape(len(lists), longest)
