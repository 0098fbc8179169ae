"""The report: prints a summary of runs, and writes tables, figures and a page on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sparsejax.figures import render
from sparsejax.report import figures, table
from sparsejax.report.comparison import Comparison, compare
from sparsejax.report.page import write_page
from sparsejax.report.summary import summarize, write_metrics, write_table
from sparsejax.report.table import ReportError
from sparsejax.workdir import replace_file

PAGE, SUMMARY = "index.html", "summary.md"


def report(
    inputs: Sequence[str | Path],
    console: Console,
    *,
    out: str | Path | None = None,
    metric: str | None = None,
    baseline: str | None = None,
    by: Sequence[str] = (),
    only_table: bool = False,
) -> None:
    """Prints the summary of all runs of `inputs`, and writes everything into the folder `out`, if given.

    Args:
      inputs: Sweeps, workdirs, folders of workdirs, or recorded tables.
      console: Where to print.
      out: Folder for `results` and `curves` (.parquet and .csv), `configs.json`, `summary.md`, the figures as .svg and
        .png, and `index.html`, which holds all of them in one file.
      metric: The metric to compare, see `compare`. Several metrics, separated by commas, give a table only.
      baseline: Label of the group that others are compared with.
      by: Keys by which runs are grouped, instead of by label.
      only_table: Whether to print nothing but the table.

    Raises:
      ReportError: Invalid input.
    """
    results = table.read(inputs)
    if metric is not None and "," in metric:
        if out is not None:
            raise ReportError("out", "needs a single metric")
        names = [name.strip() for name in metric.split(",")]
        _print(console, write_metrics([compare(results, name, baseline, by) for name in names]))
        return
    comparison = compare(results, metric, baseline, by)
    summary = summarize(comparison)
    if out is not None:
        _require_libraries()
        _write(comparison, summary, Path(out))
    _print(console, write_table(comparison) if only_table else summary.rstrip("\n"))
    if out is not None and not only_table:
        _print(console, f"\nwrote {Path(out) / PAGE}")


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write(comparison: Comparison, summary: str, out: Path) -> None:
    table.write(comparison.results, out)
    drawn = figures.draw(comparison)
    for figure in drawn:
        for form in ("svg", "png"):
            replace_file(out / f"{figure.name}.{form}", render(figure.figure, form, dpi=figures.DPI))
    replace_file(out / SUMMARY, summary.encode())
    replace_file(out / PAGE, write_page(comparison, drawn).encode())


def _require_libraries() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError("out", "needs matplotlib and jinja2; pip install 'sparsejax[report]'") from None
