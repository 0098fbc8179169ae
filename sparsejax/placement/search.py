"""Searches over placements: the choice of every layer, as an index into its choices. Nothing about models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Placement = tuple[int, ...]  # index of the choice of each layer
Score = Callable[[Sequence[Placement]], Sequence[float]]  # of several placements; lower is better


class Costs(NamedTuple):
    """Additive costs of the choices and their bound.

    Attributes:
      choices: Cost of each choice per layer, in ascending order.
      budget: Largest sum.
    """

    choices: Sequence[Sequence[float]]
    budget: float

    def total(self, placement: Placement) -> float:
        """The cost of a placement."""
        return sum(costs[choice] for costs, choice in zip(self.choices, placement, strict=True))

    def raises(self, placement: Placement) -> Iterator[Placement]:
        """The placements within the budget in which one layer has the next choice."""
        for layer, choice in enumerate(placement):
            if choice + 1 < len(self.choices[layer]):
                raised = (*placement[:layer], choice + 1, *placement[layer + 1 :])
                if self.total(raised) <= self.budget:
                    yield raised

    def placements(self) -> Iterator[Placement]:
        """All placements within the budget."""
        every = itertools.product(*(range(len(costs)) for costs in self.choices))
        return (placement for placement in every if self.total(placement) <= self.budget)


def search_beam(costs: Costs, score: Score, width: int) -> dict[Placement, float]:
    """Raises one layer at a time, from the first choice of every layer, and keeps the `width` best placements.

    A width of 1 is the greedy search. A search that keeps all placements of a step visits every placement.

    Returns:
      The visited placements with their scores, those of equal scores in the order of the choices.
    """
    visited: dict[Placement, float] = {}
    step = [(0,) * len(costs.choices)]
    while step:
        visited |= zip(step, score(step), strict=True)
        best = sorted(step, key=lambda placement: (visited[placement], placement))[:width]
        step = sorted({raised for placement in best for raised in costs.raises(placement)} - visited.keys())
    return visited


def search_all(costs: Costs, score: Score) -> dict[Placement, float]:
    """Visits all placements within the budget."""
    every = list(costs.placements())
    return dict(zip(every, score(every), strict=True))


def find_best(visited: dict[Placement, float]) -> Placement:
    """The placement of the least score; the first in the order of the choices among equals."""
    return min(visited, key=lambda placement: (visited[placement], placement))
