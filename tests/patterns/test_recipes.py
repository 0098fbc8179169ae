"""Patterns by the name of a paper: what they say, and how many pairs they score."""

import numpy as np
import pytest

from sparsejax.patterns import PatternError, parse, recipes


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
def test_a_recipe_is_an_expression(pattern, text):
    assert pattern == parse(text)
    assert str(pattern) == text


@pytest.mark.parametrize("plan", ["uniform", "released"])
def test_bigbird_scores_eight_tiles_in_each_row(plan):
    pattern = recipes.bigbird(64, 3, seed=0, heads=2, plan=plan)
    n = 4096 // 64
    # The first and the last row see everything; the second and the last but one have one end in their window.
    rows = 2 * n + 2 * (4 + 3) + (n - 4) * (5 + 3)
    counts = [pattern.for_head(i).dense(4096)[::64, ::64].sum() for i in range(2)]
    if plan == "uniform":
        assert counts == [rows, rows]
        assert pattern.pairs(4096) == 2 * 64 * 64 * rows
    else:  # the released plan may draw what the row sees anyway
        assert all(rows - 12 <= count <= rows for count in counts)
    assert (pattern.dense(4096)[0] != pattern.dense(4096)[1]).any()


def test_bigbird_counts_as_the_released_code_does():
    n, r = 16, 3
    pattern = recipes.bigbird(4, r, seed=0, plan="evaluation", multiset=True)
    q, k = np.arange(0, 4 * n, 4)[:, None], np.arange(0, 4 * n, 4)[None]
    counts = pattern.counts(q, k, 4 * n, 4 * n)
    expected = np.zeros((n, n), int)
    expected[[0, -1]], expected[:, [0, -1]] = 1, 1
    for i in range(1, n - 1):
        expected[i, i - 1 : i + 2] = 1
    expected[1:-1, 0] = 1 + r  # every row but the ends has tile 0 once as a global one and r times "at random"
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(recipes.bigbird(4, r, seed=0, plan="evaluation").dense(4 * n), pattern.dense(4 * n))


def test_bigbird_with_extra_tokens_has_no_global_tile():
    mask = recipes.bigbird(4, 1, seed=0, extra=2).dense(64)
    assert mask[:2].all()
    assert mask[:, :2].all()
    assert not mask[-4:].all(1).any()


@pytest.mark.parametrize("plan", ["uniform", "released", "evaluation"])
def test_bigbird_may_draw_no_tiles(plan):
    known = parse("chunk(4) | shift(chunk(4), 4) | shift(chunk(4), -4) | globals(2)")
    assert recipes.bigbird(4, 0, seed=0, extra=2, plan=plan) == known


def test_a_plan_that_is_none_is_refused():
    with pytest.raises(PatternError, match="plan must be uniform, released or evaluation, got 'none'"):
        recipes.bigbird(4, 1, seed=0, plan="none")
