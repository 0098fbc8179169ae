"""Pictures of patterns: panels of cells, one per pattern or head, and panels as SVG."""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sparsejax import svg
from sparsejax.palette import CELLS, GREY
from sparsejax.patterns.base import Pattern, PatternError
from sparsejax.patterns.layout import TileLayout

# States of a cell: no allowed pair, some, or only such. A cell of one pair is dead, full, or counts more than once.
DEAD, PARTIAL, FULL, TWICE, THRICE, MORE = range(6)
# Layers whose connectivity is no attention pattern have one state for all cells that are not dead.
STATE, LOCAL, SELECTED = range(6, 9)
# Pairs of a selection: allowed and left out, selected, and selected whatever the data. A cell shows its last state.
LEFT_OUT, CHOSEN, FORCED = range(9, 12)
SELECTION_LEGEND = {CHOSEN: "selected", FORCED: "always selected", LEFT_OUT: "left out"}
CAPTIONS = {
    STATE: "a state of fixed size, no pairs",
    LOCAL: "no attention",
    SELECTED: "keys are selected from these by the data",
}
LEGENDS = {STATE: "read through a state", LOCAL: "read without attention", SELECTED: "may be attended to"}
REPEATED_LEGEND = {TWICE: "twice", THRICE: "three times", MORE: "more often"}
TILE_LEGEND = {FULL: "full tile", PARTIAL: "partial tile", DEAD: "dead tile"}
MAX_HEADS = 8  # panels of one pattern
COUNTED_TILE = 128  # largest tile of a layout; larger cells are composed of tiles of this size
PICTURE_CELLS = 64  # per side of a picture without explicit length
MAX_LAYOUT_CELLS = 128  # per side of the picture of a layout
MAX_LENGTH = 2**16  # tokens of a picture without explicit length
SCALES = {"seed": 0, "layer": 0, "head": 0, "longest": 0, "tile": 4}  # weight of a field in `default_length`; others: 1

