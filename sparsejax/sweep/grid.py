"""The language of sweeps and searches: a sweep is a sequence of runs, and a run is a dict of overrides.

A key is a key of the configuration, such as "model.schedule", or "label", the name of the run in tables and figures.
Runs that differ only in `train.seed` share a label. The `suggest_` functions draw schedules in a search, where `trial`
is Optuna's; `key` prefixes the names of their parameters, so that a search can draw several schedules.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsejax.errors import InputError
from sparsejax.overrides import SEED, Overrides
from sparsejax.schedule import PLACEMENTS, place_layers, repeat_period

if TYPE_CHECKING:
    from optuna.trial import Trial


class SweepError(InputError):
    """A sweep or a search that cannot be run."""


def grid(axes: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """Returns every combination of the values of all keys; the last key varies fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def align(axes: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """Zips the values of all keys: run `i` has the i-th value of every key."""
    columns = {key: list(values) for key, values in axes.items()}
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise SweepError("align", f"all keys need the same number of values: {counts}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def chain(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Concatenates sweeps."""
    return list(itertools.chain(*sweeps))


def product(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Combines every run of each sweep with every run of the others; the last sweep varies fastest."""
    runs = []
    for parts in itertools.product(*sweeps):
        for first, second in itertools.combinations(parts, 2):
            if common := first.keys() & second.keys():
                raise SweepError("product", f"two of the sweeps set {min(common)}")
        runs.append({key: value for part in parts for key, value in part.items()})
    return runs


def seeds(count: int) -> list[Overrides]:
    """Returns a sweep over the seeds 0 to `count` - 1."""
    return grid({SEED: range(count)})


def parse(text: str) -> list[Overrides]:
    """Parses a grid such as `model.schedule=["4x(local full)","8x(local)"];seed=range(3)`.

    Values are a list or tuple of Python literals, or `range(...)`. `seed` stands for `train.seed`.
    """
    axes: dict[str, list[Any]] = {}
    for axis in filter(None, map(str.strip, _split(text))):
        key, equals, values = map(str.strip, axis.partition("="))
        key = SEED if key == "seed" else key
        if not equals or not key:
            raise SweepError("sweep", f"write KEY=[VALUE, ...], got {axis!r}")
        if key in axes:
            raise SweepError("sweep", f"{key} occurs twice")
        axes[key] = _read_values(key, values)
    if not axes:
        raise SweepError("sweep", "no runs")
    return grid(axes)


def _split(text: str) -> list[str]:
    """Splits at semicolons outside of strings."""
    return re.findall(r"""(?:[^;"']|"[^"]*(?:"|$)|'[^']*(?:'|$))+""", text)


def _read_values(key: str, text: str) -> list[Any]:
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "range":
            if tree.keywords:
                raise ValueError("range takes no keywords")
            values = range(*map(ast.literal_eval, tree.args))
        else:
            values = ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError):
        raise SweepError("sweep", f"{key}: needs a list of literals or range(...), got {text!r}") from None
    if not isinstance(values, list | tuple | range) or not values:
        raise SweepError("sweep", f"{key}: needs a list of values, got {text!r}")
    return list(values)


def suggest_period(trial: Trial, names: Sequence[str], layers: int, period: int, key: str = "schedule") -> str:
    """Draws a schedule with a period whose every layer is one of the names."""
    return repeat_period([trial.suggest_categorical(f"{key}.{i}", list(names)) for i in range(period)], layers)


def suggest_placement(
    trial: Trial,
    base: str,
    placed: str,
    layers: int,
    counts: Iterable[int],
    placements: Sequence[str] = PLACEMENTS,
    key: str = "schedule",
) -> str:
    """Draws count and placement of the placed layers, see `place_layers`."""
    count = trial.suggest_categorical(f"{key}.count", list(counts))
    if count in (0, layers):  # every placement is the same
        return place_layers(base, placed, layers, count, PLACEMENTS[0])
    return place_layers(base, placed, layers, count, trial.suggest_categorical(f"{key}.placement", list(placements)))
