"""State tracking: the moves are made one by one on things that are really moved."""

import itertools

import numpy as np
import pytest

from sparsejax.data.probes import StateTracking


def parity_of(permutation):
    """1 for an odd one, by undoing it swap by swap."""
    order, swaps = list(permutation), 0
    for i in range(len(order)):
        while order[i] != i:
            j = order[i]
            order[i], order[j] = order[j], order[i]
            swaps += 1
    return swaps % 2


def elements(group, symbols):
    if group == "cyclic":
        return [tuple((i + turn) % symbols for i in range(symbols)) for turn in range(symbols)]
    return [p for p in itertools.permutations(range(symbols)) if group == "symmetric" or not parity_of(p)]


@pytest.mark.parametrize(
    ("group", "symbols", "order"),
    [("symmetric", 5, 120), ("symmetric", 3, 6), ("alternating", 5, 60), ("alternating", 3, 3), ("cyclic", 60, 60)],
)
def test_states_are_where_the_moves_lead(group, symbols, order):
    probe = StateTracking(length=40, group=group, symbols=symbols)
    moves = elements(group, symbols)
    assert probe.vocab == len(moves) == order
    for index in range(20):
        example = probe.example(0, index)
        things = list(range(symbols))  # where each thing is
        for token, state in zip(example["inputs"], example["targets"], strict=True):
            things = [moves[token][place] for place in things]
            assert moves[state] == tuple(things)
        assert example["weights"].all()


@pytest.mark.parametrize("group", ["cyclic", "symmetric"])
def test_two_symbols_are_parity(group):
    probe = StateTracking(length=100, group=group, symbols=2)
    example = probe.example(0, 0)
    np.testing.assert_array_equal(example["targets"], np.cumsum(example["inputs"]) % 2)
    assert probe.vocab == 2


def test_the_last_token_alone_can_be_scored():
    probe, all_scored = StateTracking(last_only=True), StateTracking()
    for index in range(5):
        one, other = probe.example(0, index), all_scored.example(0, index)
        assert one["weights"].tolist() == [0] * 63 + [1]
        assert one["targets"][-1] == other["targets"][-1]
        np.testing.assert_array_equal(one["inputs"], other["inputs"])


def test_moves_and_states_are_even():
    examples = [StateTracking(length=200).example(0, index) for index in range(100)]
    for key in ("inputs", "targets"):
        counts = np.bincount(np.concatenate([example[key] for example in examples]), minlength=120)
        assert np.square(counts - 20000 / 120).sum() / (20000 / 120) < 173.6  # chi-square, 119 degrees: p = 0.001
