"""SVG as text, without a drawing library. Equal pictures give equal bytes.

Pictures have a white background, which keeps them legible on light and dark pages.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from sparsejax.palette import CELLS, INK, PAPER

FONT = 11  # default size in pixels
SANS, MONO = "system-ui, sans-serif", "ui-monospace, Menlo, Consolas, monospace"
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # control characters, surrogates
MONO_WIDTH = 0.62  # width of a monospaced character, relative to the size of the font


def document(width: float, height: float, title: str, elements: Iterable[str]) -> str:
    """A picture of `width` x `height` pixels with an accessible title."""
    size = f'width="{number(width)}" height="{number(height)}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {number(width)} {number(height)}" role="img"'
            f' font-family="{SANS}" font-size="{FONT}" fill="{INK}">',
            f"<title>{escape(clean(title))}</title>",
            f'<rect {size} rx="6" fill="{PAPER}"/>',
            *elements,
            "</svg>\n",
        ]
    )


def text(
    x: float,
    y: float,
    content: str,
    *,
    anchor: str = "start",
    size: float = FONT,
    mono: bool = False,
    **attributes: str,
) -> str:
    """A line of text. `attributes` are those of SVG with `_` for `-`."""
    extra = {"text-anchor": anchor} if anchor != "start" else {}
    extra |= {"font-size": number(size)} if size != FONT else {}
    extra |= {"font-family": MONO} if mono else {}
    return f"<text{_write(extra | _position(x, y) | attributes)}>{escape(clean(content), quote=False)}</text>"


def rectangle(x: float, y: float, width: float, height: float, fill: str, **attributes: str) -> str:
    """A filled rectangle."""
    sides = {"width": number(width), "height": number(height)}
    return f"<rect{_write(_position(x, y) | sides | {'fill': fill} | attributes)}/>"


def polyline(points: Sequence[tuple[float, float]], stroke: str, width: float = 1.5, **attributes: str) -> str:
    """Straight lines through points."""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    line = {"points": path, "fill": "none", "stroke": stroke, "stroke-width": number(width)}
    return f"<polyline{_write(line | attributes)}/>"


def cells(
    states: np.ndarray,
    x: float,
    y: float,
    cell: tuple[float, float],
    colours: Sequence[str] = CELLS,
    lines: bool = False,
) -> str:
    """A matrix of coloured cells, one path per state.

    Args:
      states: Indices of `colours`, int [rows, columns]. Cells of state 0 are the background.
      x: Left edge in pixels.
      y: Upper edge in pixels.
      cell: Width and height of a cell in pixels.
      colours: Colour per state.
      lines: Whether white lines separate the cells.
    """
    rows, columns = states.shape
    width, height = cell
    scale = f"translate({number(x)} {number(y)}) scale({number(width)} {number(height)})"
    paths = [
        f'<path fill="{colours[state]}" d="{_outline(states == state)}"/>' for state in np.unique(states[states > 0])
    ]
    background = f'<rect width="{columns}" height="{rows}" fill="{colours[0]}"/>'
    parts = [f'<g transform="{scale}" shape-rendering="crispEdges">', background, *paths, "</g>"]
    if lines:
        across = (f"M{number(x)} {number(y + row * height)}h{number(columns * width)}" for row in range(1, rows))
        down = (f"M{number(x + column * width)} {number(y)}v{number(rows * height)}" for column in range(1, columns))
        stroke = number(min(1, 0.1 * min(cell)))
        parts.append(f'<path stroke="{PAPER}" stroke-width="{stroke}" d="{"".join([*across, *down])}"/>')
    return "\n".join(parts)


def legend(x: float, y: float, entries: Iterable[tuple[str, str]]) -> tuple[str, float]:
    """Returns colours and their meanings in a line that starts at `x` and stands on `y`, and the width of the line."""
    parts, start = [], x
    for colour, meaning in entries:
        parts.append(rectangle(x, y - 9, 10, 10, colour, stroke="#999999", stroke_width="0.5"))
        parts.append(text(x + 15, y, meaning))
        x += 15 + 0.54 * FONT * len(meaning) + 16
    return "\n".join(parts), x - start


def clean(content: str) -> str:
    """Replaces the characters that XML cannot hold."""
    return NOT_XML.sub("\ufffd", content)


def number(value: float) -> str:
    """A coordinate with up to two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _outline(mask: np.ndarray) -> str:
    """The path of the true cells, bool [rows, columns]: runs of a row, merged with equal runs of the rows above."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    runs = np.stack([np.argwhere(edges == 1)[:, 0], np.argwhere(edges == 1)[:, 1], np.argwhere(edges == -1)[:, 1]], 1)
    runs = runs[np.lexsort((runs[:, 0], runs[:, 2], runs[:, 1]))]  # equal runs one below the other
    follows = np.all(runs[1:] - runs[:-1] == (1, 0, 0), axis=1)
    starts = np.flatnonzero(np.concatenate([[True], ~follows])[: len(runs)])
    path = []
    for first, stop in itertools.pairwise([*starts, len(runs)]):
        row, left, right = runs[first]
        path.append(f"M{left} {row}h{right - left}v{stop - first}h{left - right}z")
    return "".join(path)


def _position(x: float, y: float) -> dict[str, str]:
    return {"x": number(x), "y": number(y)}


def _write(attributes: dict[str, str]) -> str:
    return "".join(f' {name.replace("_", "-")}="{escape(clean(value))}"' for name, value in attributes.items())
