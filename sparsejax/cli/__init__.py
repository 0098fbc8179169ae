"""The command line: `sparsejax VERB --config=FILE [--config.KEY=VALUE ...] [...]`.

Each verb is a module of this package, which is imported when the verb is chosen. It defines

- `add_arguments(parser)`;
- `run(options, console)`;
- `EXIT_CODES`: the exceptions that end the verb after its work is saved, with their exit codes;
- `OVERRIDES`: the sections whose keys are options, such as "config" for `--config.KEY=VALUE`; `options.overrides` holds
  a dict per section.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from sparsejax.cli.arguments import Parser, split_overrides
from sparsejax.cli.exit_codes import INTERRUPTED, LOSS_DIVERGED, RUNS_FAILED, USAGE_ERROR
from sparsejax.errors import InputError

__all__ = ["INTERRUPTED", "LOSS_DIVERGED", "RUNS_FAILED", "USAGE_ERROR", "VERBS", "main"]

VERBS = {
    "train": "train a model, or resume its run",
    "show": "describe a model: layers, costs, receptive field and warnings",
    "draw": "draw patterns, or the layers of a config",
    "sweep": "train variants of a config, or search among them",
    "doctor": "check the attention kernels of this machine, and record which are verified",
    "report": "compare runs: tables, statistics, figures and a page",
}
# Packages that verbs import, and the extras that install them.
EXTRAS = {"filelock": "train", "grain": "train", "tensorboardX": "train", "safetensors": "interop"}
PLAIN_WIDTH = 160  # columns of a table that goes to a file or a pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    _silence_libraries()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _build_parser()
    try:
        if not arguments or arguments[0] not in VERBS:
            parser.parse_args(arguments)  # prints the help and exits, or raises
            parser.error("the verb must come first")
        name, *remaining = arguments
        verb = importlib.import_module(f"sparsejax.cli.{name}")
        description = f"{VERBS[name][0].upper()}{VERBS[name][1:]}."
        parser = Parser(prog=f"sparsejax {name}", description=description, allow_abbrev=False)
        verb.add_arguments(parser)
        return _run(verb, parser, remaining)
    except InputError as error:
        return _fail(parser.render(error), USAGE_ERROR)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "no space left on the disk of the workdir" if full else str(error.strerror or error)
        return _fail(parser.render(InputError(error.filename or "workdir", problem)), USAGE_ERROR)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f"{package} is not installed; pip install 'sparsejax[{EXTRAS[package]}]'", USAGE_ERROR)
    except KeyboardInterrupt:
        return _fail("stopped by SIGINT; run the same command again", INTERRUPTED)


def _run(verb: Any, parser: Parser, arguments: Sequence[str]) -> int:
    others, overrides = split_overrides(arguments, verb.OVERRIDES)
    options = parser.parse_args(others, argparse.Namespace(overrides=overrides))
    from rich.console import Console  # slow, and --help does not need it

    try:
        verb.run(options, Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH))
    except tuple(verb.EXIT_CODES) as error:
        return _fail(str(error), verb.EXIT_CODES[type(error)])
    return 0


def _build_parser() -> Parser:
    parser = Parser(prog="sparsejax", description="Sparse and hybrid sequence models in JAX.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, purpose in VERBS.items():
        verbs.add_parser(name, help=purpose)
    return parser


def _silence_libraries() -> None:
    """Turns off log messages of libraries; errors that matter are raised."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # When an array of a checkpoint cannot be read, the threads that read the others outlive the event loop.
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int) -> int:
    print(f"sparsejax: {' '.join(message.split())}", file=sys.stderr)
    return code
