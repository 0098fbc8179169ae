"""`sparsejax sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from sparsejax.budget import QUANTITIES, read_match
from sparsejax.cli.arguments import add_config, add_overrides
from sparsejax.cli.exit_codes import INTERRUPTED, RUNS_FAILED
from sparsejax.errors import InputError
from sparsejax.paths import local_path
from sparsejax.sweep import RunsFailed, sweep
from sparsejax.train import Interrupted

EXAMPLE = (
    "sparsejax sweep --config=preset:quickstart --workdir=runs/sweep"
    ' --sweep=\'model.schedule=["5x(full)", "5x(local)"];seed=range(3)\''
)
OVERRIDES = ("config", "slurm")
EXIT_CODES = {Interrupted: INTERRUPTED, RunsFailed: RUNS_FAILED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_config(parser)
    parser.add_argument(
        "--sweep",
        required=True,
        metavar="FILE.py[:NAME]|AXES",
        help="the overrides of the runs: a function of a file, by default sweep(), or axes such as"
        " 'model.width=[64, 128];seed=range(3)'",
    )
    add_runs(parser)
    parser.add_argument("--retry", action="store_true", help="restart failed runs")
    parser.add_argument("--print", action="store_true", help="print the command line of every run and start none")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Adds the options that sweeps and searches share."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the runs; those in it are resumed")
    parser.add_argument(
        "--launcher", choices=["local", "slurm"], default="local", help="where runs start; defaults to local"
    )
    add_overrides(
        parser,
        "slurm",
        "with --launcher=slurm: set partition, time (minutes), cpus, gpus, mem or another option of sbatch",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="concurrent runs; defaults to one per GPU, or one per two CPU cores"
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="reject runs of more steps")
    parser.add_argument("--max-hours", type=float, metavar="HOURS", help="save and stop all runs after this time")
    parser.add_argument(
        "--match",
        metavar="QUANTITY:TARGET[:KEY]",
        help="adjust KEY, which defaults to the MLP widths, until all runs have equal cost; QUANTITY is "
        + ", ".join(QUANTITIES),
    )


def read_slurm(options: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the settings of the submission to Slurm; None for this machine."""
    slurm = options.overrides["slurm"]
    if options.launcher == "slurm":
        return slurm
    if slurm:
        raise InputError(f"--slurm.{next(iter(slurm))}", "needs --launcher=slurm")
    return None


def run(options: argparse.Namespace, console: Console) -> None:
    """Runs a sweep."""
    try:
        sweep(
            options.sweep,
            options.config,
            options.overrides["config"],
            local_path(options.workdir, "workdir"),
            console,
            jobs=options.jobs,
            slurm=read_slurm(options),
            print_only=options.print,
            retry=options.retry,
            max_steps=options.max_steps,
            max_hours=options.max_hours,
            match=None if options.match is None else read_match(options.match),
            imports=options.imports,
        )
    except RunsFailed as error:
        raise RunsFailed(f"{error}; the same command with --retry runs them again") from error
