"""`sparsejax report`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax.report import report

EXAMPLE = "sparsejax report runs/sweep --out=report --metric=eval/bits_per_byte --baseline=dense"
OVERRIDES = ()
EXIT_CODES: dict[type[Exception], int] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a sweep, a workdir, a folder of workdirs or a results.csv"
    )
    parser.add_argument("--out", metavar="DIR", help="write tables, figures and index.html to this folder")
    parser.add_argument(
        "--metric",
        metavar="NAME[:min|:max],...",
        help="metric to compare, such as eval/accuracy; several metrics make a table only",
    )
    parser.add_argument("--baseline", metavar="LABEL", help="label to compare the others with; defaults to the first")
    parser.add_argument("--by", metavar="KEY,...", help="group runs by these config keys instead of by label")
    parser.add_argument("--table", action="store_true", help="print nothing but the table, as Markdown")


def run(options: argparse.Namespace, console: Console) -> None:
    """Compares runs."""
    result = report(
        *options.inputs,
        metric=options.metric,
        baseline=options.baseline,
        by=[key.strip() for key in options.by.split(",")] if options.by else (),
    )
    page = None if options.out is None else result.write(options.out)
    text = result.table if options.table else f"{result}" + f"\n\nwrote {page}" * (page is not None)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
