"""Recall: pairs are looked up independently, and gaps follow their power law."""

import numpy as np
import pytest

from sparsejax.data.probes import InductionHeads, Mqar

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("probe", [Mqar(), Mqar(length=256, pairs=64), Mqar(length=40, pairs=3, vocab=50)])
def test_mqar_answers_are_the_values_of_the_keys(probe):
    half = probe.vocab // 2
    for index in range(50):
        example = probe.example(1, index)
        inputs = example["inputs"].tolist()
        context, queries = inputs[: 2 * probe.pairs], inputs[2 * probe.pairs :]
        pairs = dict(zip(context[::2], context[1::2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == probe.pairs
        assert all(0 < key < half <= value < probe.vocab for key, value in pairs.items())
        assert sorted(token for token in queries if token) == sorted(pairs)
        assert not any(queries[1::2])
        for i, token in enumerate(inputs):
            query = token != 0 and i >= 2 * probe.pairs
            assert example["weights"][i] == query
            if query:
                assert example["targets"][i] == pairs[token]
                assert example["distance"][i] == i - inputs.index(token)


def test_mqar_gaps_follow_the_power_law():
    probe = Mqar(length=20, pairs=2, vocab=64, gap_power=0.3)
    counts = np.zeros(8)
    for index in range(8000):
        inputs = probe.example(0, index)["inputs"]
        counts[np.flatnonzero(inputs[4::2] == inputs[0])[0]] += 1
    law = np.arange(1, 9) ** (0.3 - 1)
    law /= law.sum()
    assert (np.square(counts - 8000 * law) / (8000 * law)).sum() < 24.3  # chi-square, 7 degrees: p = 0.001


def test_mqar_gaps_of_the_second_key_are_drawn_without_replacement():
    probe = Mqar(length=14, pairs=2, vocab=64, gap_power=0.5)
    counts = np.zeros((5, 5))
    for index in range(8000):
        inputs = probe.example(0, index)["inputs"]
        first, second = (np.flatnonzero(inputs[4::2] == inputs[key])[0] for key in (0, 2))
        counts[first, second] += 1
    law = np.arange(1, 6) ** (0.5 - 1)
    law /= law.sum()
    joint = law[:, None] * law / (1 - law[:, None]) * (1 - np.eye(5))
    assert not np.diag(counts).any()
    seen = joint > 0
    assert (np.square(counts - 8000 * joint)[seen] / (8000 * joint[seen])).sum() < 43.8  # 19 degrees: p = 0.001


def test_mqar_gaps_equal_the_weighted_draws_of_numpy():
    rng, law = np.random.default_rng(0), np.arange(1, 29) ** (0.01 - 1)
    drawn = [2 * rng.choice(28, 4, replace=False, p=law / law.sum()) + 8 - 2 * np.arange(4) for _ in range(3000)]
    actual = [(d := Mqar().example(0, index)["distance"])[d > 0] for index in range(3000)]
    for bound in (9, 17, 33):
        expected_share, share = (np.mean(np.concatenate(distances) < bound) for distances in (drawn, actual))
        assert abs(expected_share - share) < 0.02
    assert np.mean(np.concatenate(actual) <= 16) > 0.55  # the share of queries that a window of 16 solves


def test_mqar_random_non_queries_fill_the_blanks_only():
    plain, filled = Mqar(vocab=128), Mqar(vocab=128, random_non_queries=True)
    blanks = []
    for index in range(200):
        blank, random = plain.example(2, index), filled.example(2, index)
        kept = blank["inputs"] != 0
        np.testing.assert_array_equal(blank["inputs"][kept], random["inputs"][kept])
        for key in ("targets", "weights", "distance"):
            np.testing.assert_array_equal(blank[key], random[key])
        blanks.append(random["inputs"][~kept])
    blanks = np.concatenate(blanks)
    assert set(blanks.tolist()) == set(range(128))
    assert abs(blanks.mean() - 63.5) < 1.5


def test_induction_heads_answer_follows_the_trigger():
    probe = InductionHeads(length=40)
    counts = np.zeros(40, int)
    for index in range(2000):
        example = probe.example(0, index)
        inputs = example["inputs"].tolist()
        trigger = inputs.index(15)
        assert inputs.count(15) == 2
        assert inputs[-1] == 15
        assert example["targets"][-1] == inputs[trigger + 1]
        assert example["weights"].sum() == 1
        assert example["distance"][-1] == 39 - trigger
        counts[trigger] += 1
    assert (counts[:38] > 20).all()
    assert not counts[38:].any()
