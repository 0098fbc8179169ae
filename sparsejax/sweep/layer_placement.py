"""Schedules composed of layer names: a repeated period, or a few layers placed among others.

`place_layers` and `repeat_period` serve any sweep. The `suggest_` functions draw such schedules in a search, where
`trial` is Optuna's; `key` prefixes the names of their parameters, so that a search can draw several schedules.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparsejax import schedule
from sparsejax.sweep.grid import SweepError

if TYPE_CHECKING:
    from optuna.trial import Trial

PLACEMENTS = ("early", "late", "periodic", "first-middle-last")


def repeat_period(names: Sequence[str], layers: int) -> str:
    """Returns a schedule of `layers` layers that repeats the names, the last time in part if they do not divide."""
    return schedule.write(tuple(itertools.islice(itertools.cycle(names), layers)))


def place_layers(base: str, placed: str, layers: int, count: int, placement: str) -> str:
    """Returns a schedule with `count` layers named `placed` among layers named `base`.

    Args:
      base: Name of the other layers.
      placed: Name of the placed layers.
      layers: Number of layers.
      count: Number of placed layers.
      placement: "early" (first), "late" (last), "periodic" (each at the end of an equal share of the layers), or
        "first-middle-last" (evenly from the first to the last layer; a single one is in the middle).

    Raises:
      SweepError: `count` exceeds `layers`, or the placement is unknown.
    """
    if not 0 <= count <= layers or layers < 1:
        raise SweepError("place_layers", f"cannot place {count} layers among {layers}")
    if placement not in PLACEMENTS:
        raise SweepError("place_layers", f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    positions = set(_positions(layers, count, placement))
    return schedule.write(tuple(placed if position in positions else base for position in range(layers)))


def _positions(layers: int, count: int, placement: str) -> Iterable[int]:
    if placement == "early":
        return range(count)
    if placement == "late":
        return range(layers - count, layers)
    if placement == "periodic":
        return [(number + 1) * layers // count - 1 for number in range(count)]
    if count == 1:
        return [layers // 2]
    return [round(number * (layers - 1) / (count - 1)) for number in range(count)]


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
