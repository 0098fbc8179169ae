"""Figures of a comparison: learning curves, the metric over its costs, and a heat map of two keys."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparsejax.metrics import EVAL, EVAL_LOSS, TRAIN_LOSS_MEAN, Direction, pareto_front
from sparsejax.overrides import shorten_keys, write_value
from sparsejax.palette import BASELINE, GREY, SERIES
from sparsejax.report.comparison import Comparison, Group, natural_order
from sparsejax.report.summary import count_decimals, write_estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "os^Dv<>pXP"
COSTS = {
    "training_flops": ("training FLOPs", ""),
    "cache_bytes": ("decode cache per sequence", "B"),
    "parameters": ("parameters", ""),
    "seconds": ("training time", "s"),
}
LABEL_WIDTH = 34  # characters per line of a legend
SPREAD = 1.001  # ratio of costs below which they are equal
DECADE = 10.0  # ratio of costs above which the axis is logarithmic
DPI = 150


class CaptionedFigure(NamedTuple):
    """A figure with its name and its caption."""

    name: str
    figure: Figure
    caption: str


def draw(comparison: Comparison) -> list[CaptionedFigure]:
    """Returns the figures for which the runs have data."""
    from matplotlib import style

    with style.context(["default", {"font.size": 9, "text.parse_math": False}]):
        drawn = [draw_curves(comparison), draw_pareto(comparison), draw_heat_map(comparison)]
        figures = [figure for figure in drawn if figure is not None]
        for captioned in figures:  # the layout is computed once: a second time would move everything slightly
            captioned.figure.draw_without_rendering()
            captioned.figure.set_layout_engine("none")
    return figures


# Learning curves.


def draw_curves(comparison: Comparison) -> CaptionedFigure | None:
    """The metric and the training loss by step: mean and standard error over seeds."""
    names = [name for name in dict.fromkeys([comparison.metric, TRAIN_LOSS_MEAN]) if len(_curves(comparison, name))]
    if not names:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(1, len(names), comparison, "marker")
    for axis, name in zip(axes, names, strict=True):
        for group, style in _styles(comparison):
            steps, mean, error = _average(comparison, group, name)
            axis.plot(steps, mean, color=style["color"], linestyle=style["linestyle"], linewidth=1.4)
            axis.fill_between(steps, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylabel=_name_metric(name))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _focus(axis)
    caption = (
        "Learning curves: mean over seeds, with a band of one standard error. Evaluations before the last step"
        " may read only a part of the validation data."
    )
    return CaptionedFigure("curves", figure, caption)


def _curves(comparison: Comparison, name: str) -> Any:
    """The points of a metric; none if it has a single step."""
    curves = comparison.results.curves
    points = curves[(curves["metric"] == name) & curves["value"].notna()]
    return points if points["step"].nunique() > 1 else points[:0]


def _average(comparison: Comparison, group: Group, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all runs of a group have, with mean and standard error; the error of a single run is 0."""
    points = _curves(comparison, name)
    points = points[points["run"].isin(group.runs["run"])]
    values = points.pivot_table(index="step", columns="run", values="value").dropna()
    count = values.shape[1]
    deviation = values.std(axis=1, ddof=1) / math.sqrt(count) if count > 1 else 0 * values.sum(axis=1)
    return np.asarray(values.index, float), np.asarray(values.mean(axis=1), float), np.asarray(deviation, float)


