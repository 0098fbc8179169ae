"""Files of a search on a trained model: tables, the Pareto front as a figure, and the best placement as a config."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.analysis.figures import new_axes
from sparsejax.analysis.kind import write_csv
from sparsejax.config import ModelSource
from sparsejax.config.write import write_config
from sparsejax.figures import write_figure
from sparsejax.metrics import pareto_front
from sparsejax.palette import CELLS, GREY, INK
from sparsejax.placement.choices import FULL, Choices
from sparsejax.placement.scores import Scored
from sparsejax.placement.search import Placement
from sparsejax.workdir import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"kv": "bytes of the cache", "pairs": "attended pairs", "flops": "FLOPs per token"}


def write_results(
    folder: Path,
    choices: Choices,
    scores: Mapping[Placement, Scored],
    best: Placement,
    full: Scored,
    settings: ConfigDict,
    source: ModelSource,
) -> tuple[list[str], list[Path]]:
    """Writes all placements, the front, a figure of both and the best placement.

    Args:
      folder: The folder.
      choices: The placements.
      scores: The scores of the visited placements.
      best: The best of them.
      full: The scores of the source.
      settings: Configuration of a run that starts from the source.
      source: The source.

    Returns:
      Lines about the result, and the files.
    """
    costs = {placement: choices.cost(placement) for placement in scores}
    order = sorted(scores, key=lambda placement: (costs[placement], scores[placement].loss, placement))
    front = [order[i] for i in pareto_front([(scores[p].loss, costs[p]) for p in order], ["min", "min"])]
    rows = {placement: _tabulate(choices, placement, costs[placement], scores[placement]) for placement in order}
    tables = {"placements.csv": order, "pareto.csv": front}
    for name, placements in tables.items():
        replace_file(folder / name, write_csv([rows[placement] for placement in placements]))
    figures = [folder / "pareto.png", folder / "pareto.svg"]
    for path in figures:
        write_figure(lambda: _draw(choices, costs, scores, front, best, full), path)
    schedule, layers = choices.write(best)
    changed = ConfigDict(settings.to_dict())
    changed.model.schedule = schedule
    changed.model.layers = ConfigDict({name: configs.to_section(layer) for name, layer in layers.items()})
    changed.init.source = str(source.resolve())
    configs.check(changed)
    share = costs[best] / choices.cost(choices.source)
    lines = [
        f"schedule: {schedule}",
        f"{choices.quantity}: {costs[best]:,.0f} {UNITS[choices.quantity]}, {share:.3f} of the source's",
        _compare("loss of the text", scores[best].loss, full.loss, "nats per token"),
    ]
    if full.retrieval is not None and full.retrieval_loss is not None:
        answers = scores[best].retrieval_loss or 0.0
        lines.append(_compare("loss of the answers", answers, full.retrieval_loss, "nats per token"))
        lines.append(f"answered: {scores[best].retrieval:.0%}, {full.retrieval:.0%} of the source")
    command = shlex.join(["sparsejax", "train", "--config=best.py", "--workdir=runs/best"])
    docstring = f"Result of a search on {source}.\n\n" + "".join(f"{line}\n" for line in lines) + f"\n    {command}\n"
    replace_file(folder / "best.py", write_config(changed.to_dict(), docstring).encode())
    return lines, [*(folder / name for name in tables), *figures, folder / "best.py"]


def _compare(name: str, value: float, source: float, unit: str) -> str:
    return f"{name}: {value:.4f} {unit}, {value - source:+.4f} against the source"


def _tabulate(choices: Choices, placement: Placement, cost: float, scored: Scored) -> dict[str, Any]:
    labels = choices.label(placement)
    full = [index for index, label in labels.items() if label == FULL]
    row = {"schedule": choices.write(placement)[0], "full_layers": " ".join(map(str, full)), choices.quantity: cost}
    row["loss"] = scored.loss
    if scored.retrieval is None:
        return row
    return row | {"retrieval_loss": scored.retrieval_loss, "retrieval": scored.retrieval}


def _draw(
    choices: Choices,
    costs: Mapping[Placement, float],
    scores: Mapping[Placement, Scored],
    front: list[Placement],
    best: Placement,
    full: Scored,
) -> Figure:
    """The losses of the visited placements over their cost: the front, the best one, and that of the source."""
    has_answers = full.retrieval_loss is not None
    figure, axes = new_axes(1, 2 if has_answers else 1, width=4.0)
    values = {"loss of the text": ({p: scores[p].loss for p in scores}, full.loss)}
    if full.retrieval_loss is not None:
        values["loss of the answers"] = {p: scores[p].retrieval_loss or 0.0 for p in scores}, full.retrieval_loss
    for axis, (name, (losses, source)) in zip(axes, values.items(), strict=True):
        axis.scatter([costs[p] for p in scores], list(losses.values()), s=12, color=CELLS[1], label="placements")
        if name == "loss of the text":
            steps = sorted((costs[p], losses[p]) for p in front)
            axis.step(*zip(*steps, strict=True), where="post", color=CELLS[2], linewidth=1, label="front")
        axis.scatter([costs[best]], [losses[best]], s=45, facecolors="none", edgecolors=INK, label="best placement")
        axis.axhline(source, color=GREY, linestyle=(0, (4, 2)), linewidth=0.9, label="source")
        axis.axvline(choices.budget, color=GREY, linewidth=0.9, label="budget")
        axis.set(xlabel=f"{choices.quantity} ({UNITS[choices.quantity]})", ylabel=f"{name} (nats per token)")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    return figure
