"""`sparsejax train`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.check import CheckFailed
from sparsejax.cli.arguments import add_config
from sparsejax.cli.exit_codes import INTERRUPTED, LOSS_DIVERGED, VERIFICATION_FAILED
from sparsejax.train import Interrupted, LossDiverged, train
from sparsejax.train.start import read_recorded

EXAMPLE = "sparsejax train --config=preset:quickstart --workdir=runs/quickstart --config.train.steps=100"
OVERRIDES = ("config",)
EXIT_CODES = {Interrupted: INTERRUPTED, LossDiverged: LOSS_DIVERGED, CheckFailed: VERIFICATION_FAILED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run; a run in it is resumed")
    parser.add_argument(
        "--extend",
        action="store_true",
        help="resume with a larger train.steps; a line describes what becomes of the learning rate",
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,INDEX/COUNT",
        help="train in several processes: address of the first process, index of this one and their count; without a"
        " value, Slurm, MPI or the TPU pod provides them",
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Trains a model."""
    settings = configs.load(options.config, options.overrides["config"], read_recorded(options.workdir))
    if options.distributed is not None:
        sharding.initialize_distributed(options.distributed)
        console.quiet = not sharding.is_coordinator()
    train(settings, options.workdir, console, options.extend)