def _focus(axis: Axes) -> None:
    """Limits the axis to the values after the first tenth of the steps, which would flatten all others."""
    lines = [np.asarray(line.get_ydata(), float) for line in axis.lines]
    lines = [line for line in lines if len(line) > 4]
    if not lines:
        return
    later = np.concatenate([line[len(line) // 10 :] for line in lines])
    low, high = np.nanmin(later), np.nanmax(later)
    bottom, top = axis.get_ylim()
    margin = 0.06 * (high - low)
    if high > low:
        axis.set_ylim(max(bottom, low - margin), min(top, high + margin))


# Costs.


def draw_pareto(comparison: Comparison) -> CaptionedFigure | None:
    """The metric over its costs, with the Pareto front."""
    costs = [column for column in COSTS if _differ([group.mean(column) for group in comparison.groups])]
    if not costs:
        return None
    figure, axes = _figure(-(-len(costs) // 2), min(len(costs), 2), comparison, "linestyle")
    for axis, column in zip(axes, costs, strict=False):
        _draw_costs(comparison, column, axis)
    for axis in axes[len(costs) :]:
        axis.set_visible(False)
    same = [COSTS[column][0] for column in COSTS if column not in costs]
    caption = "The metric over its costs: mean and standard error over seeds. The grey line is the Pareto front."
    caption += f" Equal for all groups, or unknown: {', '.join(same)}." if same else ""
    return CaptionedFigure("pareto", figure, caption)


def _draw_costs(comparison: Comparison, column: str, axis: Axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    name, unit = COSTS[column]
    costs = [group.mean(column) for group in comparison.groups]
    values = [group.estimate.mean for group in comparison.groups]
    directions: tuple[Direction, Direction] = ("min" if comparison.lower else "max", "min")
    front = pareto_front(list(zip(values, costs, strict=True)), directions)
    axis.step([costs[i] for i in front], [values[i] for i in front], where="post", color=GREY, linewidth=1, zorder=1)
    for (group, style), cost in zip(_styles(comparison), costs, strict=True):
        estimate = group.estimate
        point = {"color": style["color"], "marker": style["marker"], "markersize": 6, "elinewidth": 1, "capsize": 2}
        axis.errorbar([cost], [estimate.mean], yerr=[estimate.error or 0.0], linestyle="none", **point)
    if max(costs) > DECADE * min(costs) > 0:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(unit=unit))
    axis.set(xlabel=name, ylabel=_name_metric(comparison.metric))


def _differ(costs: Sequence[float]) -> bool:
    """Whether costs are known and differ."""
    return not any(map(math.isnan, costs)) and max(costs) > SPREAD * min(costs)


# Heat maps.


def draw_heat_map(comparison: Comparison) -> CaptionedFigure | None:
    """The metric for every pair of values of two keys: the requested ones, or the two in which the runs differ."""
    keys = comparison.by or comparison.results.keys
    rows = [group.runs[list(keys)].astype(object).iloc[0].to_dict() for group in comparison.groups]
    if len(keys) != 2 or any(group.runs[key].nunique() > 1 for group in comparison.groups for key in keys):
        return None
    down, across = (sorted({row[key] for row in rows}, key=natural_order) for key in keys)
    if min(len(down), len(across)) < 2:
        return None
    means = np.full((len(down), len(across)), np.nan)
    texts, decimals = {}, count_decimals(comparison)
    for row, group in zip(rows, comparison.groups, strict=True):
        cell = down.index(row[keys[0]]), across.index(row[keys[1]])
        means[cell] = group.estimate.mean
        texts[cell] = write_estimate(group.estimate, decimals).text.replace(" ± ", "\n± ")
    figure = _draw_cells(comparison, keys, (down, across), means, texts)
    return CaptionedFigure(
        "heat_map",
        figure,
        "Mean and standard error over seeds per pair of values. Lighter is better; a blank cell has no run.",
    )


def _draw_cells(comparison: Comparison, keys: Sequence[str], values: tuple, means: np.ndarray, texts: dict) -> Figure:
    from matplotlib.figure import Figure

    down, across = values
    figure = Figure(figsize=(3.2 + 1.1 * len(across), 1.6 + 0.62 * len(down)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(means, cmap="cividis_r" if comparison.lower else "cividis", aspect="auto")
    figure.colorbar(image, ax=axis, label=_name_metric(comparison.metric))
    names = shorten_keys(keys)
    axis.set(ylabel=names[keys[0]], xlabel=names[keys[1]])
    axis.set_xticks(range(len(across)), [_wrap(write_value(value), 16) for value in across])
    axis.set_yticks(range(len(down)), [_wrap(write_value(value), 24) for value in down])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for (row, column), text in texts.items():
        red, green, blue, _ = image.cmap(image.norm(means[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    return figure


# Shared parts.


def _figure(rows: int, columns: int, comparison: Comparison, omitted: str) -> tuple[Figure, np.ndarray]:
    """A figure of panels with one legend, which omits one attribute of the styles, and its axes in reading order."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=_wrap(group.label, LABEL_WIDTH), markersize=5, linewidth=1.4, **style | {omitted: "none"})
        for group, style in _styles(comparison)
    ]
    lines = sum(str(handle.get_label()).count("\n") + 1 for handle in handles)
    figure = Figure(figsize=(3.6 * columns + 2.4, max(3.0 * rows, 0.19 * lines + 0.4)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, handlelength=2.4)
    return figure, axes


def _styles(comparison: Comparison) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Each group with its colour, dashes and marker, which are the same in all figures."""
    number = 0
    for group in comparison.groups:
        if group is comparison.baseline:
            yield group, {"color": BASELINE, "linestyle": "solid", "marker": "*"}
            continue
        color, dash = SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]
        yield group, {"color": color, "linestyle": dash, "marker": MARKERS[number % len(MARKERS)]}
        number += 1


def _name_metric(metric: str) -> str:
    """A metric as the label of an axis, with its unit."""
    units = {EVAL_LOSS: "validation loss (nats)", TRAIN_LOSS_MEAN: "training loss, running mean (nats)"}
    return units.get(metric, metric.removeprefix(EVAL).replace("_", " "))


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)
