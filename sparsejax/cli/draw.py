"""`sparsejax draw`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from rich.console import Console

from sparsejax import draw, patterns
from sparsejax.cli.arguments import add_config
from sparsejax.errors import InputError
from sparsejax.patterns.drawing import LOCAL, SELECTED, STATE, default_length

if TYPE_CHECKING:
    from sparsejax.config import ModelConfig
    from sparsejax.layers import LayerConfig, MixerConfig

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
        "--tile", type=int, metavar="N", help="tokens per cell; defaults to what fits the terminal or 256 cells"
    )
    parser.add_argument("--out", metavar="FILE", help=".png or .svg file; defaults to the terminal")
    parser.add_argument("--titles", metavar="A,B", help="titles of the patterns, separated by commas")


def run(options: argparse.Namespace, console: Console) -> None:
    """Draws patterns, or the layers of a config."""
    subjects, length = _read_config(options) if options.config else _read_patterns(options)
    if options.titles is not None:
        titles = [title.strip() for title in options.titles.split(",")]
        if len(titles) != len(subjects):
            raise InputError("titles", f"{len(titles)} titles, separated by commas, for {len(subjects)} patterns")
        subjects = [
            dataclasses.replace(subject, title=title, describe=False)
            for title, subject in zip(titles, subjects, strict=True)
        ]
    draw_subjects = draw.draw_receptive_field if options.receptive_field else draw.draw
    draw_subjects(subjects, length, console, options.tile, options.out)


def _read_config(options: argparse.Namespace) -> tuple[list[draw.Subject], int]:
    from sparsejax import config as configs  # slow, and not needed for patterns

    config = configs.check(configs.load(options.config, options.overrides["config"]))
    length = config.data.length if options.length is None else options.length
    model = config.model
    if options.receptive_field:
        return [draw.Subject(pattern, name) for name, pattern in model.connectivity], length
    layers = [(name, _list_mixers(model, model.layers[name])) for name in model.names]
    return draw.title_layers(layers), length


def _list_mixers(model: ModelConfig, layer: LayerConfig) -> list[draw.Part]:
    """What a layer reads through: its mixer or the branches of it, and a shared block."""
    from sparsejax.layers import ParallelConfig

    mixers: list[MixerConfig | None] = [layer.mixer]
    if isinstance(layer.mixer, ParallelConfig):
        mixers = [branch.mixer for branch in layer.mixer.branches.values()]
    if layer.side is not None:
        mixers.append(model.shared[layer.side.shared].mixer)
    return [_describe(mixer) for mixer in mixers]


def _describe(mixer: MixerConfig | None) -> draw.Part:
    """The kind of a mixer, what it reads, and how."""
    if mixer is None:
        return draw.Part("feed-forward", patterns.Window(0), LOCAL)
    kind, pattern = mixer.summary.split()[0], mixer.connectivity
    if mixer.selects:
        return draw.Part(kind, pattern, SELECTED)
    if hasattr(mixer, "pattern"):
        return draw.Part(kind, pattern)
    return draw.Part(kind, pattern, STATE if isinstance(pattern, patterns.Causal | patterns.Full) else LOCAL)


def _read_patterns(options: argparse.Namespace) -> tuple[list[draw.Subject], int]:
    parsed = [patterns.parse(text, options.length) for text in options.patterns]
    length = max(map(default_length, parsed)) if options.length is None else options.length
    titles = options.patterns if options.receptive_field else [None] * len(parsed)
    return [draw.Subject(pattern, title) for title, pattern in zip(titles, parsed, strict=True)], length
