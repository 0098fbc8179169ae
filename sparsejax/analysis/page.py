"""The page of an analysis: sentences, figures and tables in one self-contained HTML file."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from sparsejax.figures import draw
from sparsejax.report.summary import Cell

if TYPE_CHECKING:
    from sparsejax.analysis.kind import Findings

MAX_ROWS = 400  # of a table on the page; longer tables are in their csv files only


def write_page(findings: Findings) -> str:
    """Returns the page; equal findings give equal pages."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader("sparsejax.analysis", "."), PackageLoader("sparsejax.report", ".")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    tables = [(name, *_tabulate(rows)) for name, rows in findings.tables.items() if len(rows) <= MAX_ROWS]
    figures = [
        (picture.name, picture.caption, base64.b64encode(draw(picture.build, "svg", picture.name)).decode())
        for picture in findings.pictures
    ]
    return environment.get_template("analysis.html").render(findings=findings, figures=figures, tables=tables)


def _tabulate(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    return list(rows[0]), [[_write(value) for value in row.values()] for row in rows]


def _write(value: Any) -> Cell:
    if value is None or isinstance(value, str):
        return Cell(value or "-")
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", float(value))
