"""`sparsejax sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsejax.budget import QUANTITIES, read_match
from sparsejax.cli.arguments import add_config, require_config
from sparsejax.cli.exit_codes import INTERRUPTED, RUNS_FAILED
from sparsejax.errors import InputError
from sparsejax.sweep import SAMPLERS, RunsFailed, build_executor, sweep
from sparsejax.train import Interrupted

OVERRIDES = ("config", "slurm")
EXIT_CODES = {Interrupted: INTERRUPTED, RunsFailed: RUNS_FAILED}
SEARCH_OPTIONS = ("trials", "objective", "sampler", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_config(parser)
    parser.epilog = f"{parser.epilog}; --slurm.KEY=VALUE sets partition, time (minutes), cpus, gpus, mem or another"
    parser.epilog += " option of sbatch"
    runs = parser.add_mutually_exclusive_group(required=True)
    runs.add_argument(
        "--sweep",
        metavar="FILE.py[:NAME]|AXES",
        help="overrides of the runs: a function of a file, or axes such as 'model.width=[64, 128];seed=range(3)'",
    )
    runs.add_argument("--search", metavar="FILE.py[:NAME]", help="function that draws the overrides of a trial")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the sweep; a sweep in it is resumed")
    parser.add_argument(
        "--launcher", choices=["local", "slurm"], default="local", help="where runs start; defaults to local"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="concurrent runs; defaults to one per GPU, or per two CPU cores"
    )
    parser.add_argument("--retry", action="store_true", help="restart failed runs")
    parser.add_argument("--print", action="store_true", help="print the command line of every run and start none")
    parser.add_argument("--max-steps", type=int, metavar="N", help="reject runs with more steps")
    parser.add_argument("--max-hours", type=float, metavar="HOURS", help="save and stop all runs after this time")
    parser.add_argument(
        "--match",
        metavar="QUANTITY:TARGET[:KEY]",
        help=f"adjust KEY, or the MLP widths, until all runs have equal cost: {', '.join(QUANTITIES)}",
    )
    parser.add_argument("--trials", type=int, metavar="N", help="with --search: number of trials")
    parser.add_argument(
        "--objective",
        metavar="METRIC[,OTHER]",
        help="with --search: metrics to optimize, such as eval/accuracy,kv; defaults to eval/loss",
    )
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help=f"with --search: sampler of trials; defaults to {SAMPLERS[0]}"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="with --search: seed of the sampler; defaults to 0")


def run(options: argparse.Namespace, console: Console) -> None:
    """Runs a sweep or a search."""
    slurm = options.overrides["slurm"]
    if slurm and options.launcher != "slurm":
        raise InputError(f"--slurm.{next(iter(slurm))}", "needs --launcher=slurm")
    (_search if options.search else _sweep)(options, slurm if options.launcher == "slurm" else None, console)


def _sweep(options: argparse.Namespace, slurm: dict[str, Any] | None, console: Console) -> None:
    for name in SEARCH_OPTIONS:
        if getattr(options, name) is not None:
            raise InputError(name, "needs --search")
    sweep(
        options.sweep,
        require_config(options),
        options.overrides["config"],
        Path(options.workdir),
        console,
        jobs=options.jobs,
        slurm=slurm,
        print_only=options.print,
        retry=options.retry,
        max_steps=options.max_steps,
        max_hours=options.max_hours,
        match=None if options.match is None else read_match(options.match),
    )


def _search(options: argparse.Namespace, slurm: dict[str, Any] | None, console: Console) -> None:
    if options.trials is None:
        raise InputError("search", "needs --trials")
    for name in ("retry", "print"):
        if getattr(options, name):
            raise InputError(name, "cannot be combined with --search")
    from sparsejax.sweep.search import Search, read_objectives, read_search, run_search

    search = Search(
        config=require_config(options),
        draw=read_search(options.search),
        objectives=read_objectives(options.objective or "eval/loss"),
        trials=options.trials,
        common=options.overrides["config"],
        match=None if options.match is None else read_match(options.match),
        sampler=options.sampler or SAMPLERS[0],
        seed=options.seed or 0,
        max_steps=options.max_steps,
    )
    folder = Path(options.workdir)
    executor = build_executor(folder, options.jobs, slurm)
    for file in run_search(search, folder, executor, console, options.max_hours):
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
