import pytest

from sparsejax.sweep import SweepError, align, chain, grid, product, seeds
from sparsejax.sweep.axes import parse


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
    with pytest.raises(SweepError, match=r"as many values: a 2, b 1"):
        align({"a": [1, 2], "b": [3]})


def test_chain_and_product():
    one, two = grid({"a": [1, 2]}), seeds(2)
    assert chain(one, two) == [{"a": 1}, {"a": 2}, {"train.seed": 0}, {"train.seed": 1}]
    assert product(one, two) == grid({"a": [1, 2], "train.seed": [0, 1]})
    with pytest.raises(SweepError, match="a is set by two"):
        product(one, grid({"b": [1], "a": [1]}))


def test_text():
    text = """model.schedule=["4x(local full)", 'a;b']; seed=range(1, 3) ;train.bad=[None, True, 1e-3, (1, 2)];"""
    schedules, values = ["4x(local full)", "a;b"], [None, True, 1e-3, (1, 2)]
    assert parse(text) == grid({"model.schedule": schedules, "train.seed": [1, 2], "train.bad": values})
    assert parse("a=[[1, 2], {'b': 1}]") == [{"a": [1, 2]}, {"a": {"b": 1}}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no runs"),
        (" ; ", "no runs"),
        ("a", r"write KEY=\[VALUE, ...\], got 'a'"),
        ("=[1]", "write KEY="),
        ("a=[1];a=[2]", "a is given twice"),
        ("seed=[1];train.seed=[2]", "train.seed is given twice"),
        ("a=1", "a: needs a list of values, got '1'"),
        ("a='xyz'", "a: needs a list of values"),
        ("a=[]", "a: needs a list of values"),
        ("a=range(0)", "a: needs a list of values"),
        ("a=[1", "a: a list of literals or range"),
        ("a=[open('f')]", "a: a list of literals or range"),
        ("a=range(1, 2, 3, 4)", "a: a list of literals or range"),
        ("a=range('x')", "a: a list of literals or range"),
        ("a=range(step=1)", "a: a list of literals or range"),
        ("a=['x;b=[1]", "a: a list of literals or range"),
    ],
)
def test_text_that_cannot_be_read(text, message):
    with pytest.raises(SweepError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)
