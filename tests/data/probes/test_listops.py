"""ListOps: expressions are parsed and evaluated independently, and follow the grammar's distribution."""

import statistics

import numpy as np
import pytest

from sparsejax.data import DataError
from sparsejax.data.probes import ListOps
from sparsejax.errors import InputError
from tests.messages import rejects

pytestmark = pytest.mark.quick

SMALL = ListOps(length=4000, min_length=0, max_depth=4)


def expression(example):
    return example["inputs"][: int(np.flatnonzero(example["weights"])[0]) + 1].tolist()


def evaluate(tokens):
    """Value, depth and numbers of arguments of an expression, by a stack machine."""
    stack, deepest, arities = [[]], 1, []
    for token in tokens:
        if 10 <= token < 14:
            stack.append([token])
            deepest = max(deepest, len(stack))
        elif token == 14:
            operator, *values = stack.pop()
            arities.append(len(values))
            stack[-1].append(
                {
                    10: min(values),
                    11: max(values),
                    12: int(statistics.median(values)),
                    13: sum(values) % 10,
                }[operator]
            )
        else:
            stack[-1].append(token)
    [[value]] = stack
    return value, deepest, arities


@pytest.mark.parametrize("probe", [ListOps(), SMALL, ListOps(length=40, min_length=10, max_depth=5, max_args=4)])
def test_listops_answers_are_the_values(probe):
    for index in range(40):
        example = probe.example(0, index)
        tokens = expression(example)
        assert probe.min_length < len(tokens) < probe.length
        assert (example["inputs"][len(tokens) :] == 15).all()
        value, depth, arities = evaluate(tokens)
        assert example["targets"][len(tokens) - 1] == value
        assert depth <= probe.max_depth
        assert all(2 <= count <= probe.max_args for count in arities)


def test_listops_trees_follow_the_grammar():
    trees = [expression(SMALL.example(0, index)) for index in range(4000)]
    expected = 1.0  # tokens of a tree, from the deepest level up
    for _ in range(3):
        expected = 0.75 + 0.25 * (2 + 6 * expected)
    sizes = np.array([len(tree) for tree in trees])
    assert abs((sizes == 1).mean() - 0.75) < 0.025
    assert abs(sizes.mean() - expected) < 4 * sizes.std() / len(sizes) ** 0.5
    tokens = np.concatenate(trees)
    operators = np.bincount(tokens[(tokens >= 10) & (tokens < 14)] - 10)
    assert abs(operators / operators.sum() - 0.25).max() < 0.02
    digits = np.bincount(tokens[tokens < 10])
    assert abs(digits / digits.sum() - 0.1).max() < 0.01
    arities = np.bincount([count for tree in trees for count in evaluate(tree)[2]], minlength=11)[2:]
    assert abs(arities / arities.sum() - 1 / 9).max() < 0.02


def test_listops_answers_cover_all_digits():
    values = np.bincount([evaluate(expression(ListOps().example(1, i)))[0] for i in range(200)], minlength=10)
    assert (values > 0).all()


def test_listops_lengths_without_trees():
    # With two arguments at depth 2 there is one tree of 4 tokens, and none longer.
    with rejects(InputError, "min_length"):
        ListOps(length=100, min_length=4, max_depth=2, max_args=2)
    probe = ListOps(length=3 + 2, min_length=3, max_depth=2, max_args=2)
    assert len(expression(probe.example(0, 0))) == 4
    with rejects(DataError, "data.probe.min_length"):
        ListOps(length=4, min_length=2, max_depth=2, max_args=2).example(0, 0)
