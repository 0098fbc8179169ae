"""Descriptions: the layers of a model with their costs and receptive field, its data, and the growth of methods."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sparsejax import complexity, patterns
from sparsejax.account import Account, account_model, account_teacher
from sparsejax.config import Config, ModelConfig, ShardingConfig
from sparsejax.data import load_dataset, preview
from sparsejax.errors import InputError, argument_path
from sparsejax.layers import LayerConfig
from sparsejax.patterns.drawing import wrap_title

if TYPE_CHECKING:
    from sparsejax.runs.phases import Phase

TEXT_WIDTHS = (24, 16, 12, 8, 4)  # of columns of texts, the widest first


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
    rows = [
        (str(number), name, *_describe(model.layers[name]), *_numbers(account, sparse))
        for number, (name, account) in enumerate(zip(model.names, layers, strict=True))
    ]
    rows.append(("", "embedding, norm, head", "", "", *_numbers(outside, sparse)))
    rows.append(("", "total", "", "", *_numbers(total, sparse)))
    print_lines(console, f"{model.schedule}, {length:,} tokens")
    print_table(console, ("layer", "name", "mixer", "pattern", *columns), rows, texts=4, keys=2, total=True)
    print_lines(
        console,
        *(["active: parameters used by a token, without the experts that it does not select"] if sparse else []),
        "pairs: attended (query, key) pairs of one sequence, all heads; FLOPs: forward, averaged over the sequence;"
        " cache: to decode one sequence of this length; live tiles: fraction of all 128 x 128 tiles",
        f"one sequence: {total.sequence_flops:,.0f} FLOPs forward, {length * total.training_flops:,.0f} in training;"
        f" {total.score_bytes:,} bytes of scores in float32, if all are kept",
        *_describe_choice(total),
        describe_receptive_field(model.connectivity, length),
        *(f"warning: {warning}" for warning in patterns.lint_schedule(model.connectivity, length)),
    )


def show_exchange(model: ModelConfig, length: int, sharding: ShardingConfig, console: Console) -> None:
    """Prints what the shards of a sequence exchange in each layer, and how many bytes.

    Args:
      model: The model.
      length: Tokens per sequence.
      sharding: The mesh.
      console: Where to print.

    Raises:
      InputError: The sequence cannot be sharded.
    """
    shards = sharding.sequence
    sharding.check_length(length)
    with argument_path("model"):
        model.check_sharded(length, shards)
    from sparsejax.traffic import count_traffic

    traffic = count_traffic(model, length, shards)
    collectives = sorted({name for layer in traffic for name in layer.received})
    rows = [
        (
            str(number),
            name,
            layer.kind,
            *(f"{layer.received.get(kind, 0):,.0f}" for kind in collectives),
            f"{layer.total:,.0f}",
        )
        for number, (name, layer) in enumerate(zip(model.names, traffic, strict=True))
    ]
    sums = [sum(layer.received.get(kind, 0) for layer in traffic) for kind in collectives]
    rows.append(("", "total", "", *(f"{number:,.0f}" for number in (*sums, sum(sums)))))
    print_lines(console, f"exchange of {shards} shards of {length // shards:,} tokens")
    print_table(console, ("layer", "name", "exchange", *collectives, "bytes"), rows, texts=3, keys=2, total=True)
    print_lines(console, "bytes: received by a device per row and training step, forward and backward")


def show_teacher(phases: Sequence[Phase], console: Console) -> None:
    """Prints the cost of the teacher in each phase of a run that has one; reads no parameter.

    Raises:
      InputError: There is no such model, or it does not fit the configuration.
    """
    for phase in phases:
        section = phase.config.train.active_teacher
        if section is None:
            continue
        from sparsejax.loading import read_teacher  # imports grain and Orbax

        teacher = read_teacher(phase.config)
        assert teacher is not None
        prefix = "" if phase.name is None else f"phase {phase.name}: "
        print_lines(console, f"{prefix}teacher {section.source}: {account_teacher(phase.config, teacher)}")


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
    print_table(console, heading, rows, texts=3, keys=1)
    print_lines(
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
    print_lines(console, *dataset.describe())
    if dataset.tokens_per_byte is not None:
        rates = f"{dataset.tokens_per_byte:.4f} tokens per byte, {dataset.tokens_per_character:.4f} per character"
        print_lines(
            console, f"tokenizer: {config.data.tokenizer}, {dataset.vocab:,} ids, {rates} of the validation text"
        )
    print_lines(console, *preview(dataset, config.train.seed, examples))


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


def _describe_choice(total: Account) -> list[str]:
    """The part of the cost that is due to the choice of keys, if there is one, in a line."""
    if not (total.index_flops or total.loss_flops):
        return []
    return [
        f"choice of keys: {total.index_pairs:,} scored pairs, {total.index_flops:,.0f} FLOPs/token, "
        f"{total.index_bytes:,} cache bytes; losses: {total.loss_flops:,.0f} FLOPs/token in training"
    ]


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


def print_table(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int, keys: int, total: bool = False
) -> None:
    """Prints columns of texts and of numbers as a table that fits the console.

    Texts are wrapped and folded; numbers that do not fit follow in further tables, so that no digit is lost.

    Args:
      console: Where to print.
      headings: Names of the columns.
      rows: Cells.
      texts: Number of columns of texts, which come first.
      keys: Number of columns that every table repeats.
      total: Whether a line separates the last row.
    """
    columns = list(zip(*rows, strict=True))
    natural = [max(map(len, (*cells, *name.split()))) for name, cells in zip(headings, columns, strict=True)]
    numbers = range(texts, len(headings))
    widest = max(natural[number] for number in numbers)
    least, tables, shown = natural, [], list(range(texts))
    for limit in TEXT_WIDTHS:  # the widest texts at which a table with one column of numbers fits
        least = [min(width, limit) for width in natural[:texts]] + natural[texts:]
        if _table_width([*least[:texts], widest]) <= console.width:
            break
    for number in numbers:
        if _table_width([least[column] for column in (*shown, number)]) > console.width and len(shown) > keys:
            tables.append(shown)
            shown = list(range(keys))
        shown.append(number)
    for parts in [*tables, shown]:
        widths = [least[column] for column in parts]
        for i, column in enumerate(parts):
            widths[i] += max(0, min(natural[column] - widths[i], console.width - _table_width(widths)))
        table = Table()
        for width, column in zip(widths, parts, strict=True):
            table.add_column(
                headings[column], width=width, overflow="fold", justify="left" if column < texts else "right"
            )
        for number, row in enumerate(rows):
            cells = [_wrap_cell(row[column], width) for width, column in zip(widths, parts, strict=True)]
            table.add_row(*cells, end_section=total and number == len(rows) - 2)
        console.print(table, markup=False)


def _table_width(widths: Sequence[int]) -> int:
    """Width of a table with its lines and padding."""
    return sum(widths) + 3 * len(widths) + 1


def _wrap_cell(text: str, width: int) -> str:
    return text if len(text) <= width else "\n".join(wrap_title(text, width))


def print_lines(console: Console, *lines: str) -> None:
    """Prints lines as they are; the terminal wraps them."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
