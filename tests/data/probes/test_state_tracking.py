"""State tracking: permutations are applied one by one to a list of symbols."""

import itertools

import numpy as np
import pytest

from sparsejax.data.probes import StateTracking

pytestmark = pytest.mark.quick


def parity_of(permutation):
    """1 if the permutation is odd, by sorting it with swaps."""
    order, swaps = list(permutation), 0
    for i in range(len(order)):
        while order[i] != i:
            j = order[i]
            order[i], order[j] = order[j], order[i]
            swaps += 1
    return swaps % 2


def elements(group, symbols):
    if group == "cyclic":
        return [tuple((i + shift) % symbols for i in range(symbols)) for shift in range(symbols)]
    return [p for p in itertools.permutations(range(symbols)) if group == "symmetric" or not parity_of(p)]


@pytest.mark.parametrize(
    ("group", "symbols", "order"),
    [("symmetric", 5, 120), ("symmetric", 3, 6), ("alternating", 5, 60), ("alternating", 3, 3), ("cyclic", 60, 60)],
)
def test_states_are_products(group, symbols, order):
    probe = StateTracking(length=40, group=group, symbols=symbols)
    permutations = elements(group, symbols)
    assert probe.vocab == len(permutations) == order
    for index in range(20):
        example = probe.example(0, index)
        slots = list(range(symbols))  # slot of each symbol
        for token, state in zip(example["inputs"], example["targets"], strict=True):
            slots = [permutations[token][slot] for slot in slots]
            assert permutations[state] == tuple(slots)
        assert example["weights"].all()


@pytest.mark.parametrize("group", ["cyclic", "symmetric"])
def test_two_symbols_are_parity(group):
    probe = StateTracking(length=100, group=group, symbols=2)
    example = probe.example(0, 0)
    np.testing.assert_array_equal(example["targets"], np.cumsum(example["inputs"]) % 2)
    assert probe.vocab == 2


def test_last_only_scores_the_last_token():
    probe, all_scored = StateTracking(last_only=True), StateTracking()
    for index in range(5):
        example, reference = probe.example(0, index), all_scored.example(0, index)
        assert example["weights"].tolist() == [0] * 63 + [1]
        assert example["targets"][-1] == reference["targets"][-1]
        np.testing.assert_array_equal(example["inputs"], reference["inputs"])


def test_inputs_and_states_are_uniform():
    examples = [StateTracking(length=200).example(0, index) for index in range(100)]
    for key in ("inputs", "targets"):
        counts = np.bincount(np.concatenate([example[key] for example in examples]), minlength=120)
        assert np.square(counts - 20000 / 120).sum() / (20000 / 120) < 173.6  # chi-square, 119 degrees: p = 0.001
