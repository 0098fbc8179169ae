"""What a configuration builds, layer by layer, and what it costs; nothing is trained."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from sparsejax.config import Config, ConfigError
from sparsejax.layers import AttentionConfig, LayerConfig
from sparsejax.model import Model


def show(config: Config, length: int | None, console: Console) -> None:
    """Prints one row for each layer of the schedule: mixer, pattern, parameters, pairs, FLOPs and cache.

    Args:
      config: the run.
      length: tokens of a sequence; `data.length` if None.
      console: where to print.
    """
    length = config.data.length if length is None else length
    if length < 1:
        raise ConfigError(f"--length: must be at least 1, got {length}")
    columns = ("layer", "name", "mixer", "pattern", "parameters", "pairs", "FLOPs/token", "cache bytes")
    table = Table(*columns, title=f"{config.model.schedule}, {length:,} tokens")
    for column in table.columns[4:]:
        column.justify = "right"
    # Unrolled, so that every layer of the schedule is a module of its own; built as shapes only.
    unrolled = dataclasses.replace(config.model, scan=False)
    model = nnx.eval_shape(lambda: Model(unrolled, nnx.Rngs(0)))
    totals = [0, 0, 0.0, 0]
    for number, (name, layer) in enumerate(zip(config.model.names, model.before, strict=True)):
        cost = layer.cost(length)
        cache = jax.eval_shape(lambda layer=layer: layer.init_cache(1, length))
        numbers = [_parameters(layer), cost.pairs, cost.flops, _bytes(cache)]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        table.add_row(str(number), name, *_describe(config.model.layers[name]), *(f"{n:,.0f}" for n in numbers))
    outside = _parameters(model) - totals[0]
    head = 2 * config.model.width * config.model.vocab
    table.add_row("", "embedding, norm, head", "", "", f"{outside:,}", "", f"{head:,}", "")
    table.add_section()
    totals[0], totals[2] = totals[0] + outside, totals[2] + head
    table.add_row("", "total", "", "", *(f"{n:,.0f}" for n in totals))
    console.print(table)
    console.print(
        "pairs: (query, key) pairs scored, all heads, one sequence; FLOPs: forward, averaged over the sequence;"
        " cache: to decode one sequence of this length",
        highlight=False,
    )


def _describe(layer: LayerConfig) -> tuple[str, str]:
    mixer = layer.mixer
    if isinstance(mixer, AttentionConfig):
        return f"attention {mixer.heads}/{mixer.kv_heads} x {mixer.head_width}", mixer.pattern
    return f"mamba {mixer.inner} x {mixer.state}", "-"


def _parameters(module: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _bytes(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
