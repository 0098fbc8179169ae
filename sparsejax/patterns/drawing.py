"""Patterns as pictures: panels of cells, one per pattern or head. The caller chooses the colours."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsejax.patterns.base import Pattern

DEAD, PARTIAL, FULL = 0, 1, 2  # a cell with no allowed pair, some, or only such; a single pair is dead or full
MAX_HEADS = 8  # panels of one pattern
COUNTED_TILE = 128  # largest tile of a layout; larger cells are composed of tiles of this size


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One picture: cells `states` [rows, columns] with queries downwards and keys to the right."""

    title: str
    states: np.ndarray  # int8 [rows, columns]: DEAD, PARTIAL or FULL
    tile: int  # queries and keys of a cell
    density: float  # allowed pairs as a fraction of all pairs

    @property
    def caption(self) -> str:
        """The tile size and the density."""
        pairs = f"{100 * self.density:.3g}% of pairs"
        live = 100 * np.mean(self.states > DEAD)
        return pairs if self.tile == 1 else f"{live:.3g}% of tiles of {self.tile}, {pairs}"


def draw_pattern(pattern: Pattern, length: int, tile: int = 1, title: str | None = None) -> tuple[Panel, ...]:
    """The panels of a pattern: one, or one per head. Equal heads share a panel.

    Args:
      pattern: Any pattern. Of its distinct heads the first `MAX_HEADS` are drawn.
      length: Sequence length in tokens.
      tile: Tokens of a cell; above 128 a multiple of 128.
      title: Defaults to the text form of the pattern.
    """
    if pattern.heads is None:
        return (_draw_shared(pattern, length, tile, title or str(pattern)),)
    heads: dict[Pattern, list[int]] = {}
    for index, head in enumerate(pattern.by_head()):
        heads.setdefault(head, []).append(index)
    titles = {head: f"head{'s' * (len(numbers) > 1)} {format_numbers(numbers)}" for head, numbers in heads.items()}
    drawn = list(heads)[:MAX_HEADS]
    if len(drawn) < len(heads):
        titles[drawn[-1]] += f" ({len(heads) - len(drawn)} more not drawn)"
    return tuple(
        _draw_shared(head, length, tile, f"{title}, {titles[head]}" if title else f"{titles[head]}: {head}")
        for head in drawn
    )


def draw_mask(title: str, mask: np.ndarray, tile: int = 1) -> Panel:
    """The panel of booleans [t, s], in cells of `tile` x `tile`."""
    states = _coarsen(FULL * mask.astype(np.int8), tile)
    return Panel(title, states, tile, float(mask.mean()))


def format_numbers(numbers: list[int]) -> str:
    """Ascending numbers as ranges: `0-3, 5`. Of more than six ranges only the first five and the last are listed."""
    ranges = format_ranges(numbers)
    return ", ".join(ranges if len(ranges) <= 6 else [*ranges[:5], "...", ranges[-1]])


def format_ranges(numbers: list[int]) -> list[str]:
    """Ascending numbers as the ranges that they form: `0-3` and `5`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n for n in numbers if n + 1 not in numbers]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True)]


def _draw_shared(pattern: Pattern, length: int, tile: int, title: str) -> Panel:
    """The panel of a pattern that all heads share."""
    if tile == 1:
        return draw_mask(title, pattern.dense(length))
    counted = min(tile, COUNTED_TILE)
    (layout,) = pattern.layouts(length, tile=(counted, counted))
    return Panel(title, _coarsen(layout.dense(), tile // counted), tile, pattern.pairs(length) / length**2)


def _coarsen(states: np.ndarray, factor: int) -> np.ndarray:
    """States, int8 [rows, columns], of cells that are `factor` times as high and wide; the last may be smaller."""
    if factor == 1:
        return states
    rows, columns = (np.arange(0, size, factor) for size in states.shape)
    least = np.minimum.reduceat(np.minimum.reduceat(states, rows, axis=0), columns, axis=1)
    most = np.maximum.reduceat(np.maximum.reduceat(states, rows, axis=0), columns, axis=1)
    return (most > DEAD) + (least == FULL).astype(np.int8)
