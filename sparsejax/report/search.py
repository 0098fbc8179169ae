"""Results of a search: its best trials as tables, as a figure and as configuration files."""

from __future__ import annotations

import csv
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.config.write import write_config
from sparsejax.figures import write_figure
from sparsejax.metrics import Direction, pareto_front
from sparsejax.overrides import flatten
from sparsejax.palette import CELLS
from sparsejax.report.table import LEAKS, allows_leaks
from sparsejax.workdir import SweepFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
COLOURS = {"best": CELLS[2], COMPLETE: CELLS[1], PRUNED: "#bbbbbb"}
LOG_RANGE = 20  # ratio of the largest to the smallest value from which an axis is logarithmic
INCHES = (5.0, 3.4)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A metric or cost to minimize or maximize."""

    name: str
    direction: Direction

    @property
    def title(self) -> str:
        """Label of an axis."""
        return f"{self.name} ({'higher' if self.direction == 'max' else 'lower'} is better)"


def find_best(trials: Sequence[FrozenTrial], objectives: Sequence[Objective]) -> list[FrozenTrial]:
    """Returns the Pareto front of the complete trials, sorted by the last objective; the best one of one objective."""
    complete = sorted((trial for trial in trials if state_of(trial) == COMPLETE), key=lambda trial: trial.number)
    front = pareto_front([tuple(trial.values) for trial in complete], [objective.direction for objective in objectives])
    return [complete[i] for i in front]


def state_of(trial: FrozenTrial) -> str | None:
    """The state of a trial that has ended."""
    return {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAILED}.get(trial.state.name)


def write_results(
    folder: Path,
    trials: Sequence[FrozenTrial],
    objectives: Sequence[Objective],
    settings: Mapping[int, Mapping[str, Any]],
    imports: Sequence[str] = (),
) -> list[Path]:
    """Writes tables of all trials and of the best ones, a figure, and the configuration files of the best ones.

    Args:
      folder: Folder of the search.
      trials: All trials that have ended; their user attributes are `run`, its name, and `overrides`, texts by key.
      objectives: One or two.
      settings: The resolved configurations of the best trials by number, in order.
      imports: Files and modules that every run imports first.

    Returns:
      The files.
    """
    two = len(objectives) == 2
    stem, config = ("pareto", "pareto-{}.py") if two else ("best", "best.py")
    keys = sorted({key for trial in trials for key in _overrides(trial)})
    by_number = {trial.number: trial for trial in trials}
    front = [by_number[number] for number in settings]
    table, summary, all_trials = folder / f"{stem}.csv", folder / f"{stem}.md", SweepFolder(folder).trials
    for file, rows in ((all_trials, trials), (table, front)):
        _write_csv(file, [_tabulate(trial, objectives, keys) for trial in rows])
    summary.write_text(_write_markdown(front, objectives, keys, settings))
    for old in folder.glob(config.format("*")):
        old.unlink()
    configs = [folder / config.format(rank) for rank in range(1, len(front) + 1)]
    for path, trial in zip(configs, front, strict=True):
        path.write_text(write_config(settings[trial.number], _docstring(trial, objectives, path, imports)))
    figures = [folder / f"{stem}{suffix}" for suffix in (".png", ".svg")]
    draw = _draw_front if two else _draw_curves
    for path in figures:
        write_figure(lambda: draw(trials, front, objectives), path)
    return [all_trials, table, summary, *figures, *configs]


def _overrides(trial: FrozenTrial) -> dict[str, str]:
    return trial.user_attrs.get("overrides", {})


def _tabulate(trial: FrozenTrial, objectives: Sequence[Objective], keys: Sequence[str]) -> dict[str, Any]:
    row = {"trial": trial.number, "state": state_of(trial), "run": trial.user_attrs.get("run", "")}
    row["step"] = max(trial.intermediate_values, default="")
    values = trial.values if row["state"] == COMPLETE else ()
    row |= {objective.name: value for objective, value in zip(objectives, values, strict=False)}
    return row | {key: _overrides(trial).get(key, "") for key in keys}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _write_markdown(
    front: Sequence[FrozenTrial],
    objectives: Sequence[Objective],
    keys: Sequence[str],
    settings: Mapping[int, Mapping[str, Any]],
) -> str:
    """A row per trial, with its values and the overrides in which the trials differ."""
    shown = [key for key in keys if len(front) < 2 or len({_overrides(trial).get(key) for trial in front}) > 1]
    lines = [["", "trial", *(objective.name for objective in objectives), *shown]]
    lines.append(["---:"] * (2 + len(objectives)) + ["---"] * len(shown))
    for rank, trial in enumerate(front, 1):
        overrides = [_overrides(trial).get(key, "").replace("|", "\\|") for key in shown]
        leaks = f" ({LEAKS})" if allows_leaks(flatten(settings[trial.number])) else ""
        lines.append([str(rank), f"{trial.number}{leaks}", *(f"{value:.6g}" for value in trial.values), *overrides])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _docstring(trial: FrozenTrial, objectives: Sequence[Objective], path: Path, imports: Sequence[str]) -> str:
    pairs = zip(objectives, trial.values, strict=True)
    values = ", ".join(f"{objective.name} {value:.6g}" for objective, value in pairs)
    options = [f"--config={path.name}", *(f"--import={source}" for source in imports), f"--workdir=runs/{path.stem}"]
    command = shlex.join(["sparsejax", "train", *options])
    return f"Result of a search, trial {trial.number}: {values}.\n\n    {command}\n"


def _draw_front(trials: Sequence[FrozenTrial], front: Sequence[FrozenTrial], objectives: Sequence[Objective]) -> Figure:
    """The first objective over the second: all complete trials, and the front as numbered steps."""
    figure, axes = _make_figure(objectives[1].title, objectives[0].title)
    y, x = zip(*(trial.values for trial in trials if state_of(trial) == COMPLETE), strict=True)
    axes.scatter(x, y, s=14, color=COLOURS[COMPLETE], label="trials")
    # Between two trials of the front, the worse value of both is certain to be reachable.
    where = "pre" if objectives[1].direction == "max" else "post"
    steps = sorted(trial.values[::-1] for trial in front)
    axes.step(*zip(*steps, strict=True), where=where, color=COLOURS["best"], lw=1, marker="o", ms=4, label="front")
    for rank, trial in enumerate(front, 1):
        axes.annotate(str(rank), trial.values[::-1], xytext=(3, 4), textcoords="offset points", fontsize=7)
    if min(x) > 0 and max(x) / min(x) > LOG_RANGE:
        axes.set_xscale("log")
    axes.legend(frameon=False)
    return figure


def _draw_curves(
    trials: Sequence[FrozenTrial], front: Sequence[FrozenTrial], objectives: Sequence[Objective]
) -> Figure:
    """The objective of each trial by step: where trials were pruned, and the best trial."""
    figure, axes = _make_figure("step", objectives[0].title)
    labelled: set[str] = set()
    for trial in sorted(trials, key=lambda trial: trial in front):
        kind = "best" if trial in front else state_of(trial)
        if trial.intermediate_values and kind in COLOURS:
            style = {"color": COLOURS[kind], "lw": 1.6 if kind == "best" else 0.8, "marker": "o", "ms": 2.5}
            label = None if kind in labelled else kind
            axes.plot(*zip(*sorted(trial.intermediate_values.items()), strict=True), label=label, **style)
            labelled.add(kind)
    axes.legend(frameon=False)
    return figure


def _make_figure(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, lw=0.5)
    return figure, axes
