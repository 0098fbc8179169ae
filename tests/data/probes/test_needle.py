"""Needles: located by a plain search."""

import numpy as np
import pytest

from sparsejax.data.probes import KeyValue, Passkey, grid

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "probe",
    [
        Passkey(length=100),
        Passkey(length=200, needles=8, names=8, haystack="random"),
        Passkey(length=36, needles=5, digits=5, depth=0.3),
    ],
)
def test_passkey_answer_is_the_number_after_the_name(probe):
    for index in range(100):
        example = probe.example(0, index)
        inputs = example["inputs"].tolist()
        question = len(inputs) - probe.digits
        assert inputs[question - 1] == probe.vocab - 1
        context = inputs[: question - 1]
        names = [token for token in context if 10 <= token < 10 + probe.names]
        assert len(names) == len(set(names)) == probe.needles
        start = context.index(inputs[question]) + 1
        number = context[start : start + probe.digits]
        assert max(number) < 10
        assert example["targets"].tolist() == [0] * question + number
        assert example["weights"].sum() == probe.digits
        assert inputs[question + 1 :] == number[:-1]
        assert set(example["distance"][question:].tolist()) == {question + 1 - start}
        filler = [token - 10 - probe.names for token in context if token >= 10 + probe.names]
        assert len(filler) == probe.hay
        if probe.haystack == "repeat":
            assert filler == [i % probe.fillers for i in range(probe.hay)]


@pytest.mark.parametrize(("depth", "before"), [(0.0, 0), (0.5, 44), (1.0, 88)])
def test_passkey_depth_is_the_filler_before_it(depth, before):
    for index in range(20):
        inputs = Passkey(length=100, depth=depth).example(0, index)["inputs"]
        assert np.flatnonzero(inputs[:-6] < 74)[0] == before


def test_passkey_random_depths_are_uniform():
    depths = [np.flatnonzero(Passkey(length=23).example(0, i)["inputs"] < 74)[0] for i in range(3000)]
    assert abs(np.bincount(depths, minlength=12) / 3000 - 1 / 12).max() < 0.02


def test_passkey_queries_every_needle_equally():
    ranks = []
    for index in range(2000):
        inputs = Passkey(length=60, needles=4, names=4).example(0, index)["inputs"]
        ranks.append([token for token in inputs[:-6] if 10 <= token < 14].index(inputs[-5]))
    assert abs(np.bincount(ranks) / 2000 - 0.25).max() < 0.05


def test_grid_is_every_length_at_every_depth():
    probes = grid(Passkey(digits=3), [50, 100], iter([0.0, 1.0]))
    assert list(probes) == [(50, 0.0), (50, 1.0), (100, 0.0), (100, 1.0)]
    assert probes[100, 1.0] == Passkey(length=100, digits=3, depth=1.0)


@pytest.mark.parametrize("probe", [KeyValue(pairs=20, digits=4), KeyValue(pairs=16, digits=1), KeyValue(query=3)])
def test_key_value_answer_is_the_value_of_the_key(probe):
    queries = []
    for index in range(60):
        example = probe.example(0, index)
        text = "".join("0123456789abcdef K:"[token + (token > 15)] for token in example["inputs"])
        *context, question = text.split("K")[1:]
        pairs = dict(pair.split(":") for pair in context)
        assert len(pairs) == probe.pairs
        key, prefix = question.split(":")
        targets = "".join("0123456789abcdef"[token] for token in example["targets"][example["weights"] == 1])
        assert targets == pairs[key]
        assert prefix == pairs[key][:-1]
        assert not example["weights"][: -probe.digits].any()
        queries.append(list(pairs).index(key))
    assert set(queries) == {3} if probe.query else len(set(queries)) > 10


def test_key_value_queries_distinct_pairs_after_the_first():
    probe, alone = KeyValue(pairs=5, digits=2, queries=5, query=1), KeyValue(pairs=5, digits=2, query=1)
    for index in range(20):
        example, single = probe.example(0, index), alone.example(0, index)
        assert np.array_equal(example["inputs"][: alone.length], single["inputs"])
        scored = np.flatnonzero(example["weights"])
        sources = scored - example["distance"][scored] + 1
        assert np.array_equal(example["inputs"][sources], example["targets"][scored])
        assert list(scored[:2]) == list(np.flatnonzero(single["weights"]))
        assert sorted(sources) == [start + 4 + digit for start in range(0, 30, 6) for digit in range(2)]
        followed = scored[scored + 1 < probe.length]
        assert np.array_equal(example["inputs"][followed + 1], example["targets"][followed])
        tokens = example["inputs"]
        for position, source in zip(scored[::2], sources[::2], strict=True):  # key, VALUE, answer
            assert np.array_equal(tokens[position - 2 : position], tokens[source - 3 : source - 1])
