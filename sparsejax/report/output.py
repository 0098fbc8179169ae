"""The report itself: from places to a summary, and on request to tables, figures and a page in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sparsejax.report import figures, table
from sparsejax.report.page import write_page
from sparsejax.report.study import study
from sparsejax.report.summary import summarize, write_metrics, write_table
from sparsejax.report.table import ReportError
from sparsejax.train.writers import replace_file

PAGE, SUMMARY = "index.html", "summary.md"


def report(
    places: Sequence[str | Path],
    console: Console,
    *,
    out: str | Path | None = None,
    metric: str | None = None,
    baseline: str | None = None,
    by: Sequence[str] = (),
    only_table: bool = False,
) -> None:
    """Prints the summary of all runs in `places`, and writes everything into the folder `out`, if there is one.

    Args:
      places: sweeps, workdirs, folders of workdirs, recorded tables; see `table.read`.
      console: where to print.
      out: gets `results` and `curves` (.parquet and .csv), `configs.json`, `summary.md`, the figures as .svg and .png,
        and `index.html`, which has all of it in one file.
      metric: what is compared; see `study.study`. Of several, joined by commas, only a table is printed.
      baseline: the label that others are compared with.
      by: keys that put runs together, in place of their labels.
      only_table: print nothing but the table.

    Raises:
      ReportError: something given of which no report can be made.
    """
    results = table.read(places)
    if metric is not None and "," in metric:
        if out is not None:
            raise ReportError("--out: goes with one --metric")
        text = write_metrics([study(results, one.strip(), baseline, by) for one in metric.split(",")])
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    found = study(results, metric, baseline, by)
    text = write_table(found) if only_table else summarize(found)
    if out is not None:
        _require_libraries()
        _write(found, text if not only_table else summarize(found), Path(out))
    console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
    if out is not None and not only_table:
        console.print(f"\nwritten: {Path(out) / PAGE}", markup=False, highlight=False, soft_wrap=True)


def _write(found, text: str, out: Path) -> None:
    table.write(found.results, out)
    pictures = figures.draw(found)
    for picture in pictures:
        for form in ("svg", "png"):
            replace_file(out / f"{picture.name}.{form}", figures.write(picture.figure, form))
    replace_file(out / SUMMARY, text.encode())
    replace_file(out / PAGE, write_page(found, pictures).encode())


def _require_libraries() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError("--out: needs matplotlib and jinja2: pip install 'sparsejax[report]'") from None
