"""`sparsejax show`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax.cli.arguments import add_config, require_config
from sparsejax.errors import InputError

OVERRIDES = ("config",)
EXIT_CODES: dict[type[Exception], int] = {}
EXAMPLES = 3  # rows that `--data` prints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_config(parser)
    parser.add_argument("--length", type=int, metavar="N", help="tokens per sequence; defaults to that of the model")
    parser.add_argument("--hf", metavar="PATH", help="instead of a config: a Hugging Face folder or config.json")
    parser.add_argument("--table", choices=["complexity"], help="instead of a config: how methods grow with the length")
    parser.add_argument("--measure", action="store_true", help="with --table: measure time and memory, in minutes")
    parser.add_argument("--data", action="store_true", help="describe the data of the config, with some training rows")


def run(options: argparse.Namespace, console: Console) -> None:
    """Describes a model, its data, or the methods."""
    _check(options)
    from sparsejax import show

    if options.table:
        show.show_complexity(options.length, options.measure, console)
    elif options.hf:
        from sparsejax.interop import huggingface

        show.show(*huggingface.describe(options.hf, options.length), console)
    else:
        from sparsejax import config as configs

        config = configs.check(configs.load(require_config(options), options.overrides["config"]))
        if options.data:
            show.show_data(config, EXAMPLES, console)
        else:
            show.show(config.model, config.data.length if options.length is None else options.length, console)


def _check(options: argparse.Namespace) -> None:
    subjects = [name for name in ("table", "hf") if getattr(options, name)]
    if len(subjects) > 1:
        raise InputError("hf", "cannot be combined with --table")
    if subjects and (options.config or options.overrides["config"]):
        raise InputError(subjects[0], "cannot be combined with --config")
    if options.data and (subjects or options.length is not None):
        raise InputError("data", "can only be combined with --config")
    if options.measure and not options.table:
        raise InputError("measure", "needs --table=complexity")
