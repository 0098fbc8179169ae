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
from sparsejax import patterns, sharding
from sparsejax.config import ConfigError
from sparsejax.data import DataError
from sparsejax.draw import draw, draw_reach, name_layers
from sparsejax.interop import huggingface
from sparsejax.ops import ImplementationError
from sparsejax.patterns import PatternError
from sparsejax.report import ReportError, report
from sparsejax.schedule import ScheduleError
from sparsejax.show import show, show_complexity, show_data
from sparsejax.sweep import (
    QUANTITIES,
    SAMPLERS,
    Match,
    RunsFailed,
    Search,
    SweepError,
    build_engine,
    read_match,
    read_objectives,
    read_search,
    run_search,
    sweep,
)
from sparsejax.train import BadLoss, CheckpointError, Interrupted, train

# What is raised for something that cannot be used, with a message of one line.
UNUSABLE = (
    ConfigError,
    DataError,
    PatternError,
    ScheduleError,
    ImplementationError,
    CheckpointError,
    SweepError,
    ReportError,
    huggingface.CheckpointError,
)

USAGE_ERROR = 2  # something given cannot be used; one line says what
BAD_LOSS = 3  # stopped for a bad loss, after saving
RUNS_FAILED = 4  # a sweep has ended, and some of its runs have failed
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
    except RunsFailed as error:
        return _fail(str(error), RUNS_FAILED)
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
    given, overrides = _split_settings(arguments, "--config.")
    given, cluster = _split_settings(given, "--slurm.")
    options = _parser().parse_args(given)
    if cluster and getattr(options, "launcher", None) != "slurm":
        raise ConfigError(f"--slurm.{cluster[0].partition('=')[0]}: goes with sweep --launcher=slurm")
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if options.verb == "draw":
        _draw(options, overrides, console)
        return 0
    if options.verb == "show":
        _show(options, overrides, console)
        return 0
    if options.verb == "sweep":
        _sweep(options, overrides, cluster, console)
        return 0
    if options.verb == "report":
        _report(options, overrides, console)
        return 0
    _train(options, overrides, console)
    return 0


def _require_config(options: argparse.Namespace) -> str:
    if options.config is None:
        raise ConfigError(f"the following arguments are required: --config (see sparsejax {options.verb} --help)")
    return options.config


def _train(options: argparse.Namespace, overrides: list[str], console: Console) -> None:
    settings = configs.load(_require_config(options), overrides)
    if options.distributed is not None:
        sharding.join_processes(options.distributed)
        console.quiet = not sharding.leads()
    train(settings, Path(options.workdir), console)


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


def _sweep(options: argparse.Namespace, overrides: list[str], cluster: list[str], console: Console) -> None:
    settings = None if options.launcher == "local" else _read_settings(cluster, "--slurm.")
    match = None if options.match is None else read_match(options.match)
    if options.search:
        _search(options, overrides, settings, match, console)
        return
    for name in ("trials", "objective", "sampler", "seed"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}: goes with --search")
    asked = options.sweep, _require_config(options), _read_settings(overrides, "--config.")
    limits = {"match": match, "retry": options.retry, "steps": options.max_steps, "hours": options.max_hours}
    sweep(*asked, Path(options.workdir), console, jobs=options.jobs, slurm=settings, dry=options.print, **limits)


def _search(
    options: argparse.Namespace,
    overrides: list[str],
    cluster: dict[str, str] | None,
    match: Match | None,
    console: Console,
) -> None:
    if options.trials is None or options.retry or options.print:
        raise ConfigError("--search: needs --trials, and neither --retry nor --print can be given with it")
    search = Search(
        config=_require_config(options),
        draw=read_search(options.search),
        objectives=read_objectives(options.objective or "eval/loss"),
        trials=options.trials,
        given=_read_settings(overrides, "--config."),
        match=match,
        sampler=options.sampler or SAMPLERS[0],
        seed=options.seed or 0,
        steps=options.max_steps,
    )
    folder = Path(options.workdir)
    engine = build_engine(folder, options.jobs, cluster)
    for file in run_search(search, folder, engine, console, options.max_hours):
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sparsejax", description="Sparse and hybrid sequence models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    purposes = {
        "train": "train, or go on with, the run of a config",
        "show": "print layers, costs, reach and warnings",
        "draw": "draw patterns, or what the layers of a config can see",
        "sweep": "train, or go on with, many runs of a config",
    }
    for verb, purpose in purposes.items():
        one = verbs.add_parser(verb, help=purpose, description=purpose, allow_abbrev=False)
        one.add_argument("--config", metavar="FILE[:ARG]", help="a file that defines get_config()")
        one.epilog = "--config.KEY=VALUE sets any key of the config, for example --config.model.width=256"
    one = verbs.choices["train"]
    one.add_argument("--workdir", required=True, help="what the run writes and resumes from")
    one.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,INDEX/COUNT",
        help="one of several processes that train together; alone, where Slurm, MPI or a TPU pod tells who they are",
    )
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
    _add_sweep(verbs.choices["sweep"])
    _add_report(verbs)
    return parser


