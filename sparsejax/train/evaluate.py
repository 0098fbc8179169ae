"""Evaluation: loss in nats and bits per byte, and loss by position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np


class Evaluation(NamedTuple):
    """Result of an evaluation: mean loss in nats for each token, and by position [t] in nats."""

    loss: float
    by_position: np.ndarray
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits; a token is a byte."""
        return self.loss / math.log(2)

    def position_bins(self) -> list[tuple[int, int, float]]:
        """Mean bits per byte at positions `[start, stop)`, in bins that double: shows what context is used."""
        edges = [0, *(2**i for i in range(3, len(self.by_position).bit_length())), len(self.by_position)]
        edges = sorted({e for e in edges if e <= len(self.by_position)})
        return [
            (start, stop, float(self.by_position[start:stop].mean()) / math.log(2))
            for start, stop in itertools.pairwise(edges)
        ]


def evaluate(run: Callable[[Any, Any], tuple[Any, Any]], parameters: Any, batches: Iterable[Any]) -> Evaluation:
    """Sums `run(parameters, batch)`, losses and weights by position, over the batches."""
    losses, weights = 0.0, 0.0
    for batch in batches:
        loss, weight = run(parameters, batch)
        losses, weights = losses + np.asarray(loss, np.float64), weights + np.asarray(weight, np.float64)
    return Evaluation(float(losses.sum() / weights.sum()), losses / np.maximum(weights, 1), int(weights.sum()))
