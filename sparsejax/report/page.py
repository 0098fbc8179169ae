"""A comparison as one self-contained HTML page, without network access or other files."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsejax.figures import render
from sparsejax.metrics import EVAL, TRAIN_LOSS
from sparsejax.overrides import write_value
from sparsejax.report import figures, statistics, summary
from sparsejax.report.comparison import Comparison
from sparsejax.report.figures import DPI, CaptionedFigure
from sparsejax.report.summary import Cell
from sparsejax.report.table import COSTS, ORIGIN, column_names, is_key

if TYPE_CHECKING:
    import pandas as pd

Table = tuple[list[str], list[list[Cell]]]  # headings and rows


def write_page(comparison: Comparison, drawn: Sequence[CaptionedFigure]) -> str:
    """Returns the page; equal comparisons give equal pages."""
    return _render(
        "page.html",
        title=_title(comparison),
        sortable=True,
        metrics=_tabulate_metrics(comparison),
        runs=_tabulate_runs(comparison.results.runs),
        common=_common_settings(comparison),
        **_describe(comparison, drawn),
    )


def write_fragment(comparison: Comparison, drawn: Sequence[CaptionedFigure]) -> str:
    """Returns the comparison without the list of runs, as HTML that a notebook shows."""
    return _render("notebook.html", sortable=False, **_describe(comparison, drawn))


def _describe(comparison: Comparison, drawn: Sequence[CaptionedFigure]) -> dict[str, Any]:
    return {
        "metric": summary.describe_metric(comparison),
        "counts": summary.count_runs(comparison),
        "groups": summary.tabulate(comparison, costs=True),
        "best": comparison.groups.index(comparison.best),
        "marks": summary.describe_marks(comparison),
        "findings": summary.describe_findings(comparison),
        "notes": summary.describe_notes(comparison),
        "figures": [(figure.name, figure.caption, _data_url(figure)) for figure in drawn],
    }


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sparsejax.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(values)


def _title(comparison: Comparison) -> str:
    configs = [config for config in dict.fromkeys(comparison.results.runs["config"]) if config]
    title = f"{figures.name_metric(comparison.metric)} by {comparison.heading}"
    return f"{title}: {', '.join(configs)}" if configs else title


def _data_url(figure: CaptionedFigure) -> str:
    svg = render(figure.figure, "svg", dpi=DPI)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _tabulate_metrics(comparison: Comparison) -> Table:
    """Mean and standard error of every metric per group."""
    names = [name for name in column_names(comparison.results.runs) if "/" in name]
    rows = []
    for group in comparison.groups:
        by_seed = group.runs.groupby("seed")[names].mean()
        rows.append([Cell(group.title), *(_write_metric(by_seed[name].dropna().tolist()) for name in names)])
    return [comparison.heading, *names], rows


def _write_metric(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(summary.NONE)
    estimate = statistics.estimate(values)
    return summary.write_estimate(estimate, summary.decimals_of([estimate.error]))


def _tabulate_runs(runs: pd.DataFrame) -> Table:
    """Every run, with its costs, its origin, and where it ran."""
    names = column_names(runs)
    metrics = [name for name in names if name.startswith(EVAL) and "_at_" not in name]
    keys = [name for name in names if is_key(name)]
    columns = ["label", "seed", "status", "step", *keys, *metrics, TRAIN_LOSS, *COSTS, *ORIGIN]
    columns = [name for name in columns if name in names]
    values = runs[columns].astype(object).where(runs[columns].notna(), None)
    return columns, [[_write_cell(*cell) for cell in zip(columns, row, strict=True)] for row in values.to_numpy()]


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
    return summary.write_number(number, "{:,.0f}" if number.is_integer() or abs(number) >= 1000 else "{:.5g}")


def _common_settings(comparison: Comparison) -> list[tuple[str, str]]:
    """Key and value of what all configurations have in common."""
    first, *others = comparison.results.settings.values()
    return [
        (key, json.dumps(value))
        for key, value in sorted(first.items())
        if all(key in settings and settings[key] == value for settings in others)
    ]
