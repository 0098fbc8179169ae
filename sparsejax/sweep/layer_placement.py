"""Schedules drawn in a search, where `trial` is Optuna's.

`key` prefixes the names of the parameters, so that a search can draw several schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparsejax.schedule import PLACEMENTS, place_layers, repeat_period

if TYPE_CHECKING:
    from optuna.trial import Trial


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
