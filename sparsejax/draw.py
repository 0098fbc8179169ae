"""Pictures of patterns and schedules, on the terminal or in a file."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from sparsejax.config import ConfigError, ModelConfig
from sparsejax.patterns import Panel, Pattern, connect_each, draw_mask, draw_pattern, name_numbers
from sparsejax.patterns.drawing import COUNTED_TILE, DEAD, FULL, PARTIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
MOST_CELLS = 4096  # on a side of a picture in a file
MOST_CONNECTED = 2048  # tokens of a reach, which is found by products of boolean matrices
MOST_TOKENS = 2**18  # a full pattern is four million tiles then

COLOURS = {DEAD: "#f2f2f2", PARTIAL: "#8fc1e3", FULL: "#0a5a9c"}  # told apart without colour vision, and in grey
SIXTEEN_COLOURS = {DEAD: "white", PARTIAL: "cyan", FULL: "blue"}  # for terminals that have no others
PLAIN = {DEAD: ".", PARTIAL: "+", FULL: "#"}
WORDS_OF_PAIRS = {FULL: "seen", DEAD: "not seen"}
WORDS_OF_TILES = {FULL: "full tile", PARTIAL: "partial tile", DEAD: "dead tile"}

PANELS_IN_A_ROW = 4
INCHES = 2.1  # of a panel's side
DOTS_PER_INCH = 300
LINED_CELLS = 64  # up to here cells are squares with lines between them, above it an image
TITLE_WIDTH = 30  # characters


def draw(
    named: Sequence[tuple[str, Pattern]], length: int, console: Console, tile: int | None = None, out: str | None = None
) -> None:
    """Draws patterns, a panel for each and for each of its heads.

    Args:
      named: titles and patterns.
      length: tokens.
      console: where to print if `out` is None.
      tile: tokens of a cell; if None 1, or on a terminal that is too narrow for it the smallest that fits.
      out: a file to write, .png or .svg.

    Raises:
      ConfigError: a picture that cannot be, and which argument is to blame.
    """
    tile = choose_tile(length, tile, console, out)
    panels = [panel for title, pattern in named for panel in draw_pattern(pattern, length, tile, title)]
    draw_panels(panels, console, out)


def draw_reach(
    layers: Sequence[tuple[str, Pattern]],
    length: int,
    console: Console,
    tile: int | None = None,
    out: str | None = None,
) -> None:
    """Draws which inputs (across) can influence which outputs (down) after each layer; arguments as `draw`.

    Layers that add nothing share the panel of the one before them.

    Raises:
      ConfigError: a picture that cannot be, and which argument is to blame.
    """
    if length > MOST_CONNECTED:
        raise ConfigError(f"--length: at most {MOST_CONNECTED} tokens with --reach, got {length}")
    tile = choose_tile(length, tile, console, out)
    reached = list(connect_each((pattern for _, pattern in layers), length))[1:]
    firsts = [i for i, now in enumerate(reached) if i == 0 or (now != reached[i - 1]).any()]
    panels = []
    for first, stop in itertools.pairwise([*firsts, len(layers)]):
        names = ", ".join(dict.fromkeys(name for name, _ in layers[first:stop]))
        title = f"after layer{'s' * (stop - first > 1)} {name_numbers(list(range(first, stop)))}: {names}"
        panels.append(draw_mask(title, reached[first], tile))
    draw_panels(panels, console, out)


def draw_panels(panels: Sequence[Panel], console: Console, out: str | None = None) -> None:
    """Writes panels to the file `out`, or prints them if it is None."""
    if out is None:
        print_panels(panels, console)
    else:
        write_panels(panels, Path(out))


def name_layers(config: ModelConfig) -> list[tuple[str, Pattern]]:
    """What the layers of a schedule can see, with titles: equal layers share one, a state space sees causally."""
    equal: dict[tuple[str, Pattern], list[int]] = {}
    for number, (name, sees) in enumerate(config.sees):
        mixer = config.layers[name].mixer
        kind = "feed-forward" if mixer is None else mixer.summary.split()[0]
        equal.setdefault((kind, sees), []).append(number)
    named = []
    for (kind, sees), numbers in equal.items():
        names = ", ".join(dict.fromkeys(config.names[number] for number in numbers))
        what = str(sees) if kind == "attention" else f"{sees} ({kind})"
        named.append((f"layer{'s' * (len(numbers) > 1)} {name_numbers(numbers)}: {names}\n{what}", sees))
    return named


def choose_tile(length: int, tile: int | None, console: Console, out: str | None) -> int:
    """Tokens of a cell: what is asked for, or more where a terminal is too narrow.

    Raises:
      ConfigError: arguments of which no picture can be made.
    """
    _check(length, tile, out)
    asked = 1 if tile is None else tile
    cells = _cells(console) if out is None else MOST_CELLS
    if -(-length // asked) <= cells:
        return asked
    fits = next(2**i for i in range(64) if 2**i >= asked and -(-length // 2**i) <= cells)
    if out is None:
        return fits
    raise ConfigError(
        f"--length: {length} tokens in tiles of {asked} are a picture of more than {MOST_CELLS} cells a side; give"
        f" --tile={fits} or more"
    )


def _check(length: int, tile: int | None, out: str | None) -> None:
    if not 1 <= length <= MOST_TOKENS:
        raise ConfigError(f"--length: must be from 1 to {MOST_TOKENS}, got {length}")
    if tile is not None and tile < 1:
        raise ConfigError(f"--tile: must be at least 1, got {tile}")
    if tile is not None and tile > COUNTED_TILE and tile % COUNTED_TILE:
        raise ConfigError(f"--tile: must be up to {COUNTED_TILE} or a multiple of it, got {tile}")
    if out is not None and Path(out).suffix not in ENDINGS:
        raise ConfigError(f"--out: the file must end in {' or '.join(ENDINGS)}, got {out!r}")
    if out is not None and not Path(out).parent.is_dir():
        raise ConfigError(f"--out: no folder {str(Path(out).parent)!r}")


def _words(panels: Sequence[Panel]) -> dict[int, str]:
    """What the colours of these panels mean."""
    return WORDS_OF_PAIRS if all(panel.tile == 1 for panel in panels) else WORDS_OF_TILES


def _wrap(title: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in title.splitlines())


# The terminal.


def print_panels(panels: Sequence[Panel], console: Console) -> None:
    """Prints panels side by side as far as they fit, two cells to a character; without colours one sign a cell."""
    plain = console.color_system is None
    colours = SIXTEEN_COLOURS if console.color_system in ("standard", "windows") else COLOURS
    pictures = [_signs(panel.states) if plain else _half_characters(panel.states, colours) for panel in panels]
    width = max(TITLE_WIDTH, *(len(picture.plain.split("\n", 1)[0]) for picture in pictures))
    titles = [_wrap(panel.title, width) for panel in panels]
    most = max(title.count("\n") for title in titles)  # shorter titles stand lower, so that pictures stand level
    columns = [
        Text("\n", no_wrap=True).join(
            [Text("\n" * (most - title.count("\n")) + title, style="bold"), picture, Text(panel.caption, style="dim")]
        )
        for panel, title, picture in zip(panels, titles, pictures, strict=True)
    ]
    console.print(Columns(columns, padding=(1, 3)), highlight=False)
    key = Text("   ").join(
        Text.assemble((PLAIN[state], "") if plain else ("██", colours[state]), f" {word}")
        for state, word in _words(panels).items()
    )
    console.print(key, highlight=False)


def _cells(console: Console) -> int:
    """How many cells fit into a line; without colours a blank after each keeps them square."""
    return max(1, console.width // 2 if console.color_system is None else console.width)


def _signs(states: np.ndarray) -> Text:
    """States [rows, columns] as signs, a row to a line."""
    return Text("\n".join(" ".join(PLAIN[state] for state in row) for row in states.tolist()))


def _half_characters(states: np.ndarray, colours: dict[int, str]) -> Text:
    """States [rows, columns] as half-block characters, two rows to a line: one is the ink, the other the paper."""
    lines = []
    for top in range(0, len(states), 2):
        line = Text()
        for pair, run in itertools.groupby(states[top : top + 2].T.tolist()):
            line.append("▀" * len(list(run)), " on ".join(colours[state] for state in pair))
        lines.append(line)
    return Text("\n").join(lines)


# Files.


def write_panels(panels: Sequence[Panel], path: Path) -> None:
    """Writes panels as a figure; raises as `write_figure` does."""
    write_figure(lambda: _build_figure(panels), path)


def write_figure(build: Callable[[], Figure], path: Path) -> None:
    """Writes the figure that `build` gives, as .png or .svg; equal figures make equal files.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise ConfigError(f"{path.name}: writing a picture needs matplotlib: pip install 'sparsejax[plot]'") from None
    # Nothing of the user's own settings, no date and no random ids: the file depends on the figure alone.
    fixed = {"svg.hashsalt": "sparsejax", "svg.fonttype": "none", "text.parse_math": False, "font.size": 8}
    metadata = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}[path.suffix]
    written = io.BytesIO()
    with style.context(["default", fixed]):
        build().savefig(written, format=path.suffix[1:], metadata=metadata, dpi=DOTS_PER_INCH, bbox_inches="tight")
    path.write_bytes(written.getvalue())


