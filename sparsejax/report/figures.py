"""Figures of a comparison: learning curves, the metric over its costs, and a heat map of two keys."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparsejax.metrics import EVAL, TRAIN_LOSS_MEAN, Direction, loss_unit, pareto_front
from sparsejax.overrides import shorten_keys, write_value
from sparsejax.palette import BASELINE, BASELINE_GREY, GREY, SERIES
from sparsejax.report.comparison import TOLERANCE, Comparison, Group, natural_order
from sparsejax.report.summary import count_decimals, write_estimate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "os^Dv<"
MAX_LINES = len(SERIES)  # groups of a panel; more get a panel each, with the baseline in grey
MULTIPLES_IN_A_ROW = 4
MAX_TICKS = 6
COSTS = {
    "training_flops": ("training FLOPs", ""),
    "cache_bytes": ("decode cache per sequence", "B"),
    "parameters": ("parameters", ""),
    "seconds": ("training time", "s"),
}
LABEL_WIDTH = 34  # characters per line of a legend
TITLE_WIDTH = 26  # characters per line above one of many panels
DECADE = 10.0  # ratio of costs above which the axis is logarithmic
DENSITY = 0.5  # share of cells with a run, below which a heat map is not drawn
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
        figures = [*draw_curves(comparison), *draw_pareto(comparison), *draw_heat_map(comparison)]
        for captioned in figures:  # the layout is computed once: a second time would move everything slightly
            captioned.figure.draw_without_rendering()
            captioned.figure.set_layout_engine("none")
    return figures


# Learning curves.


class Curves(NamedTuple):
    """Curves of one metric: values by step and run, and the label of their axis."""

    name: str
    label: str
    values: pd.DataFrame  # [step, run]


def draw_curves(comparison: Comparison) -> list[CaptionedFigure]:
    """The metric and the training loss by step, in one figure; in a figure each if there are many groups."""
    curves = [curves for curves in (_curves(comparison), _training_curves(comparison)) if len(curves.values) > 1]
    if not curves:
        return []
    note = "Mean over seeds, with a band of one standard error; the ticks of the steps are evaluations."
    note += " Evaluations before the last step may read only a part of the validation data."
    labels = " and ".join(panel.label for panel in curves)
    if len(comparison.groups) <= MAX_LINES:
        return [CaptionedFigure("curves", _draw_together(comparison, curves), f"{_capitalize(labels)} by step. {note}")]
    note += f" Grey: {comparison.baseline.label}, repeated in every panel."
    return [
        CaptionedFigure(panel.name, _draw_multiples(comparison, panel), f"{_capitalize(panel.label)} by step. {note}")
        for panel in curves
    ]


def _curves(comparison: Comparison) -> Curves:
    """The curves of the metric."""
    return Curves("curves", name_metric(comparison.metric), _pivot(comparison, comparison.metric))


def _training_curves(comparison: Comparison) -> Curves:
    """The curves of the training loss, in a unit that fits the metric."""
    runs: dict[Any, Any] = {row["run"]: row for row in comparison.results.runs.to_dict("records")}
    values = _pivot(comparison, TRAIN_LOSS_MEAN)
    units = [loss_unit(comparison.metric, runs[run]) for run in values]
    label = f"training loss ({', '.join(dict.fromkeys(unit for _, unit in units))})"
    return Curves("training", label, values * [factor for factor, _ in units])


def _pivot(comparison: Comparison, metric: str) -> pd.DataFrame:
    """A metric of the compared runs by step and run."""
    curves = comparison.results.curves
    compared = {run for group in comparison.groups for run in group.runs["run"]}
    points = curves[(curves["metric"] == metric) & curves["value"].notna() & curves["run"].isin(compared)]
    return points.pivot_table(index="step", columns="run", values="value")


def _draw_together(comparison: Comparison, curves: Sequence[Curves]) -> Figure:
    figure, axes = _figure(1, len(curves), comparison, "marker")
    for axis, panel in zip(axes, curves, strict=True):
        for group, style in _styles(comparison):
            _draw_group(axis, panel, group, color=style["color"], linestyle=style["linestyle"])
        axis.set(xlabel="step", ylabel=panel.label)
        axis.set_xticks(_evaluations(comparison))
        _focus(axis)
    return figure


def _draw_multiples(comparison: Comparison, panel: Curves) -> Figure:
    """A panel per group, with the baseline in grey."""
    from matplotlib.figure import Figure

    groups, columns = comparison.groups, MULTIPLES_IN_A_ROW
    rows, decimals = -(-len(groups) // columns), count_decimals(comparison)
    figure = Figure(figsize=(2.15 * columns + 0.4, 1.75 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, group in zip(axes, groups, strict=False):
        is_baseline = group is comparison.baseline
        if not is_baseline:
            _draw_group(axis, panel, comparison.baseline, color=BASELINE_GREY)
        _draw_group(axis, panel, group, color=BASELINE if is_baseline else SERIES[0])
        axis.set_title(_wrap(f"{group.title}{' (baseline)' * is_baseline}", TITLE_WIDTH), fontsize=8, loc="left")
        _style_axis(axis)
    for number, axis in enumerate(axes):
        axis.set_visible(number < len(groups))
        axis.tick_params(labelbottom=len(groups) - columns <= number)
    axes[0].set_xticks(_evaluations(comparison, MAX_TICKS // 2))
    _focus(*axes[: len(groups)])
    if panel.name == "curves":
        for axis, group in zip(axes, groups, strict=False):
            # The value at the last step, in the corner that the curve leaves free.
            at, side = (0.94, "top") if group.estimate.mean < np.mean(axis.get_ylim()) else (0.06, "bottom")
            final = write_estimate(group.estimate, decimals).text
            axis.text(0.97, at, final, transform=axis.transAxes, ha="right", va=side, fontsize=7.5)
    figure.supxlabel(f"step (grey: {comparison.baseline.label})", fontsize=9)
    figure.supylabel(panel.label, fontsize=9)
    return figure


def _draw_group(axis: Axes, panel: Curves, group: Group, **style: Any) -> None:
    """Mean and band over the runs of a group, at the steps that all of them have."""
    values = panel.values.reindex(columns=[run for run in group.runs["run"] if run in panel.values]).dropna()
    steps, mean = np.asarray(values.index, float), np.asarray(values.mean(axis=1), float)
    axis.plot(steps, mean, linewidth=1.4, marker="o" if panel.name == "curves" else None, markersize=2.2, **style)
    if values.shape[1] > 1:
        error = np.asarray(values.std(axis=1, ddof=1), float) / math.sqrt(values.shape[1])
        axis.fill_between(steps, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0)


def _evaluations(comparison: Comparison, count: int = MAX_TICKS) -> list[int]:
    """Up to `count` equally spaced steps with an evaluation, among them the last; without any, of logged steps."""
    steps = list(_pivot(comparison, comparison.metric).index) or list(_pivot(comparison, TRAIN_LOSS_MEAN).index)
    return steps[:: -max(1, -(-len(steps) // count))][::-1]


def _focus(*axes: Axes) -> None:
    """Limits shared axes to the values after the first tenth of the steps, which would flatten all others."""
    lines = [np.asarray(line.get_ydata(), float) for axis in axes for line in axis.lines]
    lines = [line for line in lines if len(line) > 4]
    if not lines:
        return
    later = np.concatenate([line[len(line) // 10 :] for line in lines])
    low, high = np.nanmin(later), np.nanmax(later)
    bottom, top = axes[0].get_ylim()
    margin = 0.06 * (high - low)
    if high > low:
        axes[0].set_ylim(max(bottom, low - margin), min(top, high + margin))


# Costs.


def draw_pareto(comparison: Comparison) -> list[CaptionedFigure]:
    """The metric over its costs, with the Pareto front."""
    costs = [column for column in COSTS if _differ([group.mean(column) for group in comparison.groups])]
    if not costs:
        return []
    shown = list(comparison.groups)
    if len(shown) > MAX_LINES:
        best = {i for column in costs for i in _front(comparison, column)}
        shown = [group for i, group in enumerate(shown) if i in best or group is comparison.baseline]
    figure, axes = _figure(-(-len(costs) // 2), min(len(costs), 2), comparison, "linestyle", shown)
    for axis, column in zip(axes, costs, strict=False):
        _draw_costs(comparison, column, axis, shown)
    for axis in axes[len(costs) :]:
        axis.set_visible(False)
    same = [COSTS[column][0] for column in COSTS if column not in costs]
    caption = f"{_capitalize(name_metric(comparison.metric))} over its costs: mean and standard error over seeds."
    caption += " The grey line is the Pareto front"
    caption += "." if len(shown) == len(comparison.groups) else "; groups that are on none of the fronts are grey."
    caption += f" Equal for all groups, or unknown: {', '.join(same)}." if same else ""
    return [CaptionedFigure("pareto", figure, caption)]


def _front(comparison: Comparison, column: str) -> list[int]:
    """Indices of the groups on the Pareto front of the metric and a cost."""
    directions: tuple[Direction, Direction] = ("min" if comparison.lower else "max", "min")
    return pareto_front([(group.estimate.mean, group.mean(column)) for group in comparison.groups], directions)


def _draw_costs(comparison: Comparison, column: str, axis: Axes, shown: Sequence[Group]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    name, unit = COSTS[column]
    costs = [group.mean(column) for group in comparison.groups]
    front = [comparison.groups[i] for i in _front(comparison, column)]
    steps = [group.mean(column) for group in front], [group.estimate.mean for group in front]
    axis.step(*steps, where="post", color=GREY, linewidth=1, zorder=1)
    styles = {group.label: style for group, style in _styles(comparison, shown)}
    for group in comparison.groups:
        style = styles.get(group.label, {"color": BASELINE_GREY, "marker": "."})
        point = {"color": style["color"], "marker": style["marker"], "markersize": 6, "elinewidth": 1, "capsize": 2}
        error = [group.estimate.error or 0.0]
        zorder = 3 if group in shown else 2
        axis.errorbar([group.mean(column)], [group.estimate.mean], yerr=error, linestyle="none", zorder=zorder, **point)
    if max(costs) > DECADE * min(costs) > 0:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(unit=unit))
    axis.set(xlabel=name, ylabel=name_metric(comparison.metric))


def _differ(costs: Sequence[float]) -> bool:
    """Whether costs are known and differ by more than the tolerance."""
    return not any(map(math.isnan, costs)) and max(costs) > (1 + TOLERANCE) * min(costs)


# Heat maps.


def draw_heat_map(comparison: Comparison) -> list[CaptionedFigure]:
    """The metric for every pair of values of two keys: the requested ones, or the two in which the runs differ."""
    keys = comparison.by or comparison.results.keys
    rows = [group.runs[list(keys)].astype(object).iloc[0].to_dict() for group in comparison.groups]
    if len(keys) != 2 or any(group.runs[key].nunique() > 1 for group in comparison.groups for key in keys):
        return []
    down, across = (sorted({row[key] for row in rows}, key=natural_order) for key in keys)
    if min(len(down), len(across)) < 2 or len(rows) < DENSITY * len(down) * len(across):
        return []
    means = np.full((len(down), len(across)), np.nan)
    texts, decimals = {}, count_decimals(comparison)
    for row, group in zip(rows, comparison.groups, strict=True):
        cell = down.index(row[keys[0]]), across.index(row[keys[1]])
        means[cell] = group.estimate.mean
        texts[cell] = write_estimate(group.estimate, decimals).text.replace(" ± ", "\n± ")
    figure = _draw_cells(comparison, keys, (down, across), means, texts)
    caption = f"{_capitalize(name_metric(comparison.metric))}: mean and standard error over seeds per pair of values."
    return [CaptionedFigure("heat_map", figure, f"{caption} Lighter is better; a blank cell has no run.")]


def _draw_cells(comparison: Comparison, keys: Sequence[str], values: tuple, means: np.ndarray, texts: dict) -> Figure:
    from matplotlib.figure import Figure

    down, across = values
    figure = Figure(figsize=(3.2 + 1.1 * len(across), 1.6 + 0.62 * len(down)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(means, cmap="cividis_r" if comparison.lower else "cividis", aspect="auto")
    figure.colorbar(image, ax=axis, label=name_metric(comparison.metric))
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


def _figure(
    rows: int, columns: int, comparison: Comparison, omitted: str, groups: Sequence[Group] | None = None
) -> tuple[Figure, np.ndarray]:
    """A figure of panels with one legend, which omits one attribute of the styles, and its axes in reading order."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=_wrap(group.title, LABEL_WIDTH), markersize=5, linewidth=1.4, **style | {omitted: "none"})
        for group, style in _styles(comparison, groups)
    ]
    lines = sum(str(handle.get_label()).count("\n") + 1 for handle in handles)
    figure = Figure(figsize=(3.6 * columns + 2.4, max(3.0 * rows, 0.19 * lines + 0.4)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        _style_axis(axis)
    title = comparison.heading if comparison.by else None
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, handlelength=2.4, title=title)
    return figure, axes


def _style_axis(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)


def _styles(comparison: Comparison, groups: Sequence[Group] | None = None) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Each of the groups, by default all of them, with its colour, dashes and marker."""
    number = 0
    for group in comparison.groups if groups is None else groups:
        if group is comparison.baseline:
            yield group, {"color": BASELINE, "linestyle": "solid", "marker": "*"}
            continue
        color, dash = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
        yield group, {"color": color, "linestyle": dash, "marker": MARKERS[number % len(MARKERS)]}
        number += 1


def name_metric(metric: str) -> str:
    """A metric in words, such as "validation accuracy"."""
    name, _, setting = metric.removeprefix(EVAL).partition("/")
    words = {"loss": "loss (nats per token)"}.get(name, name.replace("_", " "))
    return f"{'validation ' * metric.startswith(EVAL)}{words}{f', {setting}' * bool(setting)}"


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)
