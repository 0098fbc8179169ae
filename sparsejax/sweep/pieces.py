"""Schedules put together from pieces: a period that repeats, or a few layers placed among the others.

`place_layers` and `repeat_period` serve any sweep; the functions that suggest draw from them in a search, where `trial`
is what Optuna gives. Each names what it draws after `key`, so that a search can draw several schedules.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparsejax import schedule
from sparsejax.sweep.axes import SweepError

if TYPE_CHECKING:
    from optuna.trial import Trial

PLACEMENTS = ("early", "late", "periodic", "first-middle-last")


def repeat_period(names: Sequence[str], layers: int) -> str:
    """A schedule of so many layers that repeats the names; the last time in part, where they do not divide."""
    return schedule.write(tuple(itertools.islice(itertools.cycle(names), layers)))


def place_layers(base: str, placed: str, layers: int, count: int, placement: str) -> str:
    """A schedule of so many layers: `count` of them are `placed`, the others `base`.

    Args:
      base: name of the other layers.
      placed: name of the placed ones.
      layers: how many there are in all.
      count: how many are placed.
      placement: "early" (the first ones), "late" (the last ones), "periodic" (each the last of an equal share of the
        layers), or "first-middle-last" (evenly from the first to the last; one alone is in the middle).

    Raises:
      SweepError: more are placed than there are layers, or an unknown placement.
    """
    if not 0 <= count <= layers or layers < 1:
        raise SweepError(f"place_layers: {count} of {layers} layers cannot be placed")
    if placement not in PLACEMENTS:
        raise SweepError(f"place_layers: placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    places = set(_find_places(layers, count, placement))
    return schedule.write(tuple(placed if place in places else base for place in range(layers)))


def _find_places(layers: int, count: int, placement: str) -> Iterable[int]:
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
    """A schedule of so many layers with a period of which each place is drawn from the names."""
    return repeat_period([trial.suggest_categorical(f"{key}.{place}", list(names)) for place in range(period)], layers)


def suggest_placement(
    trial: Trial,
    base: str,
    placed: str,
    layers: int,
    counts: Iterable[int],
    placements: Sequence[str] = PLACEMENTS,
    key: str = "schedule",
) -> str:
    """A schedule of so many layers: how many are placed, and where, is drawn; as in `place_layers`."""
    count = trial.suggest_categorical(f"{key}.count", list(counts))
    if count in (0, layers):  # they stand wherever they stand
        return place_layers(base, placed, layers, count, PLACEMENTS[0])
    return place_layers(base, placed, layers, count, trial.suggest_categorical(f"{key}.placement", list(placements)))
