"""The language of sweeps: a sweep is a sequence of runs, a run is a dict of overrides.

A key is that of a config, such as "model.schedule", or "label": what tables and figures call the run. Runs that differ
in `train.seed` alone share a label.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

Overrides = dict[str, Any]
LABEL, SEED = "label", "train.seed"


class SweepError(ValueError):
    """A sweep that cannot be run; the message is one line."""


def grid(axes: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """Every combination of the values of all keys; the last key changes fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def align(axes: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """The first values of all keys, then the second ones, and so on: as many runs as each key has values."""
    columns = {key: list(values) for key, values in axes.items()}
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SweepError(f"align: keys must have as many values: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def chain(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """The runs of one sweep after those of another."""
    return list(itertools.chain(*sweeps))


def product(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Each run of the first sweep with each of the second, and so on; the last sweep changes fastest."""
    runs = []
    for parts in itertools.product(*sweeps):
        twice = [key for a, b in itertools.combinations(parts, 2) for key in a.keys() & b.keys()]
        if twice:
            raise SweepError(f"product: {min(twice)} is set by two of the sweeps")
        runs.append({key: value for part in parts for key, value in part.items()})
    return runs


def seeds(count: int) -> list[Overrides]:
    """The seeds 0 to `count` - 1 as a sweep."""
    return grid({SEED: range(count)})


def parse(text: str) -> list[Overrides]:
    """The grid of a text such as `model.schedule=["4x(local full)","8x(local)"];seed=range(3)`.

    Values are a list or tuple of Python literals, or `range(...)`; `seed` is short for `train.seed`.
    """
    axes = {}
    for part in filter(None, (part.strip() for part in _split(text))):
        key, equals, values = (piece.strip() for piece in part.partition("="))
        key = SEED if key == "seed" else key
        if not equals or not key:
            raise SweepError(f"--sweep: write KEY=[VALUE, ...], got {part!r}")
        if key in axes:
            raise SweepError(f"--sweep: {key} is given twice")
        axes[key] = _read_values(key, values)
    if not axes:
        raise SweepError("--sweep: no runs")
    return grid(axes)


def _split(text: str) -> list[str]:
    """The parts between semicolons that stand in no string."""
    parts, quote = [""], None
    for letter in text:
        if letter in "\"'":
            quote = None if quote == letter else quote or letter
        if letter == ";" and quote is None:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _read_values(key: str, text: str) -> list[Any]:
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "range":
            if tree.keywords:
                raise ValueError("range takes no keywords")
            values = range(*(ast.literal_eval(one) for one in tree.args))
        else:
            values = ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError) as error:
        raise SweepError(f"--sweep: {key}: a list of literals or range(...), got {text!r}: {error}") from None
    if not isinstance(values, list | tuple | range) or not values:
        raise SweepError(f"--sweep: {key}: needs a list of values, got {text!r}")
    return list(values)
