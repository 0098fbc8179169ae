"""The command line: `sparsejax VERB --config=FILE [--config.KEY=VALUE ...] [...]`."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from sparsejax import config as configs
from sparsejax import patterns
from sparsejax.config import ConfigError
from sparsejax.data import DataError
from sparsejax.draw import draw, draw_reach, name_layers
from sparsejax.interop import huggingface
from sparsejax.ops import ImplementationError
from sparsejax.patterns import PatternError
from sparsejax.report import ReportError, report
from sparsejax.schedule import ScheduleError
from sparsejax.show import show, show_complexity, show_data
from sparsejax.train import BadLoss, CheckpointError, Interrupted, train

# What is raised for something that cannot be used, with a message of one line.
UNUSABLE = (
    ConfigError,
    DataError,
    PatternError,
    ScheduleError,
    ImplementationError,
    CheckpointError,
    ReportError,
    huggingface.CheckpointError,
)

USAGE_ERROR = 2  # something given cannot be used; one line says what
BAD_LOSS = 3  # stopped for a bad loss, after saving
INTERRUPTED = 75  # stopped by a signal, after saving: run the same command again (EX_TEMPFAIL)

EXAMPLES = 3  # rows that `show --data` prints
PLAIN_WIDTH = 160  # of tables that go to a file or a pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    _quiet_libraries()
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except UNUSABLE as error:
        return _fail(str(error), USAGE_ERROR)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left on the workdir's disk" if full else error.strerror or error
        return _fail(f"{error.filename or '--workdir'}: {what}", USAGE_ERROR)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED)
    except BadLoss as error:
        return _fail(str(error), BAD_LOSS)
    except KeyboardInterrupt:  # outside of the training loop, which saves first
        return _fail("stopped by SIGINT; the same command goes on", INTERRUPTED)


def _quiet_libraries() -> None:
    """Leaves it to this program to say what went wrong: whatever matters in libraries is raised."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # After one array of a checkpoint could not be read, the threads that read the others find nobody to tell.
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, like everything else that is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _run(arguments: list[str]) -> int:
    given, overrides = _split_overrides(arguments)
    options = _parser().parse_args(given)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if options.verb == "draw":
        _draw(options, overrides, console)
        return 0
    if options.verb == "show":
        _show(options, overrides, console)
        return 0
    if options.verb == "report":
        _report(options, overrides, console)
        return 0
    train(configs.load(_require_config(options), overrides), Path(options.workdir), console)
    return 0


def _require_config(options: argparse.Namespace) -> str:
    if options.config is None:
        raise ConfigError(f"the following arguments are required: --config (see sparsejax {options.verb} --help)")
    return options.config


def _show(options: argparse.Namespace, overrides: list[str], console: Console) -> None:
    if options.table and options.hf:
        raise ConfigError("--hf: cannot be given with --table")
    other = f"--table={options.table}" if options.table else "--hf" if options.hf else None
    if other and (options.config or overrides):
        raise ConfigError(f"{other}: is not about a config, so --config cannot be given")
    if options.data and (other or options.length is not None):
        raise ConfigError("--data: goes with --config alone")
    if options.measure and not options.table:
        raise ConfigError("--measure: goes with --table=complexity")
    if options.table:
        show_complexity(options.length, options.measure, console)
    elif options.hf:
        model, length = huggingface.describe(options.hf, options.length)
        show(model, length, console)
    elif options.data:
        show_data(configs.check(configs.load(_require_config(options), overrides)), EXAMPLES, console)
    else:
        config = configs.check(configs.load(_require_config(options), overrides))
        show(config.model, config.data.length if options.length is None else options.length, console)


def _report(options: argparse.Namespace, overrides: list[str], console: Console) -> None:
    if overrides:
        raise ConfigError(f"--config.{overrides[0].partition('=')[0]}: a report is about runs, not about a config")
    report(
        options.places,
        console,
        out=options.out,
        metric=options.metric,
        baseline=options.baseline,
        by=[key.strip() for key in options.by.split(",")] if options.by else (),
        only_table=options.table,
    )


