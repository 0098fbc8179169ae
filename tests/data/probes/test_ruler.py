"""The tasks of RULER: the answers found by a plain search."""

import collections

import numpy as np
import pytest

from sparsejax.data.probes import CommonWords, FrequentWords, Needles, Passkey, VariableTracking

pytestmark = pytest.mark.quick

EXAMPLES = 60


def read(probe, index):
    """Inputs and answers of an example; the answers that are inputs are in the inputs."""
    example = probe.example(0, index)
    inputs, scored = example["inputs"].tolist(), np.flatnonzero(example["weights"])
    answers = example["targets"][scored].tolist()
    for position, answer in zip(scored[:-1], answers[:-1], strict=True):
        assert inputs[position + 1] == answer or inputs[position + 1] == probe.vocab - 1
    return inputs, answers


@pytest.mark.parametrize(
    "probe",
    [
        Needles(length=100),
        Needles(length=60, keys=1, digits=3, haystack="repeat"),
        Needles(length=90, keys=3, values=3, digits=2),
        Needles(length=120, keys=5, values=2, queries=3, digits=2, depth=0.4),
    ],
)
def test_the_numbers_of_a_name(probe):
    for index in range(EXAMPLES):
        inputs, answers = read(probe, index)
        context = inputs[: inputs.index(probe.vocab - 1)]
        numbers = collections.defaultdict(list)
        for position, token in enumerate(context):
            if 10 <= token < 10 + probe.names:
                numbers[token] += context[position + 1 : position + 1 + probe.digits]
        assert len(numbers) == probe.keys
        asked = [inputs[i + 1] for i, token in enumerate(inputs) if token == probe.vocab - 1]
        assert len(set(asked)) == probe.queries
        assert answers == [digit for name in asked for digit in numbers[name]]
        assert sum(token >= 10 + probe.names for token in context) == probe.hay


def test_the_depth_of_a_needle():
    for depth, before in ((0.0, 0), (0.5, 44), (1.0, 88)):
        inputs = Needles(length=100, keys=1, depth=depth).example(0, 3)["inputs"]
        assert np.flatnonzero(inputs < 74)[0] == before
    single, passkey = (kind.example(0, 5)["inputs"] for kind in (Needles(100, 1), Passkey(100)))
    assert (single < 10).sum() == (passkey < 10).sum()


@pytest.mark.parametrize(
    "probe", [VariableTracking(length=100), VariableTracking(80, chains=4, hops=2), VariableTracking(40, hops=0)]
)
def test_the_variables_of_a_value(probe):
    for index in range(EXAMPLES):
        inputs, answers = read(probe, index)
        equals, question = probe.vocab - 2, inputs.index(probe.vocab - 1)
        values = {}
        for position, token in enumerate(inputs[:question]):
            if token == equals:
                name, assigned = inputs[position - 1], inputs[position + 1]
                assert name not in values
                values[name] = values.get(assigned, assigned)
        assert len(values) == probe.chains * (1 + probe.hops)
        assert answers == [name for name, value in values.items() if value == inputs[question + 1]]
        assert len(answers) == 1 + probe.hops


def test_the_common_words():
    for probe in (CommonWords(), CommonWords(length=64, common=4, repeats=5, rare=2, words=40)):
        for index in range(EXAMPLES // 4):
            inputs, answers = read(probe, index)
            counts = collections.Counter(inputs[: inputs.index(probe.vocab - 1)])
            assert answers == sorted(word for word, count in counts.items() if count > probe.rare)
            assert {counts[word] for word in answers} == {probe.repeats}
            assert len(answers) == probe.common
            assert sum(count < probe.rare for count in counts.values()) <= 1


def test_the_frequent_words():
    for probe in (FrequentWords(), FrequentWords(length=60, answers=2, alpha=1.5, words=20)):
        for index in range(EXAMPLES // 4):
            inputs, answers = read(probe, index)
            counts = collections.Counter(inputs[: inputs.index(probe.vocab - 1)])
            assert answers == [word for word, _ in counts.most_common(probe.answers)]
            frequencies = [count for _, count in counts.most_common(probe.answers + 1)]
            assert len(set(frequencies)) == probe.answers + 1
            assert counts[answers[0]] / counts[answers[1]] == pytest.approx(2**probe.alpha, rel=0.1)