def _build_figure(panels: Sequence[Panel]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(panels), PANELS_IN_A_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=((INCHES + 0.4) * columns, (INCHES + 1) * rows), layout="compressed")
    figure.get_layout_engine().set(h_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, (panel, axis) in enumerate(zip(panels, axes, strict=False)):
        _draw_axes(panel, axis)
        if number % columns == 0:
            axis.set_ylabel("query")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    key = [Patch(facecolor=COLOURS[s], edgecolor="#999999", linewidth=0.4, label=w) for s, w in _words(panels).items()]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False, handlelength=0.9)
    return figure


def _draw_axes(panel: Panel, axes: Axes) -> None:
    """One panel: cells, ticks in tokens, title and caption."""
    rows, columns = panel.states.shape
    tile = panel.tile
    axes.set(xlim=(0, columns * tile), ylim=(rows * tile, 0), aspect="equal", facecolor=COLOURS[DEAD])
    draw_cells = _draw_squares if max(rows, columns) <= LINED_CELLS else _draw_image
    draw_cells(panel, axes)
    for axis, cells in ((axes.yaxis, rows), (axes.xaxis, columns)):
        step = 2 ** max(0, (cells - 1).bit_length() - 2)
        # The number of a token stands at its middle, that of a tile's first token at the tile's edge.
        tokens = np.arange(0, cells + (tile > 1), step) * tile
        axis.set_ticks(tokens + 0.5 * (tile == 1), labels=tokens.tolist())
    axes.tick_params(length=2, width=0.5, labelsize=7)
    axes.spines[:].set(linewidth=0.5, edgecolor="#999999")
    axes.set_title(_wrap(panel.title, TITLE_WIDTH), fontsize=9)
    axes.set_xlabel(f"key\n{panel.caption}", linespacing=1.5)


