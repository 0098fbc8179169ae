"""Benchmarks of sparsejax. Run them in the root of the repository.

    python -m benchmarks                          lists them
    python -m benchmarks NAME --out=FILE.json     runs one and writes its record

A benchmark is a module of this folder. Its docstring states the question. `run(options, save)` measures, and calls
`save(record)` or `save(record, table)` with what `--out` and `--table` write; it may return an exit code.
`add_arguments(parser)` is optional.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import describe_machine

FOLDER = Path(__file__).parent
INFRASTRUCTURE = ("__init__", "__main__", "harness")
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in INFRASTRUCTURE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Lists the benchmarks or runs one; returns the exit code."""
    name, *remaining = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        for name in NAMES:  # without importing them
            docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
            print(f"  {name:13} {docstring.splitlines()[0]}")
        return 0
    if name not in NAMES:
        print(f"benchmarks: {name}: no such benchmark; choose one of {', '.join(NAMES)}", file=sys.stderr)
        return 2
    options = build_parser(name).parse_args(remaining)
    facts = {"benchmark": name} | describe_machine()

    def save(record: dict, table: str = "") -> None:
        for path, text in ((options.out, json.dumps(facts | record, indent=1) + "\n"), (options.table, table)):
            if path and text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)

    return importlib.import_module(f"benchmarks.{name}").run(options, save) or 0


def build_parser(name: str) -> argparse.ArgumentParser:
    """Builds the parser of a benchmark."""
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="FILE", help="Markdown file to write, if there is such a table")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes: shows that the benchmark works")
    getattr(module, "add_arguments", lambda parser: None)(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
