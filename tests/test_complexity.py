"""The table of methods: formulas against counts, and fitted exponents against known ones."""

import dataclasses
import re
from pathlib import Path

import pytest

from sparsejax import complexity
from sparsejax.cli import main
from sparsejax.complexity import METHODS, Growth, fit_exponent, measure, tabulate

ROOT = Path(__file__).parent.parent
N = 4096
BY_NAME = {method.name: method for method in METHODS}


def evaluate(formula, n):
    """The value of a formula of the table."""
    text = (
        formula.partition(", and")[0].removeprefix("~").replace(",", "").replace("√n", "*n**0.5").replace("n²", "n**2")
    )
    text = re.sub(r"(?<=[\d)n]) ?(?=[n(])", "*", text.replace("·", "*")).replace("**0.5", "**0.5")
    return eval(text, {"n": n})


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_formula_equals_the_number_of_pairs(method):
    pairs = method.pairs(N)
    assert evaluate(method.formula, N) == (pytest.approx(pairs, rel=0.1) if method.formula[0] == "~" else pairs)


def test_the_table_relates_pairs_to_dense_causal_attention():
    heading, *rows = tabulate(N)
    assert heading[3] == "pairs, n = 4,096"
    cells = {row[0]: row[3:] for row in rows}
    assert set(cells) == set(BY_NAME)
    assert cells["dense"] == ("16,777,216", "2.00")
    assert cells["dense, causal"] == ("8,390,656", "1.00")
    assert cells["chunk"] == ("526,336", "1/15.94")
    assert cells["Reformer"] == ("2,097,152", "1/4.00")
    assert cells["SSM"] == cells["linear"] == ("0", "0.00")


def test_an_exponent_is_fitted():
    lengths = (10, 100, 1000)
    assert fit_exponent(lengths, [3 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    growth = {name: Growth(lengths, tuple(n**2.0 for n in lengths), lengths) for name in BY_NAME}
    assert all(row[-2:] == ("n^2.00", "n^1.00") for row in tabulate(N, growth)[1:])


@pytest.mark.parametrize(
    ("name", "shortest", "low", "high"),
    [
        ("dense", 1024, 1.9, 2.1),
        ("window", 8192, 0.5, 1.1),
        ("SSM", 4096, 0.9, 1.1),
        ("linear", 8192, 0.8, 1.1),
        ("Reformer", 1024, 0.9, 1.1),
        ("MoBA", 2048, 0.8, 1.1),
        pytest.param("NSA", 4096, 0.9, 1.1, marks=pytest.mark.nightly),
    ],
)
def test_memory_grows_as_it_should(name, shortest, low, high, monkeypatch):
    monkeypatch.setattr(complexity, "MIN_SECONDS", 0.0)
    growth = measure(dataclasses.replace(BY_NAME[name]), (shortest, 2 * shortest))
    assert low < growth.memory_exponent < high
    assert min(growth.seconds) > 0


def test_the_command_needs_no_config(capsys):
    assert main(["show", "--complexity", "--length=1000"]) == 0
    out = capsys.readouterr().out
    assert "pairs, n" in out
    assert "500,500" in out


def test_the_documentation_shows_what_was_recorded():
    assert (ROOT / "experiments" / "complexity" / "table.md").read_text() in (
        ROOT / "docs" / "reference" / "complexity.md"
    ).read_text()
