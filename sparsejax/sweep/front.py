"""What a search has found: its best trials, as tables, as a picture and as config files."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.config import Config
from sparsejax.draw import write_figure
from sparsejax.sweep.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
COLOURS = {"best": "#0a5a9c", COMPLETE: "#8fc1e3", PRUNED: "#bbbbbb"}  # told apart without colour vision, and in grey
WIDE = 20  # an axis whose largest value is so many times the smallest is logarithmic
LINE = 120  # characters of a config file's line
INCHES = (5.0, 3.4)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a search looks for the least of, or the most."""

    name: str
    most: bool

    @property
    def wish(self) -> str:
        return "higher is better" if self.most else "lower is better"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
      number: From 0 on, in the order in which trials were begun.
      state: COMPLETE, PRUNED or FAILED.
      values: Of the objectives; none unless complete.
      reports: The first objective at steps on the way.
      overrides: As text, by key; label and all.
      run: The run's name.
    """

    number: int
    state: str
    values: tuple[float, ...]
    reports: dict[int, float]
    overrides: dict[str, str]
    run: str


def find_front(losses: Sequence[tuple[float, ...]]) -> list[int]:
    """The Pareto front of losses: those that no other beats, as good in all and better in one.

    Of equal ones the first stays. Indices, in the order of the last loss, the best first.
    """
    kept: dict[tuple[float, ...], int] = {}
    for i, loss in enumerate(losses):
        if not any(_beats(other, loss) for other in losses):
            kept.setdefault(loss, i)
    return [kept[loss] for loss in sorted(kept, key=lambda loss: loss[::-1])]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def find_best(outcomes: Sequence[Outcome], objectives: Sequence[Objective]) -> list[Outcome]:
    """The front of the complete trials, in the order of the last objective; with one objective that is the best."""
    signs = [-1 if objective.most else 1 for objective in objectives]
    complete = sorted((one for one in outcomes if one.state == COMPLETE), key=lambda one: one.number)
    losses = [tuple(sign * value for sign, value in zip(signs, one.values, strict=True)) for one in complete]
    return [complete[i] for i in find_front(losses)]


def write_outcomes(
    folder: Path, outcomes: Sequence[Outcome], objectives: Sequence[Objective], best: Sequence[tuple[Outcome, Run]]
) -> list[Path]:
    """Writes all trials, the best of them (a front, if there are two objectives), a picture and the best configs.

    Args:
      folder: where to.
      outcomes: all trials.
      objectives: one or two.
      best: the trials that none beats, and their runs.

    Returns:
      The files.
    """
    two = len(objectives) == 2
    name, config = ("pareto", "front-{}.py") if two else ("best", "best.py")
    keys = sorted({key for one in outcomes for key in one.overrides})
    front = [one for one, _ in best]
    _write_rows(folder / "trials.csv", _tabulate(outcomes, objectives, keys))
    _write_rows(folder / f"{name}.csv", _tabulate(front, objectives, keys))
    (folder / f"{name}.md").write_text(_write_table(front, objectives, keys))
    for old in folder.glob(config.format("*")):
        old.unlink()
    configs = [folder / config.format(place) for place in range(1, len(best) + 1)]
    for path, (one, run) in zip(configs, best, strict=True):
        settings = run.settings.to_dict()
        ordered = {field.name: settings[field.name] for field in dataclasses.fields(Config)}
        path.write_text(write_config(ordered, _title(one, objectives, path.name)))
    pictures = [folder / f"{name}{ending}" for ending in (".png", ".svg")]
    for path in pictures:
        build = _draw_front if two else _draw_curves
        write_figure(lambda build=build: build(outcomes, front, objectives), path)
    return [folder / "trials.csv", folder / f"{name}.csv", folder / f"{name}.md", *pictures, *configs]


# Tables.


def _tabulate(
    outcomes: Sequence[Outcome], objectives: Sequence[Objective], keys: Sequence[str]
) -> list[dict[str, Any]]:
    rows = []
    for one in outcomes:
        values = {objective.name: value for objective, value in zip(objectives, one.values, strict=False)}
        given = {key: one.overrides.get(key, "") for key in keys}
        steps = {"step": max(one.reports, default="")}
        rows.append({"trial": one.number, "state": one.state, "run": one.run} | steps | values | given)
    return rows


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _write_table(front: Sequence[Outcome], objectives: Sequence[Objective], keys: Sequence[str]) -> str:
    """Markdown: a row for each, its values and what of its overrides is not the same in all."""
    told = [key for key in keys if len(front) < 2 or len({one.overrides.get(key) for one in front}) > 1]
    heads = ["", "trial", *(one.name for one in objectives), *told]
    lines = [heads, ["---:"] * (2 + len(objectives)) + ["---"] * len(told)]
    for place, one in enumerate(front, 1):
        given = [one.overrides.get(key, "").replace("|", "\\|") for key in told]
        lines.append([str(place), str(one.number), *(f"{value:.6g}" for value in one.values), *given])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Config files.


def write_config(settings: dict[str, Any], title: str) -> str:
    """A config file that gives these settings; `title` is the first line of its docstring."""
    body = _write_value(settings, 8, 0)
    return (
        f'"""{title}"""\n\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n'
        f"    return ConfigDict(\n        {body}\n    )\n"
    )


def _write_value(value: Any, indent: int, before: int) -> str:
    """A value as Python; a dict that does not fit into a line behind `before` characters takes a line for each key."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    inline = ", ".join(f'"{key}": {_write_value(item, 0, 0)}' for key, item in value.items())
    if len(inline) + indent + before + 3 <= LINE and not any(isinstance(item, dict) for item in value.values()):
        return f"{{{inline}}}"
    inner = indent + 4
    lines = [f'{" " * inner}"{key}": {_write_value(item, inner, len(key) + 4)},\n' for key, item in value.items()]
    return "{\n" + "".join(lines) + " " * indent + "}"


