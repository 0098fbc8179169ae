"""`sparsejax data fetch`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax.data.corpora import RECORDED, fetch_corpus
from sparsejax.paths import local_path

EXAMPLE = "sparsejax data fetch sympy --out=corpora/sympy"
OVERRIDES = ()
EXIT_CODES: dict[type[Exception], int] = {}
KEYS = {"files": "train", "validation": "validation"}  # part of a corpus by key of the data section


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    parser.add_argument("name", metavar="NAME", choices=RECORDED, help=f"corpus: {', '.join(RECORDED)}")
    parser.add_argument("--out", metavar="DIR", help="folder to write; defaults to corpora/NAME")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail if a package has another version than recorded; by default, one line describes the difference, and "
        "corpus.json holds `recorded: false`",
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Fetches a corpus."""

    def report(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    out = local_path(options.out or f"corpora/{options.name}", "out")
    record = fetch_corpus(options.name, out, options.strict, report)
    for side, part in record["parts"].items():
        report(f"{out / part['file']}: {side}, {part['documents']:,} documents, {part['bytes']:,} bytes")
    bits = record["bits_per_byte"]
    best = min(bits, key=bits.__getitem__)
    report(f"best byte n-gram: {best}, {bits[best]} bits per byte")
    files = (f"--config.data.{key}={out / record['parts'][side]['file']}" for key, side in KEYS.items())
    report(f"read it with {' '.join(files)}")
