"""The command line: `sparsejax VERB [...]`.

Each verb is a module of this package, which is imported when the verb is chosen. It defines

- `EXAMPLE`: a command line, which ends its help;
- `OVERRIDES`: the sections whose keys are options, such as "config" for `--config.KEY=VALUE`; `options.overrides` holds
  a dict per section;
- `EXIT_CODES`: the exceptions that end the verb after its work is saved, with their exit codes;
- `add_arguments(parser)`;
- `run(options, console)`.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import sparsejax
from sparsejax.cli.arguments import Parser, check_overrides, split_overrides
from sparsejax.cli.exit_codes import INTERRUPTED, LOSS_DIVERGED, RUNS_FAILED, USAGE_ERROR
from sparsejax.errors import InputError

__all__ = ["INTERRUPTED", "LOSS_DIVERGED", "RUNS_FAILED", "USAGE_ERROR", "VERBS", "build_parser", "main"]

VERBS = {
    "train": "train a model, or resume its run",
    "show": "describe a model: layers, costs, receptive field and warnings",
    "plan": "say whether a run fits its devices, and what makes it fit",
    "generate": "continue a text with a trained model",
    "eval": "evaluate a trained model on a text, a corpus or a probe",
    "analyze": "measure how a trained model uses its context, beside its receptive field",
    "check": "check that a model reads, decodes and costs what its config states",
    "export": "write a trained model as a folder that transformers loads",
    "data show": "describe the data of a config, with its first training rows",
    "data list": "list the corpora that data fetch downloads",
    "data fetch": "download a corpus and check its digest",
    "draw": "draw patterns, or the layers of a config",
    "sweep": "train variants of a config",
    "search": "search among variants of a config with Optuna",
    "report": "compare runs: tables, statistics, figures and a page",
    "doctor": "check the attention kernels of this machine, and record which are verified",
}
# packages that verbs import, and the extras that install them
EXTRAS = {"safetensors": "interop", "scipy": "report", "jinja2": "report"}
PLAIN_WIDTH = 160  # columns of a table that goes to a file or a pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    _silence_libraries()
    _escape_output()
    arguments = sys.argv[1:] if arguments is None else arguments
    name = next((name for name in VERBS if list(arguments[: len(name.split())]) == name.split()), None)
    group = next((word for word in arguments[:1] if any(name.startswith(f"{word} ") for name in VERBS)), None)
    parser = _build_index(group)
    try:
        for argument in arguments:
            if any("\ud800" <= character <= "\udfff" for character in argument):
                raise InputError(None, f"{argument!r} is not UTF-8")
        if name is None:
            parser.parse_args(arguments[1:] if group else arguments)  # prints the help and exits, or raises
            parser.error("the verb must come first")
        parser = build_parser(name)
        return _run(_import_verb(name), parser, arguments[len(name.split()) :])
    except InputError as error:
        return _fail(parser.render(error), USAGE_ERROR)
    except BrokenPipeError:
        # The reader of the output has ended, such as `head`. Python flushes the output again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich's Console does
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


def build_parser(name: str) -> Parser:
    """Returns the parser of a verb of `VERBS`."""
    verb = _import_verb(name)
    parser = Parser(f"sparsejax {name}", f"{VERBS[name][0].upper()}{VERBS[name][1:]}.", verb.EXAMPLE)
    verb.add_arguments(parser)
    return parser


def _import_verb(name: str) -> Any:
    return importlib.import_module(f"sparsejax.cli.{name.replace(' ', '_')}")


def _build_index(group: str | None) -> Parser:
    """The parser that lists the verbs, or those that start with the word `group`."""
    prefix = f"{group} " if group else ""
    verbs = {name.removeprefix(prefix): VERBS[name] for name in VERBS if name.startswith(prefix)}
    lines = [f"  {name:<12}{purpose}" for name, purpose in verbs.items()]
    description = "\n".join(["Sparse and hybrid sequence models in JAX.", "", "verbs:", *lines])
    program = f"sparsejax {prefix}".strip()
    parser = Parser(program, description, f"{program} {next(iter(verbs))} --help")
    parser.add_argument("verb", metavar="VERB", choices=list(verbs), help="one of the verbs above")
    parser.add_argument("--version", action="version", version=f"sparsejax {sparsejax.__version__}")
    return parser


def _run(verb: Any, parser: Parser, arguments: Sequence[str]) -> int:
    others, overrides = split_overrides(arguments, verb.OVERRIDES)
    options = parser.parse_args(others, argparse.Namespace(overrides=overrides))
    check_overrides(options)
    if imports := getattr(options, "imports", ()):
        from sparsejax.extensions import import_source

        for source in imports:
            import_source(source)
    from rich.console import Console  # slow, and --help does not need it

    try:
        verb.run(options, Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH))
    except tuple(verb.EXIT_CODES) as error:
        return _fail(str(error), verb.EXIT_CODES[type(error)])
    return 0


def _silence_libraries() -> None:
    """Turns off log messages of libraries; errors that matter are raised."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable


def _escape_output() -> None:
    """Escapes characters that a terminal or a log cannot encode, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # When an array of a checkpoint cannot be read or written, Orbax abandons the coroutines of the others.
    code = getattr(unraisable.object, "cr_code", None)
    abandoned = code is not None and "orbax" in code.co_filename
    if not abandoned and "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int) -> int:
    print(f"sparsejax: {' '.join(message.split())}", file=sys.stderr)
    return code
