"""`sparsejax data show`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax import config as configs
from sparsejax.cli.arguments import add_config
from sparsejax.show import show_data

EXAMPLE = "sparsejax data show --config=preset:quickstart --config.data.files='books/*.txt'"
OVERRIDES = ("config",)
EXIT_CODES: dict[type[Exception], int] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_config(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="number of training rows; defaults to 3")


def run(options: argparse.Namespace, console: Console) -> None:
    """Describes the data of a config."""
    show_data(configs.check(configs.load(options.config, options.overrides["config"])), options.rows, console)
