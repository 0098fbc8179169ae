"""A study as one HTML page that needs nothing beside it: no network, no other file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsejax.report import figures, statistics, summary
from sparsejax.report.figures import Picture
from sparsejax.report.study import Study
from sparsejax.report.summary import Cell
from sparsejax.report.table import COSTS, ORIGIN, is_key
from sparsejax.sweep.runs import write_value

if TYPE_CHECKING:
    import pandas as pd


def write_page(study: Study, pictures: Sequence[Picture]) -> str:
    """The page; equal studies make equal pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sparsejax.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    headings, rows = summary.tabulate(study, costs=True)
    return environment.get_template("page.html").render(
        title=_title(study),
        metric=summary.describe_metric(study),
        counted=summary.count_runs(study),
        settings=(headings, rows),
        best=[one is study.best for one in study.settings],
        findings=summary.describe_findings(study),
        notes=summary.describe_notes(study),
        pictures=[(picture.name, picture.caption, _embed(picture)) for picture in pictures],
        metrics=_tabulate_metrics(study),
        runs=_tabulate_runs(study.results.runs),
        common=_find_common(study),
    )


def _title(study: Study) -> str:
    places = [place for place in dict.fromkeys(study.results.runs["config"]) if place]
    return ", ".join(places) or study.metric


def _embed(picture: Picture) -> str:
    """A picture as the address of itself."""
    return f"data:image/svg+xml;base64,{base64.b64encode(figures.write(picture.figure, 'svg')).decode()}"


def _tabulate_metrics(study: Study) -> tuple[list[str], list[list[Cell]]]:
    """Mean and standard error of every metric, for each setting."""
    names = [name for name in study.results.runs if "/" in name]
    rows = []
    for one in study.settings:
        by_seed = one.runs.groupby("seed")[names].mean()
        rows.append([Cell(one.label), *(_write_metric(by_seed[name].dropna().tolist()) for name in names)])
    return ["setting", *names], rows


def _write_metric(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(summary.NONE)
    found = statistics.estimate(values)
    digits = 4 if not found.error else min(max(1 - math.floor(math.log10(found.error)), 1), summary.MOST_DECIMALS)
    return summary.write_estimate(found, digits)


def _tabulate_runs(runs: pd.DataFrame) -> tuple[list[str], list[list[Cell]]]:
    """Every run, with what it cost, where it came from and where it ran."""
    metrics = [name for name in runs if name.startswith("eval/") and "_at_" not in name]
    keys = [name for name in runs if is_key(name)]
    first = ["label", "seed", "status", "step", *keys]
    columns = [*first, *metrics, "train/loss", *COSTS, *ORIGIN]
    columns = [name for name in columns if name in runs]
    known = runs[columns].astype(object).where(runs[columns].notna(), None)
    return columns, [[_write_cell(*cell) for cell in zip(columns, row, strict=True)] for row in known.to_numpy()]


def _write_cell(name: str, value: Any) -> Cell:
    if value is None or isinstance(value, str):
        return Cell(value or summary.NONE)
    number = float(value)
    if name == "cache_bytes":
        return summary.write_bytes(number)
    if name.startswith("training_flops"):
        return summary.write_flops(number)
    if is_key(name):
        return Cell(write_value(value), number)
    if number.is_integer():
        return summary.write_number(number, "{:,.0f}")
    return summary.write_number(number, "{:,.0f}" if abs(number) >= 1000 else "{:.5g}")


def _find_common(study: Study) -> list[tuple[str, str]]:
    """Key and value of what all configurations have in common."""
    known = list(study.results.settings.values())
    return [
        (key, json.dumps(value))
        for key, value in sorted(known[0].items())
        if all(key in one and one[key] == value for one in known)
    ]
