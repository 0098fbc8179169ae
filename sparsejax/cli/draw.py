"""`sparsejax draw`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax import draw, patterns
from sparsejax.cli.arguments import add_config
from sparsejax.errors import InputError
from sparsejax.patterns.drawing import default_length

EXAMPLE = "sparsejax draw 'causal & window(7)' 'causal & (window(7) | sink(2))' --length=32 --out=windows.svg"
OVERRIDES = ("config",)
EXIT_CODES: dict[type[Exception], int] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "patterns", nargs="*", default=[], metavar="PATTERN", help="a pattern, such as 'causal & window(7)'"
    )
    add_config(parser, subject)
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens per sequence; defaults to data.length of the config, or to a length that shows the patterns",
    )
    parser.add_argument(
        "--receptive-field",
        action="store_true",
        help="take the patterns as a stack of layers and draw which inputs reach each output",
    )
    parser.add_argument(
        "--tile", type=int, metavar="N", help="tokens per cell; defaults to 1, or to what fits the terminal"
    )
    parser.add_argument("--out", metavar="FILE", help=".png or .svg file; defaults to the terminal")
    parser.add_argument("--titles", metavar="A,B", help="titles of the patterns, separated by commas")


def run(options: argparse.Namespace, console: Console) -> None:
    """Draws patterns, or the layers of a config."""
    titled, length = _read_config(options) if options.config else _read_patterns(options)
    if options.titles is not None:
        titles = [title.strip() for title in options.titles.split(",")]
        if len(titles) != len(titled):
            raise InputError("titles", f"{len(titles)} titles, separated by commas, for {len(titled)} patterns")
        titled = [(title, pattern) for title, (_, pattern) in zip(titles, titled, strict=True)]
    draw_titled = draw.draw_receptive_field if options.receptive_field else draw.draw
    draw_titled(titled, length, console, options.tile, options.out)


def _read_config(options: argparse.Namespace) -> tuple[list[tuple[str, patterns.Pattern]], int]:
    from sparsejax import config as configs  # slow, and not needed for patterns

    config = configs.check(configs.load(options.config, options.overrides["config"]))
    length = config.data.length if options.length is None else options.length
    model = config.model
    if options.receptive_field:
        return model.connectivity, length
    mixers = [model.layers[name].mixer for name in model.names]
    kinds = ["feed-forward" if mixer is None else mixer.summary.split()[0] for mixer in mixers]
    layers = zip(model.connectivity, kinds, strict=True)
    return draw.title_layers((name, kind, pattern) for (name, pattern), kind in layers), length


def _read_patterns(options: argparse.Namespace) -> tuple[list[tuple[str | None, patterns.Pattern]], int]:
    parsed = [patterns.parse(text, options.length) for text in options.patterns]
    length = max(map(default_length, parsed)) if options.length is None else options.length
    titles = options.patterns if options.receptive_field else [None] * len(parsed)
    return list(zip(titles, parsed, strict=True)), length