def _add_sweep(one: argparse.ArgumentParser) -> None:
    one.epilog += "; --slurm.KEY=VALUE sets partition, time (minutes), cpus, gpus, mem or another option of sbatch"
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--sweep", metavar="FILE.py[:NAME]|AXES", help="or 'model.width=[64, 128];seed=range(3)'")
    what.add_argument("--search", metavar="FILE.py[:NAME]", help="a function that draws the overrides of a trial")
    one.add_argument("--workdir", required=True, help="the sweep's folder: sweep.json, runs/, jobs/")
    one.add_argument("--launcher", choices=["local", "slurm"], default="local")
    one.add_argument("--jobs", type=int, default=None, help="runs at a time; one for each GPU, or for two cores")
    one.add_argument("--retry", action="store_true", help="run again what failed")
    one.add_argument("--print", action="store_true", help="print the command line of every run, and start none")
    one.add_argument("--max-steps", type=int, default=None, help="refuse runs of more steps")
    one.add_argument("--max-hours", type=float, default=None, help="then all that runs saves and stops")
    one.add_argument(
        "--match", metavar="QUANTITY:TARGET[:KEY]", help=f"turn KEY until all take the same: {', '.join(QUANTITIES)}"
    )
    one.add_argument("--trials", type=int, default=None, help="of a search: how many in all")
    one.add_argument(
        "--objective",
        default=None,
        metavar="METRIC[,OTHER]",
        help="eval/loss if not given, or such as eval/accuracy,kv",
    )
    one.add_argument("--sampler", choices=SAMPLERS, default=None, help="how trials are drawn")
    one.add_argument("--seed", type=int, default=None, help="of the sampler")


def _add_report(verbs: argparse._SubParsersAction) -> None:
    purpose = "compare runs: a table, its statistics, figures and a page"
    one = verbs.add_parser("report", help=purpose, description=purpose, allow_abbrev=False)
    one.add_argument("places", nargs="+", metavar="PLACE", help="a sweep, a workdir, a folder of these, a results.csv")
    one.add_argument("--out", metavar="DIR", help="gets tables, figures and index.html; only printed if not given")
    what = "what is compared, for example eval/accuracy; of several, joined by commas, only a table"
    one.add_argument("--metric", metavar="NAME[:min|:max],...", help=what)
    one.add_argument("--baseline", metavar="LABEL", help="what others are compared with; the first if not given")
    one.add_argument("--by", metavar="KEY,...", help="keys of the config that put runs together, in place of labels")
    one.add_argument("--table", action="store_true", help="print nothing but the table, as markdown")


def _split_settings(arguments: list[str], prefix: str) -> tuple[list[str], list[str]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of the arguments, where the prefix is `--config.`."""
    given, settings = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith(prefix):
            given.append(argument)
        elif "=" in argument:
            settings.append(argument.removeprefix(prefix))
        else:
            value = next(rest, None)
            settings.append(argument.removeprefix(prefix) + ("" if value is None else f"={value}"))
    return given, settings


def _read_settings(settings: list[str], prefix: str) -> dict[str, str]:
    for text in settings:
        if "=" not in text:
            raise ConfigError(f"{prefix}{text}: write {prefix}{text}=VALUE")
    return {key: value for key, _, value in (text.partition("=") for text in settings)}


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"sparsejax: {line}", file=sys.stderr)
    return code
