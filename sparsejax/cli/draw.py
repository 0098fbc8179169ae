"""`sparsejax draw`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from sparsejax import draw, patterns
from sparsejax.cli.arguments import add_config, decode_text, parse_integer, read_file, split_values
from sparsejax.errors import InputError
from sparsejax.patterns.drawing import LOCAL, SELECTED, STATE, default_length

if TYPE_CHECKING:
    from sparsejax.config import ModelConfig
    from sparsejax.layers import LayerConfig, MixerConfig
    from sparsejax.loaded import LoadedModel
    from sparsejax.ops import Selection

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
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--data",
        metavar="FILE",
        help="with --config: draw which keys the queries of this text select, with the weights of the model, or random"
        " ones if it has none; --length keeps its first tokens",
    )
    text.add_argument("--prompt", metavar="TEXT", help="such a text instead of a file")
    integers = split_values(parse_integer)
    parser.add_argument("--layers", type=integers, metavar="N,N", help="layers of the config; all by default")
    parser.add_argument("--heads", type=integers, metavar="N,N", help="with a text: heads that select; all by default")


def run(options: argparse.Namespace, console: Console) -> None:
    """Draws patterns, the layers of a config, or the keys that they select on a text."""
    _check_options(options)
    if _has_text(options):
        _draw_text(options, console)
        return
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


def _has_text(options: argparse.Namespace) -> bool:
    return options.prompt is not None or options.data is not None


def _check_options(options: argparse.Namespace) -> None:
    """Raises InputError if an option needs another one, or cannot be combined with it."""
    for name in ("data", "prompt", "layers"):
        if getattr(options, name) is not None and not options.config:
            raise InputError(name, "needs --config")
    if options.heads is not None and not _has_text(options):
        raise InputError("heads", "needs --data or --prompt")
    for name in ("receptive_field", "titles"):
        if getattr(options, name) and _has_text(options):
            raise InputError(name, "cannot be combined with a text")
    if options.layers is not None and options.receptive_field:
        raise InputError("layers", "cannot be combined with --receptive-field, which is that of a stack of layers")


def _read_config(options: argparse.Namespace) -> tuple[list[draw.Subject], int]:
    from sparsejax import config as configs  # slow, and not needed for patterns

    config = configs.check(configs.load(options.config, options.overrides["config"]))
    length = config.data.length if options.length is None else options.length
    if options.receptive_field:
        return [draw.Subject(pattern, name) for name, pattern in config.model.connectivity], length
    return _draw_patterns(_list_layers(config.model, options.layers)), length


def _draw_text(options: argparse.Namespace, console: Console) -> None:
    """Draws the keys that queries of a text select, and the patterns of the mixers that do not select."""
    from sparsejax import config as configs

    text = options.prompt
    if text is None:
        content = read_file(options.data, "data")
        text = decode_text(content, "data", options.data)
    config = configs.check(configs.load(options.config, options.overrides["config"]))
    layers = _list_layers(config.model, options.layers)
    if not any(mixer is not None and mixer.selects for layer in layers for mixer in layer.mixers.values()):
        scope = "no layer" if options.layers is None else "none of these layers"
        raise InputError("config", f"{options.config}: {scope} selects keys; leave out the text to draw patterns")
    from sparsejax.init.model import start_model  # imports grain and Orbax

    model = start_model(config)
    tokens = _encode(model, text, options.length, "prompt" if options.data is None else "data")
    selections = model.selections(tokens)
    selected, patterns_left = [], []
    for layer in layers:
        chosen = {path: selection for path, selection in selections[layer.number].items() if path in layer.mixers}
        selected += [_describe_selection(layer, path, selection) for path, selection in chosen.items()]
        others = {path: mixer for path, mixer in layer.mixers.items() if path not in chosen}
        patterns_left.append(dataclasses.replace(layer, mixers=others))
    texts = [model.tokenizer.decode(tokens[i : i + 1]) for i in range(len(tokens))]
    subjects = _draw_patterns(patterns_left)
    draw.draw_selections(subjects, selected, texts, console, options.tile, options.out, options.heads or ())


def _encode(model: LoadedModel, text: str, length: int | None, argument: str) -> np.ndarray:
    """The tokens of a text, or the first `length` of them."""
    tokens = model.encode(text)
    if not len(tokens):
        raise InputError(argument, "is empty; pass at least one token")
    if length is not None:
        if not 1 <= length <= len(tokens):
            raise InputError("length", f"{length} is not between 1 and the {len(tokens)} tokens of the text")
        tokens = tokens[:length]
    if len(tokens) > draw.MAX_SELECTION:
        raise InputError("length", f"the text has {len(tokens)} tokens; draw at most the first {draw.MAX_SELECTION}")
    model.require_positions(len(tokens), "length")
    return tokens


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer: its number, its name, and what it reads through by the path in its section."""

    number: int
    name: str
    mixers: dict[str, MixerConfig | None]


def _list_layers(model: ModelConfig, numbers: Sequence[int] | None) -> list[_Layer]:
    """The chosen layers of a model, by default all of them."""
    count = len(model.names)
    for number in numbers or ():
        if not 0 <= number < count:
            raise InputError("layers", f"{number}: the model has layers 0 to {count - 1}")
    chosen = range(count) if numbers is None else sorted(set(numbers))
    return [_Layer(i, model.names[i], _list_mixers(model, model.layers[model.names[i]])) for i in chosen]


def _list_mixers(model: ModelConfig, layer: LayerConfig) -> dict[str, MixerConfig | None]:
    """What a layer reads through by path: its mixer or the branches of it, and a shared block."""
    from sparsejax.layers import ParallelConfig

    mixers: dict[str, MixerConfig | None] = {"mixer": layer.mixer}
    if isinstance(layer.mixer, ParallelConfig):
        branches = layer.mixer.branches.items()
        mixers = {f"mixer.branches.{name}.mixer": branch.mixer for name, branch in branches}
    if layer.side is not None:
        mixers["side"] = model.shared[layer.side.shared].mixer
    return mixers


def _draw_patterns(layers: Sequence[_Layer]) -> list[draw.Subject]:
    return draw.title_layers(
        (layer.number, layer.name, [_describe(mixer) for mixer in layer.mixers.values()]) for layer in layers
    )


def _describe_selection(layer: _Layer, path: str, selection: Selection) -> draw.Selected:
    """What a mixer selected of the first row."""
    mixer = layer.mixers[path]
    assert mixer is not None
    chosen, forced = (np.asarray(mask[0]) for mask in (selection.mask, selection.forced_mask))
    title = f"layer {layer.number}: {layer.name}"
    return draw.Selected(title, mixer.summary, mixer.connectivity, chosen, forced, getattr(mixer, "heads", len(chosen)))


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
