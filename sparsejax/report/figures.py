"""Figures of a study: learning curves, what is paid for a metric, and two keys against one another."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparsejax.report.study import Setting, Study, natural_order
from sparsejax.report.summary import count_decimals, write_estimate
from sparsejax.sweep.front import find_front
from sparsejax.sweep.runs import shorten, write_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours but yellow, which is faint on white; black is the baseline's.
BASELINE = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "os^Dv<>pXP"
GREY = "#666666"
COSTS = {
    "training_flops": ("training FLOPs", ""),
    "cache_bytes": ("decode cache of a sequence", "B"),
    "parameters": ("parameters", ""),
    "seconds": ("training time", "s"),
}
LABEL_WIDTH = 34  # characters in a line of a legend
SHOWN_SETTINGS = 24  # that colours, dashes and markers can tell apart
SPREAD = 1.001  # a cost that differs by less is the same for all
DECADE = 10.0  # costs that differ by more are on a logarithmic axis


class Picture(NamedTuple):
    """A figure with its name, and what it shows in a sentence."""

    name: str
    figure: Figure
    caption: str


def draw(study: Study) -> list[Picture]:
    """The figures that the runs have something to show in."""
    from matplotlib import style

    with style.context(["default", {"font.size": 9, "text.parse_math": False}]):
        drawn = [draw_curves(study), draw_pareto(study), draw_heat_map(study)]
        pictures = [picture for picture in drawn if picture is not None]
        for picture in pictures:  # laid out once: another time would move everything by a hair
            picture.figure.draw_without_rendering()
            picture.figure.set_layout_engine("none")
    return pictures


def write(figure: Figure, form: str) -> bytes:
    """A figure as "svg" or "png"; equal figures make equal files."""
    from matplotlib import rc_context

    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[form]
    written = io.BytesIO()
    with rc_context({"svg.hashsalt": "sparsejax", "text.parse_math": False}):
        figure.savefig(written, format=form, metadata=metadata, dpi=150)
    return written.getvalue()


# Learning curves.


def draw_curves(study: Study) -> Picture | None:
    """The metric, and the training loss, by step: mean and standard error over seeds."""
    names = [name for name in dict.fromkeys([study.metric, "train/loss_mean"]) if len(_curves(study, name))]
    if not names:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(1, len(names), study, "marker")
    for axis, name in zip(axes, names, strict=True):
        for one, style in _styles(study):
            steps, mean, error = _average(study, one, name)
            axis.plot(steps, mean, color=style["color"], linestyle=style["linestyle"], linewidth=1.4)
            axis.fill_between(steps, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylabel=_name_metric(name))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _focus(axis)
    caption = (
        "Learning curves: mean over seeds, with a band of one standard error. Before the last step"
        " evaluations may be of a part of the validation data."
    )
    return Picture("curves", figure, caption)


def _curves(study: Study, name: str) -> Any:
    """The points of a metric, of settings with more than one step."""
    curves = study.results.curves
    points = curves[(curves["metric"] == name) & curves["value"].notna()]
    return points if points["step"].nunique() > 1 else points[:0]


def _average(study: Study, one: Setting, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all runs of a setting have, and mean and standard error there; the error of one run is 0."""
    points = _curves(study, name)
    points = points[points["run"].isin(one.runs["run"])]
    values = points.pivot_table(index="step", columns="run", values="value").dropna()
    count = values.shape[1]
    deviation = values.std(axis=1, ddof=1) / math.sqrt(count) if count > 1 else 0 * values.sum(axis=1)
    return tuple(np.asarray(column, float) for column in (values.index, values.mean(axis=1), deviation))


