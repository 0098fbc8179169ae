"""`sparsejax data list`."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from sparsejax.data.corpora import RECORDED

EXAMPLE = "sparsejax data list"
OVERRIDES = ()
EXIT_CODES: dict[type[Exception], int] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no options."""


def run(options: argparse.Namespace, console: Console) -> None:
    """Lists the corpora."""
    table = Table("corpus", "text", "training MB", "best n-gram, bits per byte", "packages", "licence")
    for name, recorded in RECORDED.items():
        bits, packages = recorded["bits_per_byte"], recorded["packages"]
        best = min(bits, key=bits.__getitem__)
        versions = ", ".join(f"{package} {fields['version']}" for package, fields in packages.items())
        licences = ", ".join(dict.fromkeys(fields["licence"] for fields in packages.values()))
        size = f"{recorded['parts']['train']['bytes'] / 1e6:.1f}"
        source = {"pypi": "PyPI", "debian": "Debian"}[recorded["source"]]
        table.add_row(name, recorded["summary"], size, f"{bits[best]} ({best})", f"{source}: {versions}", licences)
    console.print(table)
