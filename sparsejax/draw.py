"""Pictures of patterns and schedules, on the terminal or in a file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from sparsejax.errors import InputError
from sparsejax.figures import write_figure
from sparsejax.palette import CELLS
from sparsejax.paths import local_path
from sparsejax.patterns import Panel, Pattern, draw_mask, draw_pattern, format_numbers, receptive_field
from sparsejax.patterns.drawing import (
    COUNTED_TILE,
    MAX_HEADS,
    draw_selection,
    mark_cells,
    panels_to_svg,
    wrap_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
MAX_CELLS = 4096  # per side of a picture in a file
DEFAULT_CELLS = 256  # per side of a picture in a file, if no tile is given
MAX_RECEPTIVE_FIELD = 2048  # tokens; receptive fields are products of boolean matrices here
MAX_SELECTION = 2048  # tokens of a text whose selected pairs are drawn
MAX_TOKENS = 2**18  # at which a full pattern has four million tiles
MAX_LABELS = 32  # tokens of a text whose tokens are written at the axes
MAX_LABEL = 10  # characters of a token there

# By state of a cell, as `palette.CELLS`.
SIXTEEN_COLOURS = (  # for terminals with 16 colours
    *("white", "cyan", "blue", "yellow", "red", "magenta"),
    *("green", "bright_magenta", "bright_yellow"),
    *("bright_black", "bright_blue", "bright_red"),
)
PLAIN = ".+#234~=?-o@"  # for terminals without colours

PANELS_IN_A_ROW = 4
INCHES = 2.1  # side of a panel
LABELLED_INCHES = 0.12  # of a cell whose query and key are labelled by text
TITLE_WIDTH = 30  # characters


@dataclasses.dataclass(frozen=True)
class Part:
    """A mixer of a layer: its kind, what it reads, and the state of the cells if it is no attention with a pattern."""

    kind: str
    pattern: Pattern
    state: int | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """A pattern to draw.

    Attributes:
      pattern: The pattern.
      title: Defaults to the text form of the pattern.
      state: State of the cells of a layer that is no attention with a static pattern, see `mark_cells`.
      describe: Whether the text form follows the title.
    """

    pattern: Pattern
    title: str | None = None
    state: int | None = None
    describe: bool = False


def draw(
    subjects: Sequence[Subject], length: int, console: Console, tile: int | None = None, out: str | None = None
) -> None:
    """Draws patterns, one panel per pattern and head.

    Args:
      subjects: The patterns.
      length: Sequence length in tokens.
      console: The terminal, used if `out` is None.
      tile: Tokens of a cell. Defaults to the smallest power of two at which the picture fits: the width of the
        terminal, or `DEFAULT_CELLS` cells in a file.
      out: Path of a .png or .svg file.

    Raises:
      InputError: An argument is invalid; the error names it.
    """
    tile = choose_tile(length, tile, console, out)
    draw_panels([panel for subject in subjects for panel in _draw_subject(subject, length, tile)], console, out)


def _draw_subject(subject: Subject, length: int, tile: int) -> Sequence[Panel]:
    panels = draw_pattern(subject.pattern, length, tile, subject.title, subject.describe)
    return panels if subject.state is None else [mark_cells(panel, subject.state) for panel in panels]


@dataclasses.dataclass(frozen=True, eq=False)
class Selected:
    """The keys that a mixer of a layer selected.

    Attributes:
      title: The title of its panels.
      summary: The mixer in a few words, which follow the title.
      pattern: The pattern from whose keys it selects.
      chosen: Selected pairs, booleans [scopes, t, s]; consecutive heads share a scope.
      forced: Pairs that are selected whatever the data.
      heads: Number of heads.
    """

    title: str
    summary: str
    pattern: Pattern
    chosen: np.ndarray
    forced: np.ndarray
    heads: int


def draw_selections(
    subjects: Sequence[Subject],
    selections: Sequence[Selected],
    tokens: Sequence[str],
    console: Console,
    tile: int | None = None,
    out: str | None = None,
    heads: Sequence[int] = (),
) -> None:
    """Draws patterns, and the keys that the queries of a text selected, one panel per head; equal heads share a panel.

    Args:
      subjects: Patterns of mixers that do not select.
      selections: What the others selected.
      tokens: Texts of the tokens, which are written at the axes of a file if there are few.
      console: As in `draw`, as are the next two.
      tile: Tokens of a cell.
      out: Path of a .png or .svg file.
      heads: The heads to draw; all of them by default, of which the first `MAX_HEADS` distinct ones are drawn.

    Raises:
      InputError: An argument is invalid; the error names it.
    """
    length = len(tokens)
    tile = choose_tile(length, tile, console, out)
    labels = [label_token(token) for token in tokens] if tile == 1 and length <= MAX_LABELS else []
    panels = [panel for subject in subjects for panel in _draw_subject(subject, length, tile)]
    panels = [dataclasses.replace(panel, labels=tuple(labels)) for panel in panels]
    for selection in selections:
        panels += _draw_selected(selection, length, tile, labels, heads)
    draw_panels(panels, console, out)


def _draw_selected(
    selection: Selected, length: int, tile: int, labels: Sequence[str], heads: Sequence[int]
) -> list[Panel]:
    """The panels of a mixer: heads of equal masks share one."""
    if heads and max(heads) >= selection.heads:
        last = f"it has head{'s' * (selection.heads > 1)} {format_numbers(list(range(selection.heads)))}"
        raise InputError("heads", f"{max(heads)}: {selection.title} has no such head; {last}")
    scope = len(selection.chosen) / selection.heads
    masks: dict[bytes, list[int]] = {}
    for head in sorted(set(heads)) or range(selection.heads):
        states = (x[int(head * scope)] for x in (selection.chosen, selection.forced))
        masks.setdefault(b"".join(np.packbits(x).tobytes() for x in states), []).append(head)
    allowed, panels, drawn = selection.pattern.dense(length), [], list(masks.values())[:MAX_HEADS]
    for numbers in drawn:
        title, index = selection.title, int(numbers[0] * scope)
        if len(numbers) < selection.heads:
            title += f", head{'s' * (len(numbers) > 1)} {format_numbers(numbers)}"
        if numbers is drawn[-1] and len(masks) > MAX_HEADS:
            title += f" ({len(masks) - MAX_HEADS} more not drawn)"
        chosen, forced = selection.chosen[index], selection.forced[index]
        panels.append(draw_selection(f"{title}\n{selection.summary}", allowed, chosen, forced, tile, labels))
    return panels


def label_token(text: str) -> str:
    """The text of a token with visible spaces and line ends, in at most `MAX_LABEL` characters."""
    shown = "".join({" ": "␣", "\n": "⏎", "\t": "⇥"}.get(c, c if c.isprintable() else "\ufffd") for c in text)
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 1]}…"


def draw_receptive_field(
    layers: Sequence[Subject], length: int, console: Console, tile: int | None = None, out: str | None = None
) -> None:
    """Draws which inputs (across) can influence which outputs (down) after each layer.

    Layers that add nothing share the panel of the layer before them. Arguments as `draw`.

    Raises:
      InputError: An argument is invalid; the error names it.
    """
    if length > MAX_RECEPTIVE_FIELD:
        raise InputError("length", f"{length} exceeds {MAX_RECEPTIVE_FIELD}, the limit of receptive fields")
    tile = choose_tile(length, tile, console, out)
    reached = list(receptive_field.matrices((layer.pattern for layer in layers), length))[1:]
    firsts = [i for i, now in enumerate(reached) if i == 0 or (now != reached[i - 1]).any()]
    panels = []
    for first, stop in itertools.pairwise([*firsts, len(layers)]):
        names = ", ".join(dict.fromkeys(layer.title or str(layer.pattern) for layer in layers[first:stop]))
        title = f"after {_name_layers(range(first, stop))}: {names}"
        panel = draw_mask(title, reached[first], tile)
        panels.append(dataclasses.replace(panel, axes=("output", "input"), words=("reached", "not reached")))
    draw_panels(panels, console, out)


def draw_panels(panels: Sequence[Panel], console: Console, out: str | None = None) -> None:
    """Writes panels to the file `out`, or prints them if it is None."""
    if out is None:
        print_panels(panels, console)
    elif (path := local_path(out, "out")).suffix == ".svg":
        path.write_text(panels_to_svg(panels))
    else:
        write_figure(lambda: build_figure(panels), path)


def title_layers(layers: Iterable[tuple[int, str, Sequence[Part]]]) -> list[Subject]:
    """The mixers of a schedule with the numbers and names of their layers; equal ones share a title.

    Args:
      layers: Number, name and mixers of each layer, in order.
    """
    equal: dict[Part, dict[int, str]] = {}
    for number, name, parts in layers:
        for part in parts:
            equal.setdefault(part, {})[number] = name
    subjects = []
    for part, names in equal.items():
        kind = "" if part.kind == "attention" else f" ({part.kind})"
        title = f"{_name_layers(list(names))}: {', '.join(dict.fromkeys(names.values()))}{kind}"
        subjects.append(Subject(part.pattern, title, part.state, describe=part.state is None))
    return subjects


def _name_layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {format_numbers(list(numbers))}"


def choose_tile(length: int, tile: int | None, console: Console, out: str | None) -> int:
    """Tokens of a cell: `tile`, or more on a terminal that is too narrow.

    Raises:
      InputError: An argument is invalid; the error names it.
    """
    _check(length, tile, out)
    cells = _cells(console) if out is None else MAX_CELLS if tile else DEFAULT_CELLS
    automatic, tile = tile is None or out is None, tile or 1
    if -(-length // tile) <= cells:
        return tile
    fitting = next(2**i for i in range(64) if 2**i >= tile and -(-length // 2**i) <= cells)
    if automatic:
        return fitting
    raise InputError(
        "tile", f"{tile} gives more than {MAX_CELLS} cells per side for {length} tokens; use {fitting} or more"
    )


def _check(length: int, tile: int | None, out: str | None) -> None:
    if not 1 <= length <= MAX_TOKENS:
        raise InputError("length", f"{length} is not between 1 and {MAX_TOKENS}")
    if tile is not None and tile < 1:
        raise InputError("tile", f"{tile} is less than 1")
    if tile is not None and tile > COUNTED_TILE and tile % COUNTED_TILE:
        raise InputError("tile", f"{tile} is neither up to {COUNTED_TILE} nor a multiple of it")
    if out is not None and Path(out).suffix not in SUFFIXES:
        raise InputError("out", f"{out!r} does not end in {' or '.join(SUFFIXES)}")
    if out is not None and not local_path(out, "out").parent.is_dir():
        raise InputError("out", f"folder {str(local_path(out, 'out').parent)!r} does not exist")


def _legend(panels: Sequence[Panel]) -> dict[int, str]:
    return {state: word for panel in panels for state, word in panel.legend.items()}


# The terminal.


def print_panels(panels: Sequence[Panel], console: Console) -> None:
    """Prints panels side by side as far as they fit: two cells per character, or one without colours."""
    plain = console.color_system is None
    colours = SIXTEEN_COLOURS if console.color_system in ("standard", "windows") else CELLS
    pictures = [_characters(panel.states) if plain else _half_characters(panel.states, colours) for panel in panels]
    width = max(TITLE_WIDTH, *(len(picture.plain.split("\n", 1)[0]) for picture in pictures))
    titles = ["\n".join(wrap_title(panel.title, width)) for panel in panels]
    lines = max(title.count("\n") for title in titles)  # shorter titles are padded on top to align the pictures
    columns = [
        Text("\n", no_wrap=True).join(
            [Text("\n" * (lines - title.count("\n")) + title, style="bold"), picture, Text(panel.caption, style="dim")]
        )
        for panel, title, picture in zip(panels, titles, pictures, strict=True)
    ]
    console.print(Columns(columns, padding=(1, 3)), highlight=False)
    key = Text("   ").join(
        Text.assemble((PLAIN[state], "") if plain else ("██", colours[state]), f" {word}")
        for state, word in _legend(panels).items()
    )
    console.print(key, highlight=False)


def _cells(console: Console) -> int:
    """Number of cells that fit into a line. Without colours a blank after each cell keeps the picture square."""
    return max(1, console.width // 2 if console.color_system is None else console.width)


def _characters(states: np.ndarray) -> Text:
    """States [rows, columns] as plain characters, one row per line."""
    return Text("\n".join(" ".join(PLAIN[state] for state in row) for row in states.tolist()))


def _half_characters(states: np.ndarray, colours: Sequence[str]) -> Text:
    """States [rows, columns] as half blocks, two rows per line: one in the foreground, one in the background colour."""
    lines = []
    for top in range(0, len(states), 2):
        line = Text()
        for pair, run in itertools.groupby(states[top : top + 2].T.tolist()):
            line.append("▀" * len(list(run)), " on ".join(colours[state] for state in pair))
        lines.append(line)
    return Text("\n").join(lines)


# PNG files.


def build_figure(panels: Sequence[Panel]) -> Figure:
    """The figure of panels, at most four per row."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(panels), PANELS_IN_A_ROW)
    rows = -(-len(panels) // columns)
    inches = max(INCHES, LABELLED_INCHES * max(len(panel.labels) for panel in panels))
    figure = Figure(figsize=((inches + 0.4) * columns, (inches + 1) * rows))
    figure.set_layout_engine("compressed", h_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, (panel, axis) in enumerate(zip(panels, axes, strict=False)):
        _draw_axes(panel, axis)
        if number % columns == 0 or panel.axes[0] != panels[number - 1].axes[0]:
            axis.set_ylabel(panel.axes[0])
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    key = [Patch(facecolor=CELLS[s], edgecolor="#999999", linewidth=0.4, label=w) for s, w in _legend(panels).items()]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False, handlelength=0.9)
    return figure


def _draw_axes(panel: Panel, axes: Axes) -> None:
    """Draws one panel: cells, ticks in tokens, title and caption."""
    from matplotlib.colors import to_rgb

    rows, columns = panel.states.shape
    tile = panel.tile[0]
    colours = np.array([to_rgb(colour) for colour in CELLS])
    axes.imshow(colours[panel.states], extent=(0, columns * tile, rows * tile, 0))
    for axis, cells in ((axes.yaxis, rows), (axes.xaxis, columns)):
        step = 2 ** max(0, (cells - 1).bit_length() - 2)
        # A token is labelled at its centre; a tile is labelled with its first token, at its edge.
        tokens = np.arange(0, cells + (tile > 1), step) * tile
        axis.set_ticks(tokens + 0.5 * (tile == 1), labels=tokens.tolist())
    axes.tick_params(length=2, width=0.5, labelsize=7)
    if panel.labels:
        for axis in (axes.yaxis, axes.xaxis):
            axis.set_ticks(np.arange(rows) + 0.5, labels=list(panel.labels), fontsize=5.5, family="monospace")
        axes.tick_params(axis="x", rotation=90)
    axes.spines[:].set(linewidth=0.5, edgecolor="#999999")
    axes.set_title("\n".join(wrap_title(panel.title, TITLE_WIDTH)), fontsize=7.5)
    axes.set_xlabel(f"{panel.axes[1]}\n{panel.caption}", linespacing=1.5)
