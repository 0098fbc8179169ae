"""The command line: `sparsejax VERB --config=FILE [--config.KEY=VALUE ...] [...]`."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sparsejax import config as configs
from sparsejax.config import ConfigError
from sparsejax.data import DataError
from sparsejax.patterns import PatternError
from sparsejax.schedule import ScheduleError
from sparsejax.show import show
from sparsejax.train import BadLoss, CheckpointError, Interrupted, train

USAGE_ERROR = 2  # something given cannot be used; one line says what
BAD_LOSS = 3  # stopped for a bad loss, after saving
INTERRUPTED = 75  # stopped by a signal, after saving: run the same command again (EX_TEMPFAIL)

PLAIN_WIDTH = 160  # of tables that go to a file or a pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    # Libraries that warn through absl would break up the progress bar; errors still show.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except (ConfigError, DataError, PatternError, ScheduleError, CheckpointError) as error:
        return _fail(str(error), USAGE_ERROR)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left on the workdir's disk" if full else error.strerror or error
        return _fail(f"{error.filename or '--workdir'}: {what}", USAGE_ERROR)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED)
    except BadLoss as error:
        return _fail(str(error), BAD_LOSS)


def _run(arguments: list[str]) -> int:
    given, overrides = _split_overrides(arguments)
    options = _parser().parse_args(given)
    settings = configs.load(options.config, overrides)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if options.verb == "train":
        train(settings, Path(options.workdir), console)
    else:
        show(configs.check(settings), options.length, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsejax", description="Sparse and hybrid sequence models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    purposes = {"train": "train, or go on with, the run of a config", "show": "print the layers and their costs"}
    for verb, purpose in purposes.items():
        one = verbs.add_parser(verb, help=purpose, description=purpose, allow_abbrev=False)
        one.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file that defines get_config()")
        one.epilog = "--config.KEY=VALUE sets any key of the config, for example --config.model.width=256"
    verbs.choices["train"].add_argument("--workdir", required=True, help="what the run writes and resumes from")
    verbs.choices["show"].add_argument("--length", type=int, default=None, help="tokens; data.length if not given")
    return parser


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of the arguments."""
    given, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--config."):
            given.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix("--config."))
        else:
            value = next(rest, None)
            overrides.append(argument.removeprefix("--config.") + ("" if value is None else f"={value}"))
    return given, overrides


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"sparsejax: {line}", file=sys.stderr)
    return code
