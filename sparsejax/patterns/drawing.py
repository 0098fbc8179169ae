"""Patterns as pictures: panels of cells, one for each pattern or head; whoever shows them chooses the colours."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsejax.patterns.base import Pattern

DEAD, PARTIAL, FULL = 0, 1, 2  # a cell holds no allowed pair, some, only such; a single pair is dead or full
MOST_HEADS = 8  # panels of one pattern
COUNTED_TILE = 128  # the widest tile that a layout looks into pair by pair; wider ones are put together from these


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One picture: `states` [rows, columns] of cells; queries go down, keys go right."""

    title: str
    states: np.ndarray  # int8 [rows, columns]: DEAD, PARTIAL or FULL
    tile: int  # queries and keys of a cell
    density: float  # allowed pairs over all pairs

    @property
    def caption(self) -> str:
        """The tile, and how sparse it is."""
        pairs = f"{100 * self.density:.3g}% of pairs"
        live = 100 * np.mean(self.states > DEAD)
        return pairs if self.tile == 1 else f"{live:.3g}% of tiles of {self.tile}, {pairs}"


def draw_pattern(pattern: Pattern, length: int, tile: int = 1, title: str | None = None) -> tuple[Panel, ...]:
    """The panels of a pattern: one, or one for each of its heads, where equal heads share theirs.

    Args:
      pattern: any pattern; of the different heads of one with many, the first `MOST_HEADS` are drawn.
      length: tokens.
      tile: tokens of a cell; above 128 a multiple of 128.
      title: the text form of the pattern if not given.
    """
    if pattern.heads is None:
        return (_draw_shared(pattern, length, tile, title or str(pattern)),)
    equal: dict[Pattern, list[int]] = {}
    for index in range(pattern.heads):
        equal.setdefault(pattern.for_head(index), []).append(index)
    titles = {head: f"head{'s' * (len(numbers) > 1)} {name_numbers(numbers)}" for head, numbers in equal.items()}
    drawn = list(equal)[:MOST_HEADS]
    if len(drawn) < len(equal):
        titles[drawn[-1]] += f" ({len(equal) - len(drawn)} more are not drawn)"
    return tuple(
        _draw_shared(head, length, tile, f"{title}, {titles[head]}" if title else f"{titles[head]}: {head}")
        for head in drawn
    )


def draw_mask(title: str, mask: np.ndarray, tile: int = 1) -> Panel:
    """The panel of any booleans [t, s], in cells of `tile` x `tile`."""
    states = _coarsen(FULL * mask.astype(np.int8), tile)
    return Panel(title, states, tile, float(mask.mean()))


def name_numbers(numbers: list[int]) -> str:
    """Ascending numbers in short: `0-3, 5`; of more than six ranges only the first five and the last are named."""
    ranges = name_ranges(numbers)
    return ", ".join(ranges if len(ranges) <= 6 else [*ranges[:5], "...", ranges[-1]])


def name_ranges(numbers: list[int]) -> list[str]:
    """Ascending numbers as the ranges they form: `0-3` and `5`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n for n in numbers if n + 1 not in numbers]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True)]


def _draw_shared(pattern: Pattern, length: int, tile: int, title: str) -> Panel:
    """The panel of a pattern that is the same for all heads."""
    if tile == 1:
        return draw_mask(title, pattern.dense(length))
    counted = tile if tile <= COUNTED_TILE else COUNTED_TILE
    states = _coarsen(pattern.layout(length, tile=(counted, counted)).dense(), tile // counted)
    return Panel(title, states, tile, pattern.pairs(length) / length**2)


def _coarsen(states: np.ndarray, factor: int) -> np.ndarray:
    """States int8 [rows, columns] of cells that are `factor` times as high and wide; the last may be smaller."""
    if factor == 1:
        return states
    rows, columns = (np.arange(0, size, factor) for size in states.shape)
    least = np.minimum.reduceat(np.minimum.reduceat(states, rows, axis=0), columns, axis=1)
    most = np.maximum.reduceat(np.maximum.reduceat(states, rows, axis=0), columns, axis=1)
    return (most > DEAD) + (least == FULL).astype(np.int8)
