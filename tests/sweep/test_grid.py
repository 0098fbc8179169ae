import pytest

from sparsejax.sweep import SweepError, align, chain, grid, product, seeds
from sparsejax.sweep.grid import parse
from tests.messages import rejects

pytestmark = pytest.mark.quick


def test_grid_changes_the_last_key_fastest():
    assert grid({"a": [1, 2], "b": "xy"}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert grid({"a": []}) == []
    assert grid({}) == [{}]


def test_align():
    assert align({"a": [1, 2], "b": (i for i in (3, 4))}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with rejects(SweepError, "align"):
        align({"a": [1, 2], "b": [3]})


def test_chain_and_product():
    sizes, repetitions = grid({"a": [1, 2]}), seeds(2)
    assert chain(sizes, repetitions) == [{"a": 1}, {"a": 2}, {"train.seed": 0}, {"train.seed": 1}]
    assert product(sizes, repetitions) == grid({"a": [1, 2], "train.seed": [0, 1]})
    with rejects(SweepError, "product"):
        product(sizes, grid({"b": [1], "a": [1]}))


def test_text():
    text = """model.schedule=["4x(local full)", 'a;b']; seed=range(1, 3) ;train.bad=[None, True, 1e-3, (1, 2)];"""
    schedules, values = ["4x(local full)", "a;b"], [None, True, 1e-3, (1, 2)]
    assert parse(text) == grid({"model.schedule": schedules, "train.seed": [1, 2], "train.bad": values})
    assert parse("a=[[1, 2], {'b': 1}]") == [{"a": [1, 2]}, {"a": {"b": 1}}]


BAD = {
    "empty": "",
    "only_separators": " ; ",
    "no_values": "a",
    "no_key": "=[1]",
    "twice": "a=[1];a=[2]",
    "seed_twice": "seed=[1];train.seed=[2]",
    "number": "a=1",
    "text": "a='xyz'",
    "empty_list": "a=[]",
    "empty_range": "a=range(0)",
    "bracket": "a=[1",
    "call": "a=[open('f')]",
    "range_arguments": "a=range(1, 2, 3, 4)",
    "range_text": "a=range('x')",
    "range_keyword": "a=range(step=1)",
    "quote": "a=['x;b=[1]",
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_axes(case):
    with rejects(SweepError, "sweep"):
        parse(BAD[case])
