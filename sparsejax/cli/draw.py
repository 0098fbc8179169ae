"""`sparsejax draw`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax import draw, patterns
from sparsejax.cli.arguments import add_config
from sparsejax.errors import InputError

OVERRIDES = ("config",)
EXIT_CODES: dict[type[Exception], int] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_config(parser)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="such as 'causal & window(7)'")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens per sequence; with --config, defaults to data.length"
    )
    parser.add_argument(
        "--receptive-field",
        action="store_true",
        help="take the patterns as layers and draw the inputs that reach each output",
    )
    parser.add_argument(
        "--tile", type=int, metavar="N", help="tokens per cell; defaults to 1, or to what fits the terminal"
    )
    parser.add_argument("--out", metavar="FILE", help=".png or .svg file; defaults to the terminal")
    parser.add_argument("--titles", metavar="A,B", help="titles of the patterns, separated by commas")


def run(options: argparse.Namespace, console: Console) -> None:
    """Draws patterns, or the layers of a config."""
    named, length = _read_config(options) if options.config else _read_patterns(options)
    if options.titles is not None:
        titles = [title.strip() for title in options.titles.split(",")]
        if len(titles) != len(named):
            raise InputError("titles", f"{len(titles)} titles, separated by commas, for {len(named)} patterns")
        named = [(title, pattern) for title, (_, pattern) in zip(titles, named, strict=True)]
    draw_named = draw.draw_receptive_field if options.receptive_field else draw.draw
    draw_named(named, length, console, options.tile, options.out)


def _read_config(options: argparse.Namespace) -> tuple[list[tuple[str, patterns.Pattern]], int]:
    from sparsejax import config as configs  # slow, and not needed for patterns

    if options.patterns:
        raise InputError("config", "cannot be combined with patterns")
    config = configs.check(configs.load(options.config, options.overrides["config"]))
    model = config.model
    mixers = [model.layers[name].mixer for name in model.names]
    kinds = ["feed-forward" if mixer is None else mixer.summary.split()[0] for mixer in mixers]
    titled = draw.title_layers((name, kind, p) for (name, p), kind in zip(model.connectivity, kinds, strict=True))
    named = model.connectivity if options.receptive_field else titled
    return named, config.data.length if options.length is None else options.length


def _read_patterns(options: argparse.Namespace) -> tuple[list[tuple[str | None, patterns.Pattern]], int]:
    if not options.patterns:
        raise InputError("config", "is required without patterns")
    if options.overrides["config"]:
        raise InputError("config", "is required for --config.KEY=VALUE")
    if options.length is None:
        raise InputError("length", "is required with patterns")
    texts = options.patterns
    return [(text if options.receptive_field else None, patterns.parse(text, options.length)) for text in texts], (
        options.length
    )