def _title(one: Outcome, objectives: Sequence[Objective], file: str) -> str:
    values = ", ".join(f"{objective.name} {value:.6g}" for objective, value in zip(objectives, one.values, strict=True))
    stem = file.removesuffix(".py")
    return (
        f"Found by a search, trial {one.number}: {values}.\n\n"
        f"    sparsejax train --config={file} --workdir=runs/{stem}\n"
    )


# Pictures.


def _draw_front(outcomes: Sequence[Outcome], front: Sequence[Outcome], objectives: Sequence[Objective]) -> Figure:
    """The first objective over the second: all complete trials, and the front as steps with its numbers."""
    figure, axes = _make_figure()
    gain, price = objectives
    points = [one.values for one in outcomes if one.state == COMPLETE]
    axes.scatter([y for _, y in points], [x for x, _ in points], s=14, color=COLOURS[COMPLETE], label="trials")
    # Between two trials of the front the worse of both is what is sure to be reached.
    where = "pre" if price.most else "post"
    steps = sorted((price_, gain_) for gain_, price_ in (one.values for one in front))
    axes.step(*zip(*steps, strict=True), where=where, color=COLOURS["best"], lw=1, marker="o", ms=4, label="front")
    for place, one in enumerate(front, 1):
        axes.annotate(str(place), one.values[::-1], xytext=(3, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(f"{price.name} ({price.wish})")
    axes.set_ylabel(f"{gain.name} ({gain.wish})")
    prices = [price_ for _, price_ in points]
    if min(prices) > 0 and max(prices) / min(prices) > WIDE:
        axes.set_xscale("log")
    axes.legend(frameon=False)
    return figure


def _draw_curves(outcomes: Sequence[Outcome], front: Sequence[Outcome], objectives: Sequence[Objective]) -> Figure:
    """The objective of each trial by step: where trials were pruned, and the best one."""
    figure, axes = _make_figure()
    best = {one.number for one in front}
    shown: set[str] = set()
    for one in sorted(outcomes, key=lambda one: one.number in best):
        kind = "best" if one.number in best else one.state
        if one.reports and kind in COLOURS:
            style = {"color": COLOURS[kind], "lw": 1.6 if kind == "best" else 0.8, "marker": "o", "ms": 2.5}
            axes.plot(*zip(*sorted(one.reports.items()), strict=True), label=None if kind in shown else kind, **style)
            shown.add(kind)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{objectives[0].name} ({objectives[0].wish})")
    axes.legend(frameon=False)
    return figure


def _make_figure() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, lw=0.5)
    return figure, axes
