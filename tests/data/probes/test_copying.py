"""Copying: the targets repeat the input in order."""

import numpy as np
import pytest

from sparsejax.data.probes import Duplication, SelectiveCopying

pytestmark = pytest.mark.quick


def test_selective_copying_answers_are_the_data_in_order():
    probe = SelectiveCopying(length=40, tokens=6, vocab=9)
    positions, symbols = np.zeros(34), np.zeros(9)
    for index in range(2000):
        example = probe.example(0, index)
        inputs = example["inputs"].tolist()
        data = [token for token in inputs[:34] if token]
        assert len(data) == 6
        assert inputs[34:] == [8] * 6
        assert example["targets"].tolist() == [0] * 34 + data
        assert example["weights"].tolist() == [0] * 34 + [1] * 6
        positions += np.array(inputs[:34]) > 0
        symbols += np.bincount(data, minlength=9)
    assert abs(positions / 2000 - 6 / 34).max() < 0.04
    assert abs(symbols[1:8] / 12000 - 1 / 7).max() < 0.015
    assert symbols[0] == symbols[8] == 0


def test_selective_copying_without_noise():
    example = SelectiveCopying(length=10, tokens=5).example(0, 0)
    np.testing.assert_array_equal(example["inputs"][:5], example["targets"][5:])


def test_duplication_repeats_the_word():
    probe = Duplication(length=64, vocab=5)
    words = []
    for index in range(200):
        example = probe.example(0, index)
        inputs = example["inputs"]
        assert inputs[0] == inputs[32] == 0
        np.testing.assert_array_equal(inputs[1:32], inputs[33:])
        np.testing.assert_array_equal(example["targets"][32:63], inputs[33:])
        assert example["weights"].tolist() == [0] * 32 + [1] * 31 + [0]
        assert set(example["distance"][32:63].tolist()) == {32}
        words.append(inputs[1:32])
    assert abs(np.bincount(np.concatenate(words), minlength=5)[1:] / 6200 - 0.25).max() < 0.03
    assert np.min(words) == 1