COLUMNS = 4  # panels per row
SIDE, SMALL_SIDE = 256, 192  # pixels of a panel alone, and of one of several
LABELLED_CELL = 11  # pixels of a cell whose query and key are labelled by text
LABEL_FONT = 8
LINED_CELL = 6  # pixels of a cell from which lines separate the cells
LINE = 14  # pixels per line of text
TITLE_FONT = 10.5
INNERMOST = re.compile(r"[(\[][^()\[\]]*[)\]]")  # brackets without inner brackets
FOLDED = "\ue000\ue001\ue002\ue003"  # of a text that is being folded: brackets that stay, and folded ones
TITLE_LINES = 3  # of the name and of the text form of a pattern; longer ones are folded


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One picture: cells `states` [rows, columns], by default with queries downwards and keys to the right."""

    title: str
    states: np.ndarray  # int8 [rows, columns]: DEAD, PARTIAL, ...
    tile: tuple[int, int]  # queries and keys of a cell
    caption: str  # tile size and density
    axes: tuple[str, str] = ("query", "key")  # downwards and to the right
    words: tuple[str, str] = ("attended", "masked")  # the meaning of FULL and DEAD if cells are pairs
    labels: tuple[str, ...] = ()  # texts of the tokens, instead of their numbers

    @property
    def legend(self) -> dict[int, str]:
        """The meaning of the states that the panel may show."""
        for state, word in LEGENDS.items():
            if (self.states == state).any():
                return {state: word, DEAD: "not read"}
        if (self.states >= LEFT_OUT).any():
            present = {state: word for state, word in SELECTION_LEGEND.items() if (self.states == state).any()}
            return present | {DEAD: "masked"}
        if self.tile != (1, 1):
            return TILE_LEGEND
        words = {FULL: self.words[0], **REPEATED_LEGEND, DEAD: self.words[1]}
        return {state: word for state, word in words.items() if state < TWICE or (self.states == state).any()}


def draw_pattern(
    pattern: Pattern, length: int, tile: int = 1, title: str | None = None, describe: bool = False
) -> tuple[Panel, ...]:
    """Returns the panels of a pattern: one, or one per head. Equal heads share a panel.

    Args:
      pattern: Any pattern. Of its distinct heads the first `MAX_HEADS` are drawn.
      length: Sequence length in tokens.
      tile: Tokens per cell; above 128 a multiple of 128.
      title: Defaults to the text form of the pattern.
      describe: Whether the text form follows the title.
    """
    if pattern.heads is None:
        text = f"\n{pattern}" if title and describe else ""
        return (_draw_shared(pattern, length, tile, f"{title or pattern}{text}"),)
    heads: dict[Pattern, list[int]] = {}
    for index, head in enumerate(pattern.by_head()):
        heads.setdefault(head, []).append(index)
    titles = {head: f"head{'s' * (len(numbers) > 1)} {format_numbers(numbers)}" for head, numbers in heads.items()}
    drawn = list(heads)[:MAX_HEADS]
    if len(drawn) < len(heads):
        titles[drawn[-1]] += f" ({len(heads) - len(drawn)} more not drawn)"
    texts = {head: f"\n{head}" if describe else "" for head in drawn}
    return tuple(
        _draw_shared(
            head, length, tile, f"{title}, {titles[head]}{texts[head]}" if title else f"{titles[head]}: {head}"
        )
        for head in drawn
    )


def mark_cells(panel: Panel, state: int) -> Panel:
    """The panel of a layer that is no attention with a static pattern: `STATE`, `LOCAL` or `SELECTED`."""
    states = np.where(panel.states > DEAD, state, DEAD).astype(np.int8)
    tile = f"\ncells of {panel.tile[0]} x {panel.tile[1]} positions" if panel.tile != (1, 1) else ""
    return dataclasses.replace(panel, states=states, axes=("output", "input"), caption=f"{CAPTIONS[state]}{tile}")


def fold_text(text: str, characters: int) -> str:
    """The text form of a pattern in at most `characters`: its innermost arguments become "...", then the next ones."""
    folded = text
    while len(_unfold(folded)) > characters and INNERMOST.search(folded):
        folded = _fold(folded)
    text = _unfold(folded)
    return text if len(text) <= characters else f"{text[: characters - 3]}..."


def _fold(text: str) -> str:
    """Replaces the deepest brackets of a text by one character each."""
    depths = _depths(text)

    def replace(match: re.Match[str]) -> str:
        if depths[match.start()] < max(depths):
            return match[0]
        if text[: match.start()].endswith("per_head"):
            return f"{FOLDED[0]}{match[0].count(', ') + 1} patterns{FOLDED[1]}"
        return FOLDED[2] if match[0][0] == "(" else FOLDED[3]

    return INNERMOST.sub(replace, text)


def _depths(text: str) -> list[int]:
    """The number of open brackets after each character."""
    return list(itertools.accumulate((c in "([") - (c in ")]") for c in text))


def _unfold(text: str) -> str:
    return text.translate(dict(zip(map(ord, FOLDED), ("(", ")", "(...)", "[...]"), strict=True)))


def draw_mask(title: str, mask: np.ndarray, tile: int = 1) -> Panel:
    """Returns the panel of booleans [t, s], in cells of `tile` x `tile`."""
    states = _coarsen(FULL * mask.astype(np.int8), tile)
    return Panel(title, states, (tile, tile), _describe(states, tile, float(mask.mean())))


def draw_selection(
    title: str,
    allowed: np.ndarray,
    chosen: np.ndarray,
    forced: np.ndarray,
    tile: int = 1,
    labels: Sequence[str] = (),
) -> Panel:
    """Returns the panel of the keys that the queries of a text selected.

    Args:
      title: The title.
      allowed: Pairs from which the queries select, booleans [t, s].
      chosen: Selected pairs.
      forced: Pairs that are selected whatever the data.
      tile: Tokens per cell.
      labels: Texts of the tokens, which replace their numbers if a cell is a token.
    """
    chosen, forced = chosen & allowed, forced & allowed
    states = np.where(forced, FORCED, np.where(chosen, CHOSEN, np.where(allowed, LEFT_OUT, DEAD))).astype(np.int8)
    for axis in (0, 1):
        states = np.maximum.reduceat(states, np.arange(0, states.shape[axis], tile), axis=axis)
    kept, most = (mask.sum(axis=1).mean() for mask in (chosen, allowed))
    caption = f"{kept:.3g} of {most:.3g} keys per query"
    caption += f"\ncells of {tile} x {tile} tokens" if tile > 1 else ""
    return Panel(title, states, (tile, tile), caption, labels=tuple(labels) if tile == 1 else ())


def draw_layout(layout: TileLayout) -> Panel:
    """Returns the panel of a tile layout. With more than 128 tiles per side, a cell holds several tiles."""
    grid, live, full = layout.grid, len(layout.columns), int(layout.full.sum())
    factor = 1
    while max(grid.rows, grid.columns) > factor * MAX_LAYOUT_CELLS:
        factor *= 2
    queries, keys = grid.tile
    title = f"{grid.t:,} x {grid.s:,} tokens, tiles of {queries} x {keys}"
    caption = f"{live:,} of {grid.rows * grid.columns:,} tiles are live, {full:,} full"
    caption += f"\n{factor} x {factor} tiles per cell" if factor > 1 else ""
    return Panel(title, layout.coarsen(factor), (queries * factor, keys * factor), caption)


def default_length(pattern: Pattern) -> int:
    """Returns a power of two, in tokens, at which a picture shows the structure of a pattern.

    It is at least 64, four times the largest distance in the pattern and 16 tiles, up to `MAX_LENGTH`, and long
    enough for the pattern to be valid.

    Raises:
      PatternError: The pattern is valid at no power of two up to 2**20.
    """
    length, scale = PICTURE_CELLS, max(list_scales(pattern), default=0)
    while length < min(4 * scale, MAX_LENGTH):
        length *= 2
    while True:
        try:
            pattern.check(length, length)
            return length
        except PatternError:
            if length >= 2**20:
                raise
            length *= 2


def list_scales(value: object) -> Iterator[int]:
    """The magnitudes of the integers in the fields of a pattern, weighted by `SCALES` and the stride."""
    if isinstance(value, Pattern):
        for field in dataclasses.fields(value):
            weight = SCALES.get(field.name, 1 if field.name == "stride" else getattr(value, "stride", 1))
            yield from (weight * scale for scale in list_scales(getattr(value, field.name)))
    elif isinstance(value, tuple):
        yield from itertools.chain.from_iterable(map(list_scales, value))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield abs(value)


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
        if not pattern.repeats:
            return draw_mask(title, pattern.dense(length))
        positions = np.arange(length)
        counts = np.asarray(pattern.counts(positions[:, None], positions[None, :], length, length))
        states = np.where(counts > 0, np.minimum(counts + PARTIAL, MORE), DEAD).astype(np.int8)
        return Panel(title, states, (1, 1), _describe(states, 1, float((counts > 0).mean())))
    counted = min(tile, COUNTED_TILE)
    (layout,) = pattern.layouts(length, tile=(counted, counted))
    states = layout.coarsen(tile // counted)
    return Panel(title, states, (tile, tile), _describe(states, tile, pattern.pairs(length) / length**2))


def _describe(states: np.ndarray, tile: int, density: float) -> str:
    pairs = f"{100 * density:.3g}% of pairs"
    live = 100 * np.mean(states > DEAD)
    return pairs if tile == 1 else f"{live:.3g}% of tiles of {tile}, {pairs}"


def _coarsen(states: np.ndarray, factor: int) -> np.ndarray:
    """States, int8 [rows, columns], of cells that are `factor` times as high and wide; the last may be smaller."""
    if factor == 1:
        return states
    rows, columns = (np.arange(0, size, factor) for size in states.shape)
    least = np.minimum.reduceat(np.minimum.reduceat(states, rows, axis=0), columns, axis=1)
    most = np.maximum.reduceat(np.maximum.reduceat(states, rows, axis=0), columns, axis=1)
    return (most > DEAD) + (least == FULL).astype(np.int8)


# SVG.


def picture(pattern: Pattern, length: int | None = None, title: str | None = None, columns: int = COLUMNS) -> str:
    """Returns a pattern as SVG with at most 64 cells per side.

    Args:
      pattern: Any pattern.
      length: Sequence length in tokens; defaults to `default_length`.
      title: Defaults to the text form of the pattern.
      columns: Panels per row, if heads differ.
    """
    length = default_length(pattern) if length is None else length
    tile = 1
    while length > tile * PICTURE_CELLS:
        tile *= 2
    return panels_to_svg(draw_pattern(pattern, length, tile, title), columns)


def panels_to_svg(panels: Sequence[Panel], columns: int = COLUMNS) -> str:
    """Returns panels side by side as one SVG, at most `columns` per row."""
    columns = min(columns, len(panels))
    side = SIDE if len(panels) == 1 else SMALL_SIDE
    placed = [(_wrap(panel, side), *_cell_size(panel, side), panel) for panel in panels]
    margin = max(_label_width(panel) for panel in panels)
    left = 52 + margin
    step = left + 14 + max(side, *(int(width) * panel.states.shape[1] for _, width, _, panel in placed))
    elements, y = [], 4.0
    for first in range(0, len(placed), columns):
        row = placed[first : first + columns]
        titles = max(len(title) for title, *_ in row)
        top = y + titles * LINE + 12
        for column, (title, width, height, panel) in enumerate(row):
            x = left + column * step
            start = top - 6 - LINE * len(title)
            elements += [
                svg.text(x, start + LINE * (line + 1) - 4, words, size=TITLE_FONT, mono=True)
                for line, words in enumerate(title)
            ]
            elements += _panel_to_svg(panel, x, top, (width, height))
        heights = (
            height * len(panel.states) + LINE * panel.caption.count("\n") + _label_width(panel)
            for *_, height, panel in row
        )
        y = top + max(heights) + 48
    states = {state: word for panel in panels for state, word in panel.legend.items()}
    legend, width = svg.legend(left, y + 12, [(CELLS[state], word) for state, word in states.items()])
    accessible = "; ".join(" ".join(f"{panel.title}: {panel.caption}".split()) for panel in panels)
    return svg.document(max(left + columns * step - 46, left + width), y + 26, accessible, [*elements, legend])


def _panel_to_svg(panel: Panel, x: float, y: float, cell: tuple[float, float]) -> Iterable[str]:
    """Cells, ticks in tokens, axes and caption."""
    rows, columns = panel.states.shape
    width, height, margin = columns * cell[0], rows * cell[1], _label_width(panel)
    yield svg.cells(panel.states, x, y, cell, lines=min(cell) >= LINED_CELL)
    for index, label in enumerate(panel.labels):
        across, down = x + (index + 0.5) * cell[0] + 3, y + (index + 0.5) * cell[1] + 3
        yield svg.text(x - 4, down, label, anchor="end", size=LABEL_FONT, mono=True, fill=GREY)
        rotation = _rotate(across, y + height + 4)
        yield svg.text(
            across, y + height + 4, label, anchor="end", size=LABEL_FONT, mono=True, fill=GREY, transform=rotation
        )
    if not panel.labels:
        for token, at in _ticks(rows, panel.tile[0], cell[1]):
            yield svg.text(x - 4, y + at + 3.5, token, anchor="end", size=9, fill=GREY)
        for token, at in _ticks(columns, panel.tile[1], cell[0]):
            yield svg.text(x + at, y + height + 11, token, anchor="middle", size=9, fill=GREY)
    side, middle = x - 40 - margin, y + height / 2
    yield svg.text(side, middle, panel.axes[0], anchor="middle", transform=_rotate(side, middle))
    bottom = y + height + margin
    yield svg.text(x + width / 2, bottom + 24, panel.axes[1], anchor="middle")
    for line, words in enumerate(panel.caption.splitlines()):
        yield svg.text(x + width / 2, bottom + 40 + LINE * line, words, anchor="middle", size=10, fill=GREY)


def _rotate(x: float, y: float) -> str:
    """The attribute `transform` of text that reads upwards from a point."""
    return f"rotate(-90 {svg.number(x)} {svg.number(y)})"


def _label_width(panel: Panel) -> int:
    """Pixels by which the labels of tokens are longer than numbers."""
    longest = max(map(len, panel.labels), default=0)
    return max(0, int(svg.MONO_WIDTH * LABEL_FONT * longest) - 20)


def _cell_size(panel: Panel, side: float) -> tuple[float, float]:
    """Width and height of a cell in whole pixels."""
    rows, columns = panel.states.shape
    queries, keys = panel.tile
    if panel.labels:
        side = max(side, LABELLED_CELL * rows)
    scale = side / max(rows * queries, columns * keys, 1)
    width, height = (max(1.0, np.round(scale * tokens)) for tokens in (keys, queries))
    return float(width), float(height)


def _ticks(count: int, tile: int, size: float) -> Iterator[tuple[str, float]]:
    """Label and offset in pixels of about four tokens of an axis of `count` cells.

    A token is labelled at its centre; a tile is labelled with its first token, at its edge.
    """
    step = 2 ** max(0, (count - 1).bit_length() - 2)
    for index in range(0, count + (tile > 1), step):
        yield f"{index * tile}", (index + 0.5 * (tile == 1)) * size


def _wrap(panel: Panel, side: float) -> list[str]:
    """The title in lines that fit a panel."""
    return wrap_title(panel.title, int((side + 40) / (svg.MONO_WIDTH * TITLE_FONT)))


def wrap_title(title: str, characters: int) -> list[str]:
    """The lines of a title, each wrapped; a text form of more than `TITLE_LINES` lines is folded."""
    return [line for part in title.splitlines() for line in _wrap_line(part, characters)]


def _wrap_line(text: str, characters: int) -> list[str]:
    for limit in range(TITLE_LINES * characters, 3, -4):
        lines = textwrap.wrap(fold_text(text, limit), characters, break_on_hyphens=False)
        if len(lines) <= TITLE_LINES:
            return lines
    raise AssertionError(text)
