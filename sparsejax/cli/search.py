"""`sparsejax search`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax.budget import read_match
from sparsejax.cli.arguments import add_config, add_overrides
from sparsejax.cli.exit_codes import INTERRUPTED
from sparsejax.cli.progress import WorkProgress
from sparsejax.cli.sweep import add_runs, read_slurm
from sparsejax.errors import InputError
from sparsejax.paths import local_path
from sparsejax.signals import StopSignals
from sparsejax.sweep import SAMPLERS, build_executor
from sparsejax.train import Interrupted

EXAMPLE = "sparsejax search --config=preset:quickstart --space=space.py --trials=20 --workdir=runs/search"
OVERRIDES = ("config", "slurm", "data")
EXIT_CODES: dict[type[Exception], int] = {Interrupted: INTERRUPTED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    source = parser.add_mutually_exclusive_group(required=True)
    add_config(parser, source)
    source.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help="hf:FOLDER or run:WORKDIR[@STEP|best]: search the layers of this model that keep their attention, without"
        " training; see --layers and --budget",
    )
    parser.add_argument(
        "--space",
        metavar="FILE.py[:NAME]",
        help="with --config: function of a file, by default space(trial), that returns the overrides of an Optuna"
        " trial",
    )
    parser.add_argument("--trials", type=int, metavar="N", help="with --config: number of trials")
    parser.add_argument(
        "--objective",
        default="eval/loss",
        metavar="METRIC[,OTHER]",
        help="metric to optimize, or two for their Pareto front, such as eval/accuracy,kv; defaults to eval/loss",
    )
    parser.add_argument(
        "--sampler", choices=SAMPLERS, default=SAMPLERS[0], help=f"sampler of trials; defaults to {SAMPLERS[0]}"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampler; defaults to 0")
    add_runs(parser)
    _add_placement(parser.add_argument_group("with --from"))
    add_overrides(parser, "data", "with --from: a key of the section data, as in eval")


def _add_placement(group: argparse._ArgumentGroup) -> None:
    """Adds the options of a search on a trained model; those that are not given have the defaults of the search."""
    group.add_argument(
        "--layers",
        metavar="CHOICE,CHOICE",
        help="what a layer can become: full (as it is), window:TOKENS, sinks:TOKENS:SINKS, heads:SHARE (per head, the"
        " cheapest of the other choices that keeps this share of its attention), or a pattern",
    )
    group.add_argument(
        "--budget",
        metavar="QUANTITY:TARGET",
        help="largest kv (bytes of the cache), pairs or flops; a target of at most 1 is a fraction of the source's",
    )
    group.add_argument("--method", metavar="METHOD", help="beam (default), greedy, or all placements")
    for name, metavar, purpose in (
        ("width", "N", "placements that a beam keeps per step; defaults to 4"),
        ("windows", "N", "windows of the text; defaults to 8"),
        ("questions", "N", "questions about needles in the text; defaults to 8, 0 for a model without text"),
    ):
        group.add_argument(f"--{name}", type=int, metavar=metavar, help=purpose)
    group.add_argument(
        "--weight",
        type=float,
        metavar="X",
        help="weight of the loss of the answers beside that of the text; defaults to 1",
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Runs a search."""
    _check_options(options)
    if options.source is None:
        _search_runs(options, console)
    else:
        _search_placements(options, console)


def _check_options(options: argparse.Namespace) -> None:
    """Raises InputError if a required option is missing, or belongs to the other kind of search."""
    required = {"config": ("space", "trials"), "source": ("layers", "budget")}
    others = {"config": (), "source": ("method", "width", "windows", "questions", "weight")}
    kind, other = ("config", "source") if options.source is None else ("source", "config")
    flag = {"config": "--config", "source": "--from"}
    for name in required[kind]:
        if getattr(options, name) is None:
            raise InputError(name, f"is missing; a search with {flag[kind]} needs it")
    for name in (*required[other], *others[other]):
        if getattr(options, name) is not None:
            raise InputError(name, f"needs {flag[other]}")
    if kind == "config" and options.overrides["data"]:
        raise InputError(f"--data.{next(iter(options.overrides['data']))}", f"needs {flag[other]}")


def _search_placements(options: argparse.Namespace, console: Console) -> None:
    from sparsejax.config import ModelSource
    from sparsejax.placement.run import PlacementSearch, run_search

    names = ("method", "width", "windows", "questions", "weight")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    source = ModelSource.parse(options.source)
    search = PlacementSearch(source, options.layers, options.budget, options.overrides["data"], **changes)
    folder = local_path(options.workdir, "workdir")
    with WorkProgress("search", "placement") as report, StopSignals() as signals, signals.raising("in the search"):
        lines, files = run_search(search, folder, report.advance)
    for line in [*lines, *(f"wrote {file}" for file in files)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _search_runs(options: argparse.Namespace, console: Console) -> None:
    from sparsejax.sweep.search import Search, read_objectives, read_space, run_search

    search = Search(
        config=options.config,
        draw=read_space(options.space),
        objectives=read_objectives(options.objective),
        trials=options.trials,
        common=options.overrides["config"],
        match=None if options.match is None else read_match(options.match),
        sampler=options.sampler,
        seed=options.seed,
        max_steps=options.max_steps,
        imports=tuple(options.imports),
    )
    folder = local_path(options.workdir, "workdir")
    executor = build_executor(folder, options.jobs, read_slurm(options))
    for file in run_search(search, folder, executor, console, options.max_hours):
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
