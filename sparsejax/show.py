"""What a configuration builds, layer by layer, what it costs and how far it sees; the table of methods."""

from __future__ import annotations

import functools
import itertools
import operator

from rich.console import Console
from rich.table import Table

from sparsejax import complexity, patterns
from sparsejax.account import Account, account_model
from sparsejax.config import Config, ConfigError, ModelConfig
from sparsejax.data import load_dataset, preview
from sparsejax.layers import LayerConfig


def show(model: ModelConfig, length: int, console: Console) -> None:
    """Prints one row for each layer of the schedule, with what it costs; then the schedule's reach and warnings.

    Args:
      model: the configuration.
      length: tokens of a sequence.
      console: where to print.

    Raises:
      ConfigError: a length below 1.
    """
    _require_length(length)
    layers, outside = account_model(model, length)
    total = functools.reduce(operator.add, layers, outside)
    sparse = total.active_parameters < total.parameters
    columns = ("parameters", *(("active",) if sparse else ()), "pairs", "FLOPs/token", "cache bytes", "live tiles")
    title = f"{model.schedule}, {length:,} tokens"
    table = Table("layer", "name", "mixer", "pattern", *columns, title=title)
    for column in table.columns[4:]:
        column.justify = "right"
    for number, (name, account) in enumerate(zip(model.names, layers, strict=True)):
        table.add_row(str(number), name, *_describe(model.layers[name]), *_numbers(account, sparse))
    table.add_row("", "embedding, norm, head", "", "", *_numbers(outside, sparse))
    table.add_section()
    table.add_row("", "total", "", "", *_numbers(total, sparse))
    console.print(table)
    _print(
        console,
        *(["active: parameters that serve one token, all but the experts that it did not choose"] if sparse else []),
        "pairs: (query, key) pairs scored, all heads, one sequence; FLOPs: forward, averaged over the sequence;"
        " cache: to decode one sequence of this length; live tiles: of all tiles of 128 x 128",
        f"one sequence: {total.sequence_flops:,.0f} FLOPs forward, {length * total.training_flops:,.0f} in training;"
        f" {total.score_bytes:,} bytes of scores if all are kept, in float32",
        describe_reach(model.sees, length),
        *(f"warning: {warning}" for warning in patterns.advise(model.sees, length)),
    )


def show_complexity(length: int | None, measured: bool, console: Console) -> None:
    """Prints how the cost of each method grows with the length.

    Args:
      length: tokens of a sequence, for the exact pairs; 131,072 if None.
      measured: also measure time and memory on this machine (minutes), and print the exponents.
      console: where to print.

    Raises:
      ConfigError: a length below 1.
    """
    length = complexity.TABLE_LENGTH if length is None else length
    _require_length(length)
    growth = {method.name: complexity.measure(method) for method in complexity.METHODS} if measured else None
    heading, *rows = complexity.tabulate(length, growth)
    table = Table(*heading)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
    _print(
        console,
        "pairs: one head, counted from the pattern; of dense causal: over the pairs of dense causal attention",
        *(["time, memory: forward and backward pass of one head, fitted on this machine"] if measured else []),
    )


def show_data(config: Config, examples: int, console: Console) -> None:
    """Prints what went into the data of a configuration and what came out, and its first training rows.

    Args:
      config: the configuration.
      examples: how many rows.
      console: where to print.

    Raises:
      DataError: the data cannot be read.
    """
    dataset = load_dataset(config.data, config.eval.stride)
    _print(console, *dataset.describe())
    if dataset.tokens_per_byte is not None:
        rates = f"{dataset.tokens_per_byte:.4f} tokens per byte, {dataset.tokens_per_character:.4f} per character"
        _print(console, f"tokenizer: {config.data.tokenizer}, {dataset.vocab:,} ids, {rates} of the validation text")
    _print(console, *preview(dataset, config.train.seed, examples))


def describe_reach(layers: list[tuple[str, patterns.Pattern]], length: int) -> str:
    """How many inputs the last position sees after each layer, in one line; layers of equal growth are taken together.

    Args:
      layers: name and pattern of each layer, in order.
      length: tokens of a sequence.
    """
    sizes = patterns.grow([pattern for _, pattern in layers], length).tolist()
    growth = [after - before for before, after in itertools.pairwise(sizes)]
    parts = []
    for more, run in itertools.groupby(range(len(growth)), key=growth.__getitem__):
        *others, last = run
        gain = f"+{more:,} a layer to " if others else ""
        parts.append(f"{gain}{sizes[last + 1]:,} after layer {last}" if more else f"no more up to layer {last}")
    return f"reach of the last position, of {length:,} inputs: {'; '.join(parts)}"


def _require_length(length: int) -> None:
    if length < 1:
        raise ConfigError(f"--length: must be at least 1, got {length}")


def _numbers(account: Account, active: bool) -> tuple[str, ...]:
    tiles = f"{account.live_tiles / account.tiles:.2%}" if account.tiles else "-"
    parameters = (account.parameters, account.active_parameters) if active else (account.parameters,)
    numbers = (*parameters, account.pairs, account.flops, account.cache_bytes)
    return *(f"{number:,.0f}" for number in numbers), tiles


def _describe(layer: LayerConfig) -> tuple[str, str]:
    if layer.mixer is None:
        return "-", "-"
    beside = "" if layer.side is None else f" + {layer.side.shared}"
    return f"{layer.mixer.summary}{beside}", getattr(layer.mixer, "pattern", "-")


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
