"""`sparsejax search`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax.budget import read_match
from sparsejax.cli.arguments import add_config
from sparsejax.cli.exit_codes import INTERRUPTED
from sparsejax.cli.sweep import add_runs, read_slurm
from sparsejax.paths import local_path
from sparsejax.sweep import SAMPLERS, build_executor
from sparsejax.train import Interrupted

EXAMPLE = "sparsejax search --config=preset:quickstart --space=space.py --trials=20 --workdir=runs/search"
OVERRIDES = ("config", "slurm")
EXIT_CODES: dict[type[Exception], int] = {Interrupted: INTERRUPTED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_config(parser)
    parser.add_argument(
        "--space",
        required=True,
        metavar="FILE.py[:NAME]",
        help="function of a file, by default space(trial), that returns the overrides of an Optuna trial",
    )
    parser.add_argument("--trials", type=int, required=True, metavar="N", help="number of trials")
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


def run(options: argparse.Namespace, console: Console) -> None:
    """Runs a search."""
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
