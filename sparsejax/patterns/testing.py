"""Comparison of any pattern, including a user's, with its own mask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from sparsejax.patterns.algebra import OffsetQueries, Shift
from sparsejax.patterns.base import Pattern
from sparsejax.patterns.layout import TileGrid, TileLayout
from sparsejax.patterns.text import parse

LENGTHS = ((45, 33), (20, 45), (32, 32), (1, 9), (9, 1), (0, 4))
TILES = ((4, 4), (3, 7), (8, 5), (1, 1), (64, 64))
SHIFTS = (-5, 3)
QUERY_OFFSETS = (6,)


def check_pattern(
    pattern: Pattern,
    lengths: Iterable[tuple[int, int]] = LENGTHS,
    tiles: Iterable[tuple[int, int]] = TILES,
    shifts: Iterable[int] = SHIFTS,
    query_offsets: Iterable[int] = QUERY_OFFSETS,
    text: bool = True,
) -> None:
    """Compares everything that a pattern states and everything derived from it with its mask, `allows`.

    Covers `for_head`, `counts`, `lookahead`, `last_query`, `pairs` and `edges`, and per tile size `bounds`, `signature`
    and `layout`, of the pattern, inside `shift`, and for later queries (`q_offset` of `ops.attend`). Every pair of
    every length is visited: choose small lengths.

    Args:
      pattern: Any pattern, with or without heads.
      lengths: Numbers of queries and keys.
      tiles: Tile sizes.
      shifts: Distances by which `shift` moves the pattern; tiles of shifted patterns have offsets.
      query_offsets: Positions of the first query; tiles of such patterns start inside the sequence.
      text: Whether the text form must parse back to an equal value. Requires `patterns.register`.

    Raises:
      AssertionError: A view disagrees with the mask. The message names the view, the pattern, the lengths and the tile.
    """
    tiles, shifts, query_offsets = tuple(tiles), tuple(shifts), tuple(query_offsets)
    if text:
        _check_text(pattern)
    for t, s in lengths:
        name = f"{pattern} at t={t}, s={s}"
        _check_heads(name, pattern, t, s)
        for head in dict.fromkeys(pattern.by_head()):
            _check_pairs(name, head, t, s)
            for tile in tiles:
                moved = (*(Shift(head, by) for by in shifts), *(OffsetQueries(head, by) for by in query_offsets))
                for variant in (head, *moved):
                    _check_tiles(f"{variant} at t={t}, s={s}, tile={tile}", variant, TileGrid(t, s, tile))


def _check_text(pattern: Pattern) -> None:
    parsed = parse(str(pattern))
    _equal(f"{pattern}: the parsed text form", parsed, pattern)
    _equal(f"{pattern}: the hash of the parsed text form", hash(parsed), hash(pattern))
    _equal(f"{pattern}: the digest of the parsed text form", parsed.digest, pattern.digest)


def _check_heads(name: str, pattern: Pattern, t: int, s: int) -> None:
    """The mask and the views that cover all heads."""
    mask, shape = pattern.dense(t, s), (t, s) if pattern.heads is None else (pattern.heads, t, s)
    _equal(f"{name}: the shape and type of allows", (mask.shape, mask.dtype), (shape, np.dtype(bool)))
    masks = mask.reshape(-1, t, s) if mask.size else np.zeros((len(pattern.by_head()), t, s), bool)
    _equal(f"{name}: for_head", np.array([head.dense(t, s) for head in pattern.by_head()]), masks)
    _equal(f"{name}: pairs", pattern.pairs(t, s), int(mask.sum()))
    q, k = np.nonzero(masks.any(axis=0))
    for query, key in zip(*(x[k - q > pattern.lookahead()][:1] for x in (q, k)), strict=True):
        raise AssertionError(f"{name}: lookahead is {pattern.lookahead()}, but query {query} attends to key {key}")
    last = np.asarray(pattern.last_query(np.arange(s)))
    _equal(f"{name}: the shape and type of last_query", (last.shape, last.dtype), ((s,), np.dtype(np.int64)))
    for query, key in zip(*(x[q > last[k]][:1] for x in (q, k)), strict=True):
        raise AssertionError(f"{name}: last_query of key {key} is {last[key]}, but query {query} attends to it")
    if mask.size:
        _equal(f"{name}: allows of one pair", np.asarray(pattern.allows(t - 1, s // 2, t, s)), mask[..., t - 1, s // 2])


def _check_pairs(name: str, pattern: Pattern, t: int, s: int) -> None:
    """The multiplicities and the edges of a pattern without heads."""
    q, k = np.arange(t)[:, None], np.arange(s)[None, :]
    counts = np.broadcast_to(pattern.counts(q, k, t, s), (t, s))
    _equal(f"{name}: counts > 0", counts > 0, pattern.dense(t, s))
    _require(f"{name}: counts exceeds 1, but repeats is False", pattern.repeats or (counts <= 1).all())
    q, k = np.nonzero(counts)
    edges = [np.repeat(positions, counts[q, k]) for positions in (q, k)]
    _equal(f"{name}: edges", np.array(pattern.edges(t, s)), np.array(edges))


def _check_tiles(name: str, pattern: Pattern, grid: TileGrid) -> None:
    """The bounds, signatures and layouts of a pattern without heads."""
    mask, tile = pattern.dense(grid.t, grid.s), grid.tile
    states, bounds = tile_states(mask, tile).ravel(), pattern.bounds(grid)
    for view, actual in (("live", states > 0), ("full", states == 2)):
        lower, upper = (np.zeros(states.size, bool) for _ in range(2))
        lower[getattr(bounds, f"{view}_lower").members()] = True
        upper[getattr(bounds, f"{view}_upper").members()] = True
        for problem, wrong in (
            (f"{view}_lower holds tiles that are not {view}", lower & ~actual),
            (f"{view}_upper lacks {view} tiles", actual & ~upper),
        ):
            tiles = [divmod(number, grid.columns) for number in np.flatnonzero(wrong)[:3].tolist()]
            _require(f"{name}: bounds.{problem}: {tiles}", not tiles)
    q0, k0 = (x * side for x, side in zip(np.divmod(np.arange(states.size), max(1, grid.columns)), tile, strict=True))
    known: dict[tuple[int, ...], np.ndarray] = {}
    for i, j, *signature in np.stack([q0, k0, *pattern.signature(grid, q0, k0)], axis=1).tolist():
        pairs = mask[i : i + tile[0], j : j + tile[1]]
        equal = np.array_equal(known.setdefault((*pairs.shape, *signature), pairs), pairs)
        _require(f"{name}: signature {signature} belongs to tiles that differ, one of them at ({i}, {j})", equal)
    (layout,) = pattern.layouts(grid.t, grid.s, tile)
    check_layout(layout, mask, tile, f"{name}: layout")
    check_layout(layout.transpose(), mask.T, (tile[1], tile[0]), f"{name}: transposed layout")


def tile_states(mask: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """The state of each tile of a mask [t, s]: 0 dead, 1 partial, 2 full."""
    t, s = mask.shape
    rows, columns = range(0, t, tile[0]), range(0, s, tile[1])
    parts = [mask[i : i + tile[0], j : j + tile[1]] for i in rows for j in columns]
    return np.array([int(part.any()) + int(part.all()) for part in parts], int).reshape(len(rows), len(columns))


def check_layout(layout: TileLayout, mask: np.ndarray, tile: tuple[int, int], name: str = "layout") -> None:
    """Compares all arrays of a layout with the mask [t, s] that it describes.

    Raises:
      AssertionError: They disagree.
    """
    states = tile_states(mask, tile)
    rows, columns = np.nonzero(states)
    _equal(f"{name}: grid", (layout.grid.t, layout.grid.s, layout.grid.tile), (*mask.shape, tile))
    _equal(f"{name}: dense", layout.dense(), states)
    # The arrays too: a repeated or unsorted column does not show in the states.
    _equal(f"{name}: rows", layout.rows, rows)
    _equal(f"{name}: columns", layout.columns, columns)
    _equal(f"{name}: full", layout.full, states[rows, columns] == 2)
    _equal(f"{name}: starts", layout.starts, np.searchsorted(rows, range(states.shape[0] + 1)))
    _equal(f"{name}: types", (layout.columns.dtype, layout.full.dtype), (np.dtype(np.int32), np.dtype(bool)))


def _equal(view: str, actual: Any, expected: Any) -> None:
    same = np.array_equal(actual, expected) if isinstance(actual, np.ndarray) else actual == expected
    _require(f"{view} is {actual}, expected {expected}", same)


def _require(problem: str, condition: Any) -> None:
    if not condition:
        raise AssertionError(problem)
