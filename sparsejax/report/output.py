"""The report: runs compared in one or several metrics, as text, in a notebook, or in files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sparsejax.figures import render
from sparsejax.paths import local_path
from sparsejax.report import figures, table
from sparsejax.report.comparison import Comparison, compare
from sparsejax.report.page import write_fragment, write_page
from sparsejax.report.summary import summarize, write_metrics, write_table
from sparsejax.report.table import ReportError
from sparsejax.workdir import replace_file

PAGE, SUMMARY = "index.html", "summary.md"


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Comparisons of the same runs, one per metric. It prints as Markdown; a notebook shows a table and figures."""

    comparisons: tuple[Comparison, ...]

    @property
    def table(self) -> str:
        """The groups as a Markdown table."""
        return write_table(self.comparisons[0]) if len(self.comparisons) == 1 else write_metrics(self.comparisons)

    def __str__(self) -> str:
        return summarize(self.comparisons[0]).rstrip("\n") if len(self.comparisons) == 1 else self.table

    __repr__ = __str__

    def _repr_html_(self) -> str:
        _require_libraries("report")
        return "\n".join(write_fragment(comparison, figures.draw(comparison)) for comparison in self.comparisons)

    def write(self, out: str | Path) -> Path:
        """Writes tables, figures and a page.

        Args:
          out: Folder for `results` and `curves` (.parquet and .csv), `configs.json`, `summary.md`, the figures as .svg
            and .png, and `index.html`, which contains all of them.

        Returns:
          The path of the page.

        Raises:
          ReportError: The report has several metrics, or a library is missing.
        """
        if len(self.comparisons) > 1:
            raise ReportError("out", "requires a single metric")
        _require_libraries("out")
        (comparison,), out = self.comparisons, local_path(out, "out")
        table.write(comparison.results, out)
        drawn = figures.draw(comparison)
        for figure in drawn:
            for form in ("svg", "png"):
                replace_file(out / f"{figure.name}.{form}", render(figure.figure, form, dpi=figures.DPI))
        replace_file(out / SUMMARY, summarize(comparison).encode())
        replace_file(out / PAGE, write_page(comparison, drawn).encode())
        return out / PAGE


def report(
    *inputs: str | Path, metric: str | None = None, baseline: str | None = None, by: Sequence[str] = ()
) -> Report:
    """Compares all runs of the inputs.

    Args:
      inputs: Sweeps, workdirs, folders of workdirs, or recorded tables.
      metric: Metric to compare, see `compare`; several metrics are separated by commas.
      baseline: Label of the group with which the others are compared.
      by: Keys by which runs are grouped, instead of by label.

    Raises:
      ReportError: Invalid input.
    """
    results = table.read(inputs)
    names = [None] if metric is None else [name.strip() for name in metric.split(",")]
    return Report(tuple(compare(results, name, baseline, by) for name in names))


def _require_libraries(argument: str) -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError(argument, "requires matplotlib and jinja2; pip install 'sparsejax[report]'") from None
