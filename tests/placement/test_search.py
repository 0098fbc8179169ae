"""Searches over placements of made-up costs and scores."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.placement.search import Costs, find_best, search_all, search_beam

pytestmark = pytest.mark.quick


def draw_score(seed, layers):
    """A score with interactions between two layers."""
    draw = np.random.default_rng(seed)
    single, double = draw.normal(size=layers), draw.normal(size=(layers, layers)) * 0.3

    def score(placements):
        return [float(single @ np.array(p) + np.array(p) @ double @ np.array(p)) for p in placements]

    return score


@given(st.integers(0, 999), st.integers(1, 6), st.floats(0, 6))
def test_a_wide_beam_visits_what_all_visits(seed, layers, budget):
    costs = Costs([[0.0, 1.0, 1.5]] * layers, budget)
    score = draw_score(seed, layers)
    every = search_all(costs, score)
    assert search_beam(costs, score, width=3**layers) == every
    best = min(
        (p for p in itertools.product(range(3), repeat=layers) if sum([0, 1, 1.5][c] for c in p) <= budget),
        key=lambda p: (score([p])[0], p),
    )
    assert find_best(every) == best


@given(st.integers(0, 999), st.integers(2, 8), st.integers(1, 4), st.integers(1, 3))
def test_a_beam_stays_within_the_budget_and_finds_sums_exactly(seed, layers, budget, width):
    gains = np.random.default_rng(seed).uniform(0.1, 1, layers)
    costs = Costs([[2.0, 3.0]] * layers, 2.0 * layers + budget)
    visited = search_beam(costs, lambda placements: [-float(gains @ np.array(p)) for p in placements], width)
    assert max(map(costs.total, visited)) <= costs.budget
    best = find_best(visited)
    assert set(np.flatnonzero(best)) == set(np.argsort(-gains)[: min(budget, layers)])


def test_equal_scores_prefer_the_cheaper_choice():
    costs = Costs([[0.0, 1.0]] * 3, 3.0)
    assert find_best(search_beam(costs, lambda placements: [0.0] * len(placements), 2)) == (0, 0, 0)
