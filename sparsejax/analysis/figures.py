"""Axes in the style of the pages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sparsejax.palette import CELLS, GREY, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

DARK = 0.5  # luminance below which the text of a cell is white


def new_axes(rows: int, columns: int, width: float = 3.6, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Returns a figure of panels of a size in inches, and its axes in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def color_depths(count: int) -> list[Any]:
    """Colours of layers, from light to dark."""
    from matplotlib import colormaps

    return [colormaps["Blues"](0.35 + 0.65 * (i + 1) / count) for i in range(count)]


def draw_cells(
    axis: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], form: str = "{:.2f}", fontsize: int = 6
) -> Any:
    """Draws a heat map of values from 0 to 1 with their numbers; NaN is a blank cell. Returns the image."""
    axis.grid(False)
    axis.spines[:].set_visible(False)
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    shown = thin(range(len(columns)), 16)
    axis.set_xticks(shown, [columns[index] for index in shown])
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < DARK
            axis.text(
                column, row, form.format(value), ha="center", va="center", fontsize=fontsize,
                color="white" if is_dark else INK,
            )  # fmt: skip
    return image


def mark_reach(axis: Axes, reach: int, length: int) -> None:
    """Draws a vertical line at the reach of the receptive field, or notes that it is the whole past."""
    style: dict[str, Any] = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 2))}
    if reach < length - 1:
        axis.axvline(reach, label=f"reach: {reach:,} tokens", **style)
    else:
        axis.plot([], [], label="reach: the whole past", **style)


def thin(values: Sequence[T], most: int = 8) -> list[T]:
    """Returns at most `most` of the values, evenly spaced, for the labels of an axis."""
    return list(values[:: -(-len(values) // most) or 1])


def mark_unreachable(axis: Axes, positions: Sequence[float], reachable: Sequence[bool]) -> None:
    """Shades the surroundings of the positions outside of the receptive field, or notes that there are none."""
    if all(reachable):
        axis.plot([], [], " ", label="all inside of the receptive field")
    label: str | None = "outside of the receptive field"
    middles = [(a + b) / 2 for a, b in itertools.pairwise(positions)]
    edges = [positions[0] - 0.5, *middles, positions[-1] + 0.5]
    for left, right, is_reachable in zip(edges, edges[1:], reachable, strict=False):
        if not is_reachable:
            axis.axvspan(left, right, color=CELLS[0], zorder=0, linewidth=0, label=label)
            label = None  # once in the legend


def outline_reachable(axis: Axes, reachable: np.ndarray) -> None:
    """Draws the boundary between reachable cells and others of a heat map, bool [rows, columns], and crosses these."""
    style: dict[str, Any] = {"color": SERIES[1], "linewidth": 2.2, "solid_capstyle": "butt"}
    for row, column in np.ndindex(reachable.shape):
        if not reachable[row, column]:
            axis.text(column + 0.44, row - 0.44, "×", color=SERIES[1], fontsize=8, weight="bold", ha="right", va="top")
        if row + 1 < reachable.shape[0] and reachable[row, column] != reachable[row + 1, column]:
            axis.plot([column - 0.5, column + 0.5], [row + 0.5] * 2, **style)
        if column + 1 < reachable.shape[1] and reachable[row, column] != reachable[row, column + 1]:
            axis.plot([column + 0.5] * 2, [row - 0.5, row + 0.5], **style)


def use_log(axes: Axes, name: str) -> None:
    """Makes the axis "x" or "y" logarithmic, with plain numbers: mathematical text is off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def note(axis: Axes, text: str) -> None:
    """Writes a line above the axes."""
    axis.set_title(text, fontsize=7.5, color=GREY, loc="left")