def _focus(axis: Axes) -> None:
    """Leaves out of the picture how high the first steps are, which would press flat what all others do."""
    lines = [np.asarray(line.get_ydata(), float) for line in axis.lines if len(line.get_ydata()) > 4]
    if not lines:
        return
    later = np.concatenate([line[len(line) // 10 :] for line in lines])
    low, high = np.nanmin(later), np.nanmax(later)
    bottom, top = axis.get_ylim()
    margin = 0.06 * (high - low)
    if high > low:
        axis.set_ylim(max(bottom, low - margin), min(top, high + margin))


# Costs.


def draw_pareto(study: Study) -> Picture | None:
    """The metric against what it costs, with the settings that nothing is better and cheaper than."""
    costs = [column for column in COSTS if _differ([one.mean(column) for one in study.settings])]
    if not costs:
        return None
    figure, axes = _figure(-(-len(costs) // 2), min(len(costs), 2), study, "linestyle")
    for axis, column in zip(axes, costs, strict=False):
        _draw_costs(study, column, axis)
    for axis in axes[len(costs) :]:
        axis.set_visible(False)
    same = [COSTS[column][0] for column in COSTS if column not in costs]
    caption = "What the metric costs: mean and standard error over seeds. The grey line is the Pareto front."
    caption += f" The same for all, or not known: {', '.join(same)}." if same else ""
    return Picture("pareto", figure, caption)


def _draw_costs(study: Study, column: str, axis: Axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    name, unit = COSTS[column]
    costs = [one.mean(column) for one in study.settings]
    values = [one.estimate.mean for one in study.settings]
    sign = 1 if study.lower else -1
    front = find_front([(sign * value, cost) for value, cost in zip(values, costs, strict=True)])
    axis.step([costs[i] for i in front], [values[i] for i in front], where="post", color=GREY, linewidth=1, zorder=1)
    for (one, style), cost in zip(_styles(study), costs, strict=True):
        found = one.estimate
        point = {"color": style["color"], "marker": style["marker"], "markersize": 6, "elinewidth": 1, "capsize": 2}
        axis.errorbar([cost], [found.mean], yerr=[found.error or 0.0], linestyle="none", **point)
    if max(costs) > DECADE * min(costs) > 0:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(unit=unit))
    axis.set(xlabel=name, ylabel=_name_metric(study.metric))


def _differ(costs: Sequence[float]) -> bool:
    """Whether costs are known, and not the same for all."""
    return not any(map(math.isnan, costs)) and max(costs) > SPREAD * min(costs)


# Heat maps.


def draw_heat_map(study: Study) -> Picture | None:
    """The metric for every pair of values of two keys: of those asked for, or of the two that differ."""
    keys = study.by or study.results.keys
    rows = [one.runs[list(keys)].astype(object).iloc[0].to_dict() for one in study.settings]
    if len(keys) != 2 or any(one.runs[key].nunique() > 1 for one in study.settings for key in keys):
        return None
    down, across = (sorted({row[key] for row in rows}, key=natural_order) for key in keys)
    if min(len(down), len(across)) < 2:
        return None
    means = np.full((len(down), len(across)), np.nan)
    texts, decimals = {}, count_decimals(study)
    for row, one in zip(rows, study.settings, strict=True):
        place = down.index(row[keys[0]]), across.index(row[keys[1]])
        means[place] = one.estimate.mean
        texts[place] = write_estimate(one.estimate, decimals).text.replace(" ± ", "\n± ")
    figure = _draw_cells(study, keys, (down, across), means, texts)
    return Picture(
        "heat_map",
        figure,
        "Mean and standard error over seeds for each pair of values: lighter is better, blank: no run.",
    )


def _draw_cells(study: Study, keys: Sequence[str], values: tuple, means: np.ndarray, texts: dict) -> Figure:
    from matplotlib.figure import Figure

    down, across = values
    figure = Figure(figsize=(3.2 + 1.1 * len(across), 1.6 + 0.62 * len(down)), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(means, cmap="cividis_r" if study.lower else "cividis", aspect="auto")
    figure.colorbar(shown, ax=axis, label=_name_metric(study.metric))
    names = shorten(keys)
    axis.set(ylabel=names[keys[0]], xlabel=names[keys[1]])
    axis.set_xticks(range(len(across)), [_wrap(write_value(value), 16) for value in across])
    axis.set_yticks(range(len(down)), [_wrap(write_value(value), 24) for value in down])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for (row, column), text in texts.items():
        red, green, blue, _ = shown.cmap(shown.norm(means[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    return figure


# What they share.


def _figure(rows: int, columns: int, study: Study, left_out: str) -> tuple[Figure, np.ndarray]:
    """A figure of panels with one legend for all, and its axes in reading order; `left_out` is no part of its style."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=_wrap(one.label, LABEL_WIDTH), markersize=5, linewidth=1.4, **style | {left_out: "none"})
        for one, style in _styles(study)
    ]
    lines = sum(handle.get_label().count("\n") + 1 for handle in handles)
    figure = Figure(figsize=(3.6 * columns + 2.4, max(3.0 * rows, 0.19 * lines + 0.4)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, handlelength=2.4)
    return figure, axes


def _styles(study: Study) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Each setting with its colour, dashes and marker: the same in all figures."""
    number = 0
    for one in study.settings:
        if one is study.baseline:
            yield one, {"color": BASELINE, "linestyle": "solid", "marker": "*"}
            continue
        color, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        yield one, {"color": color, "linestyle": dash, "marker": MARKERS[number % len(MARKERS)]}
        number += 1


def _name_metric(metric: str) -> str:
    """A metric as an axis has it, with its unit."""
    units = {"eval/loss": "validation loss (nats)", "train/loss_mean": "training loss, running mean (nats)"}
    return units.get(metric, metric.removeprefix("eval/").replace("_", " "))


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)
