"""Recipes: their expressions, their text form and the pairs that they score."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.patterns import RECIPES, PatternError, parse, recipes
from tests.messages import rejects

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (recipes.longformer(256), "window(256, 256)"),
        (recipes.longformer(255, 0, ids=[0]), "window(255) | globals([0])"),
        (recipes.longformer(4, strides=(1, 2), ids=1), "per_head(window(4, 4), dilated(4, 4, stride=2)) | globals(1)"),
        (recipes.sparse_transformer_strided(8), "causal & (window(8) | strided(8))"),
        (recipes.sparse_transformer_strided(8, heads=2), "causal & per_head(window(8), strided(8))"),
        (recipes.sparse_transformer_fixed(8, 2), "causal & (chunk(8) | fixed(8, 2))"),
        (recipes.sparse_transformer_fixed(8, 2, heads=3), "causal & per_head(chunk(8), fixed(8, 2), chunk(8))"),
        (recipes.mistral(), "causal & window(4095)"),
        (recipes.streaming_llm(4, 1020), "causal & (window(1019) | sink(4))"),
        (recipes.llama4_local(), "causal & chunk(8192)"),
        (recipes.gemma_local(), "causal & window(1023)"),
        (recipes.gemma_global(), "causal"),
    ],
)
def test_recipes_are_expressions(pattern, text):
    assert pattern == parse(text)
    assert str(pattern) == text


@pytest.mark.parametrize("plan", ["uniform", "released"])
def test_bigbird_scores_eight_tiles_in_each_row(plan):
    pattern = recipes.bigbird(64, 3, seed=0, heads=2, plan=plan)
    n = 4096 // 64
    # The first and the last row are dense; the window of the second and the last but one contains one end.
    rows = 2 * n + 2 * (4 + 3) + (n - 4) * (5 + 3)
    layouts = pattern.layouts(4096, tile=(64, 64))
    counts = [len(layout.columns) for layout in layouts]
    if plan == "uniform":
        assert counts == [rows, rows]
        assert pattern.pairs(4096) == 2 * 64 * 64 * rows
    else:  # the released plan may draw tiles to which the row attends already
        assert all(rows - 12 <= count <= rows for count in counts)
    assert (layouts[0].dense() != layouts[1].dense()).any()


def test_bigbird_multiplicities_equal_those_of_the_released_code():
    n, r = 16, 3
    pattern = recipes.bigbird(4, r, seed=0, plan="evaluation", multiset=True)
    q, k = np.arange(0, 4 * n, 4)[:, None], np.arange(0, 4 * n, 4)[None]
    counts = pattern.counts(q, k, 4 * n, 4 * n)
    expected = np.zeros((n, n), int)
    expected[[0, -1]], expected[:, [0, -1]] = 1, 1
    for i in range(1, n - 1):
        expected[i, i - 1 : i + 2] = 1
    expected[1:-1, 0] = 1 + r  # every inner row has tile 0 once as a global tile and r times "at random"
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(recipes.bigbird(4, r, seed=0, plan="evaluation").dense(4 * n), pattern.dense(4 * n))


def test_bigbird_with_extra_tokens_has_no_global_tile():
    mask = recipes.bigbird(4, 1, seed=0, extra=2).dense(64)
    assert mask[:2].all()
    assert mask[:, :2].all()
    assert not mask[-4:].all(1).any()


@pytest.mark.parametrize("plan", ["uniform", "released", "evaluation"])
def test_bigbird_without_random_tiles(plan):
    expected = parse("chunk(4) | shift(chunk(4), 4) | shift(chunk(4), -4) | globals(2)")
    assert recipes.bigbird(4, 0, seed=0, extra=2, plan=plan) == expected


def test_an_unknown_plan_is_rejected():
    with rejects(PatternError, "bigbird.plan"):
        recipes.bigbird(4, 1, seed=0, plan="none")


# Arguments of any kind, valid or not.
VALUES = st.recursive(
    st.integers(-3, 9).map(str) | st.sampled_from(["causal", "true", "released", "uniform", "per_head(full, full)"]),
    lambda inner: st.lists(inner, max_size=3).map(lambda values: f"[{', '.join(values)}]"),
    max_leaves=6,
)


@pytest.mark.parametrize("name", RECIPES)
@given(data=st.data())
def test_any_arguments_parse_or_are_rejected(name, data):
    parameters = st.sampled_from(list(inspect.signature(RECIPES[name]).parameters) or ["w"])
    arguments = data.draw(st.dictionaries(parameters, VALUES, max_size=5))
    try:
        pattern = parse(f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})")
    except PatternError:
        return
    assert parse(str(pattern)) == pattern
