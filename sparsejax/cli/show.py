"""`sparsejax show`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax.cli.arguments import add_config
from sparsejax.errors import InputError

EXAMPLE = "sparsejax show --config=preset:jamba --length=262144"
OVERRIDES = ("config",)
EXIT_CODES: dict[type[Exception], int] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    subject = parser.add_mutually_exclusive_group(required=True)
    add_config(parser, subject)
    subject.add_argument("--hf", metavar="PATH", help="a Hugging Face model: its folder or its config.json")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="with --hf: a key of config.json to leave out; can be repeated",
    )
    subject.add_argument(
        "--complexity",
        nargs="?",
        const="counted",
        choices=["counted", "measured"],
        help="compare how the costs of attention patterns and state-space models grow with the length: by counting"
        " pairs (the default), or also by measuring time and memory on this machine, which takes minutes",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens per sequence; defaults to the length of the config or the model, and to 131072 with --complexity",
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Describes a model, or compares the growth of methods."""
    if options.ignore and not options.hf:
        raise InputError("ignore", "needs --hf")
    from sparsejax import show

    if options.complexity:
        show.show_complexity(options.length, options.complexity == "measured", console)
    elif options.hf:
        from sparsejax.interop import huggingface

        show.show(*huggingface.describe(options.hf, options.length, options.ignore), console)
    else:
        from sparsejax import config as configs

        settings = configs.load(options.config, options.overrides["config"])
        config = configs.check(settings)
        length = config.data.length if options.length is None else options.length
        show.show(config.model, length, console)
        if config.sharding.sequence > 1:
            show.show_exchange(config.model, length, config.sharding, console)
        if config.train.teacher is not None:
            from sparsejax.runs.phases import plan_phases  # imports Orbax

            show.show_teacher(plan_phases(settings), console)
