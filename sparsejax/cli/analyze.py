"""`sparsejax analyze`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from rich.console import Console

from sparsejax.cli.arguments import add_model, add_overrides, load_model, parse_integer, split_values
from sparsejax.cli.exit_codes import INTERRUPTED
from sparsejax.cli.progress import WorkProgress
from sparsejax.paths import local_path
from sparsejax.signals import Interrupted, StopSignals

EXAMPLE = "sparsejax analyze runs/quickstart erf --out=figures --data.files='books/*.txt'"
OVERRIDES = ("data",)
EXIT_CODES: dict[type[Exception], int] = {Interrupted: INTERRUPTED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    from sparsejax.analysis import KINDS

    add_model(parser)
    parser.add_argument("kind", metavar="KIND", choices=list(KINDS), help=f"one of {', '.join(KINDS)}")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of tables (csv), figures (PNG, SVG) and a page (HTML)"
    )
    add_overrides(parser, "data", "a key of the section data, as in eval; by default the validation text of the run")
    for name, fields in _collect_options().items():
        field = next(iter(fields.values()))
        parse, metavar = PARSERS[str(field.type).removesuffix(" | None")]
        purpose = f"{field.metadata['help']} ({_describe_defaults(fields)})"
        parser.add_argument(f"--{name}", type=parse, metavar=metavar, help=purpose)


def run(options: argparse.Namespace, console: Console) -> None:
    """Analyzes a model."""
    from sparsejax import analysis

    values = {name: getattr(options, name) for name in _collect_options()}
    changes = {name: value for name, value in values.items() if value is not None}
    out = local_path(options.out, "out")
    model = load_model(options)
    with WorkProgress("analyze", "unit") as report, StopSignals() as signals, signals.raising("in the analysis"):
        findings = analysis.analyze(
            model, options.kind, out, options.overrides["data"], progress=report.advance, **changes
        )
    for line in findings.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"wrote {out / options.kind}.html", highlight=False, markup=False, soft_wrap=True)


def _collect_options() -> dict[str, dict[str, dataclasses.Field]]:
    """The options of all kinds: fields by option and kind."""
    from sparsejax.analysis import KINDS

    options: dict[str, dict[str, dataclasses.Field]] = {}
    for kind, definition in KINDS.items():
        for field in dataclasses.fields(definition.Options):
            options.setdefault(field.name, {})[kind] = field
    return options


def _describe_defaults(fields: dict[str, dataclasses.Field]) -> str:
    """The kinds that have an option, with its default, unless the help of the option explains it."""
    defaults = {kind: "" if field.default in (None, "") else _write(field.default) for kind, field in fields.items()}
    return ", ".join(f"{kind}: {default}" if default else kind for kind, default in defaults.items())


def _write(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# The parser of an option and the name of its value, by the type of the option.
PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (parse_integer, "N"),
    "float": (float, "X"),
    "str": (str, "TEXT"),
    "tuple[int, ...]": (split_values(parse_integer), "N,N"),
    "tuple[float, ...]": (split_values(float), "X,X"),
    "tuple[str, ...]": (split_values(str), "NAME,NAME"),
}