def _draw(options: argparse.Namespace, overrides: list[str], console: Console) -> None:
    if bool(options.patterns) == bool(options.config):
        raise ConfigError("draw: give patterns, or --config=FILE and no patterns")
    if overrides and not options.config:
        raise ConfigError(f"--config.{overrides[0].partition('=')[0]}: needs --config=FILE")
    if options.config:
        config = configs.check(configs.load(options.config, overrides))
        named = config.model.sees if options.reach else name_layers(config.model)
        length = config.data.length if options.length is None else options.length
    else:
        length = options.length
        named = [(text if options.reach else None, patterns.parse(text, length)) for text in options.patterns]
    if length is None:
        raise ConfigError("--length: how many tokens the picture shows")
    if options.titles is not None:
        titles = [title.strip() for title in options.titles.split(",")]
        if len(titles) != len(named):
            raise ConfigError(f"--titles: {len(titles)} titles, separated by commas, for {len(named)} patterns")
        named = [(title, pattern) for title, (_, pattern) in zip(titles, named, strict=True)]
    (draw_reach if options.reach else draw)(named, length, console, options.tile, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sparsejax", description="Sparse and hybrid sequence models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    purposes = {
        "train": "train, or go on with, the run of a config",
        "show": "print layers, costs, reach and warnings",
        "draw": "draw patterns, or what the layers of a config can see",
    }
    for verb, purpose in purposes.items():
        one = verbs.add_parser(verb, help=purpose, description=purpose, allow_abbrev=False)
        one.add_argument("--config", metavar="FILE[:ARG]", help="a file that defines get_config()")
        one.epilog = "--config.KEY=VALUE sets any key of the config, for example --config.model.width=256"
    verbs.choices["train"].add_argument("--workdir", required=True, help="what the run writes and resumes from")
    one = verbs.choices["show"]
    one.add_argument(
        "--length", type=int, default=None, help="tokens; what the config or the checkpoint is for, if not given"
    )
    one.add_argument("--hf", metavar="PATH", help="in place of a config: a Hugging Face folder, or a config.json")
    one.add_argument("--table", choices=["complexity"], help="in place of a config: how each method grows with n")
    one.add_argument("--data", action="store_true", help="a config's data: counts, and some rows that it trains on")
    one.add_argument("--measure", action="store_true", help="with --table: time and memory on this machine, minutes")
    one = verbs.choices["draw"]
    one.add_argument("patterns", nargs="*", metavar="PATTERN", help="for example 'causal & window(7)'")
    one.add_argument("--length", type=int, default=None, help="tokens; with --config data.length if not given")
    one.add_argument("--reach", action="store_true", help="the patterns are layers: which input reaches which output")
    one.add_argument("--tile", type=int, default=None, help="tokens of a cell; 1, or what fits, if not given")
    one.add_argument("--out", default=None, metavar="FILE", help=".png or .svg; the terminal if not given")
    one.add_argument("--titles", default=None, metavar="A,B", help="a title for each pattern, separated by commas")
    _add_report(verbs)
    return parser


def _add_report(verbs: argparse._SubParsersAction) -> None:
    purpose = "compare runs: a table, its statistics, figures and a page"
    one = verbs.add_parser("report", help=purpose, description=purpose, allow_abbrev=False)
    one.add_argument("places", nargs="+", metavar="PLACE", help="a sweep, a workdir, a folder of these, a results.csv")
    one.add_argument("--out", metavar="DIR", help="gets tables, figures and index.html; only printed if not given")
    one.add_argument("--metric", metavar="NAME[:min|:max]", help="what is compared, for example eval/accuracy")
    one.add_argument("--baseline", metavar="LABEL", help="what others are compared with; the first if not given")
    one.add_argument("--by", metavar="KEY,...", help="keys of the config that put runs together, in place of labels")
    one.add_argument("--table", action="store_true", help="print nothing but the table, as markdown")


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