def _draw_squares(panel: Panel, axes: Axes) -> None:
    """Cells as shapes with white lines between them; equal neighbours in a row are one shape, for smaller files."""
    from matplotlib.collections import PolyCollection

    rows, columns = panel.states.shape
    starts = np.flatnonzero(np.diff(panel.states, axis=1, prepend=-1))  # every row starts anew
    states = panel.states.ravel()[starts]
    top, left = np.divmod(starts, columns)
    right = np.append(starts[1:], rows * columns) - top * columns
    corners = np.array([[left, top], [right, top], [right, top + 1], [left, top + 1]]) * panel.tile
    live = states > DEAD
    axes.add_collection(
        PolyCollection(corners.transpose(2, 0, 1)[live], facecolors=[COLOURS[s] for s in states[live].tolist()])
    )
    line = {"colors": "white", "linewidth": 0.5 * min(1, 24 / max(rows, columns))}
    axes.hlines(np.arange(1, rows) * panel.tile, 0, columns * panel.tile, **line)
    axes.vlines(np.arange(1, columns) * panel.tile, 0, rows * panel.tile, **line)


def _draw_image(panel: Panel, axes: Axes) -> None:
    """Cells as an image; where they are smaller than its dots a dot is their average."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(COLOURS[state]) for state in sorted(COLOURS)])
    axes.imshow(colours[panel.states], extent=(*axes.get_xlim(), *axes.get_ylim()))
