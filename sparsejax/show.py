"""Descriptions: the layers of a model with their costs and receptive field, its data, and the growth of methods."""

from __future__ import annotations

import functools
import itertools
import operator

from rich.console import Console
from rich.table import Table

from sparsejax import complexity, patterns
from sparsejax.account import Account, account_model
from sparsejax.config import Config, ModelConfig
from sparsejax.data import load_dataset, preview
from sparsejax.errors import InputError
from sparsejax.layers import LayerConfig


def show(model: ModelConfig, length: int, console: Console) -> None:
    """Prints a row per layer of the schedule with its costs, then the receptive field and warnings.

    Args:
      model: The model.
      length: Tokens per sequence.
      console: Where to print.

    Raises:
      InputError: The length is below 1.
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
        *(["active: parameters used by a token, without the experts that it does not select"] if sparse else []),
        "pairs: scored (query, key) pairs of one sequence, all heads; FLOPs: forward, averaged over the sequence;"
        " cache: to decode one sequence of this length; live tiles: fraction of all 128 x 128 tiles",
        f"one sequence: {total.sequence_flops:,.0f} FLOPs forward, {length * total.training_flops:,.0f} in training;"
        f" {total.score_bytes:,} bytes of scores in float32, if all are kept",
        describe_receptive_field(model.connectivity, length),
        *(f"warning: {warning}" for warning in patterns.lint_schedule(model.connectivity, length)),
    )


def show_complexity(length: int | None, measured: bool, console: Console) -> None:
    """Prints how the cost of each method grows with the length.

    Args:
      length: Tokens per sequence at which pairs are counted; defaults to 131,072.
      measured: Whether to measure time and memory on this machine, for minutes, and print their exponents.
      console: Where to print.

    Raises:
      InputError: The length is below 1.
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
        "pairs: of one head, counted from the pattern; of dense causal: relative to dense causal attention",
        *(["time, memory: forward and backward pass of one head, fitted on this machine"] if measured else []),
    )


def show_data(config: Config, examples: int, console: Console) -> None:
    """Prints the counts of the data of a configuration and its first training rows.

    Args:
      config: The configuration.
      examples: Number of rows.
      console: Where to print.

    Raises:
      DataError: The data cannot be read.
    """
    dataset = load_dataset(config.data, config.eval.stride)
    dataset.require_vocabulary(config.model.vocab)
    _print(console, *dataset.describe())
    if dataset.tokens_per_byte is not None:
        rates = f"{dataset.tokens_per_byte:.4f} tokens per byte, {dataset.tokens_per_character:.4f} per character"
        _print(console, f"tokenizer: {config.data.tokenizer}, {dataset.vocab:,} ids, {rates} of the validation text")
    _print(console, *preview(dataset, config.train.seed, examples))


def describe_receptive_field(layers: list[tuple[str, patterns.Pattern]], length: int) -> str:
    """Describes in one line how the receptive field of the last position grows; equal growth is summarized.

    Args:
      layers: Name and pattern of each layer, in order.
      length: Tokens per sequence.
    """
    sizes = patterns.receptive_field.sizes([pattern for _, pattern in layers], length).tolist()
    growth = [after - before for before, after in itertools.pairwise(sizes)]
    stretches = []
    for gain, run in itertools.groupby(range(len(growth)), key=growth.__getitem__):
        *others, last = run
        if gain:
            stretches.append(f"{f'+{gain:,} per layer to ' if others else ''}{sizes[last + 1]:,} after layer {last}")
        else:
            stretches.append(f"unchanged up to layer {last}")
    return f"receptive field of the last position, of {length:,} inputs: {'; '.join(stretches)}"


def _require_length(length: int) -> None:
    if length < 1:
        raise InputError("length", f"{length} is below 1")


def _numbers(account: Account, active: bool) -> tuple[str, ...]:
    tiles = f"{account.live_tiles / account.tiles:.2%}" if account.tiles else "-"
    parameters = (account.parameters, account.active_parameters) if active else (account.parameters,)
    numbers = (*parameters, account.pairs, account.flops, account.cache_bytes)
    return *(f"{number:,.0f}" for number in numbers), tiles


def _describe(layer: LayerConfig) -> tuple[str, str]:
    if layer.mixer is None:
        return "-", "-"
    side = "" if layer.side is None else f" + {layer.side.shared}"
    return f"{layer.mixer.summary}{side}", str(getattr(layer.mixer, "pattern", "-"))


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
