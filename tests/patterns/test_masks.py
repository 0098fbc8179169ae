"""Masks against pictures drawn by hand and against a second definition, pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas

from sparsejax.patterns import FOREVER, PatternError, parse
from sparsejax.patterns.library import NAMES
from tests.messages import rejects
from tests.patterns.definition import count, mask
from tests.patterns.strategies import LIBRARY, patterns

pytestmark = pytest.mark.quick

BY_HAND = {
    "full": """
        xxxx
        xxxx
        xxxx""",
    "causal": """
        x....
        xx...
        xxx..""",
    "window(1)": """
        x....
        xx...
        .xx..
        ..xx.
        ...xx
        ....x""",
    "window(0)": """
        x..
        .x.
        ..x""",
    "window(2, 1)": """
        xx...
        xxx..
        xxxx.
        .xxxx
        ..xxx""",
    "window(0, 2)": """
        xxx..
        .xxx.
        ..xxx
        ...xx""",
    "dilated(2, stride=2)": """
        x......
        .x.....
        x.x....
        .x.x...
        x.x.x..
        .x.x.x.""",
    "dilated(1, 2, stride=3)": """
        x..x..x
        .x..x..
        ..x..x.
        x..x..x
        .x..x..""",
    "strided(3)": """
        x..x..x
        .x..x..
        ..x..x.
        x..x..x""",
    # Sparse Transformer, figure 3: a row head and a column head, merged and separate.
    "causal & (window(2) | strided(3))": """
        x.....
        xx....
        xxx...
        xxxx..
        .xxxx.
        ..xxxx""",
    "fixed(3, 1)": """
        ..x..x.
        ..x..x.
        ..x..x.""",
    "fixed(4, 2)": """
        ..xx..xx.
        ..xx..xx.""",
    "causal & (chunk(3) | fixed(3, 1))": """
        x.....
        xx....
        xxx...
        ..xx..
        ..xxx.
        ..xxxx""",
    "prefix(2)": """
        xx...
        xx...
        .....""",
    "causal | prefix(3)": """
        xxx..
        xxx..
        xxx..
        xxxx.
        xxxxx""",
    "global_keys([0, -1])": """
        x...x
        x...x""",
    "global_queries([0, -1])": """
        xxx
        ...
        ...
        xxx""",
    "tiles([[0, 1, 3], [0, 1, 2], [1, 2, 3], [0, 2, 3]])": """
        xxxx..xx
        xxxx..xx
        xxxxxx..
        xxxxxx..
        ..xxxxxx
        ..xxxxxx
        xx..xxxx
        xx..xxxx""",
    "tiles([[1], [], [0, 2]], tile=2)": """
        ..xx..
        ..xx..
        ......
        ......
        xx..xx
        xx..xx
        ......""",
    "causal - window(1)": """
        .....
        .....
        x....
        xx...
        xxx..""",
    "shift(causal, 1)": """
        ....
        x...
        xx..
        xxx.""",
    "shift(window(1), -2)": """
        ..x...
        ..xx..
        ...xx.
        ....xx
        .....x""",
    "shift(sink(3), 1)": """
        xx..
        xx..""",
    "shift(global_keys([-1]), 1)": """
        ..x.
        ..x.""",
    "shift(full, 2)": """
        xx..
        xx..""",
    "chunk(2)": """
        xx...
        xx...
        ..xx.
        ..xx.
        ....x""",
    "chunk(3)": """
        xxx..
        xxx..
        xxx..
        ...xx""",
    "sink(2)": """
        xx...
        xx...
        xx...""",
    "globals(2)": """
        xxxxx
        xxxxx
        xx...
        xx...""",
    "globals(-2)": """
        ...xx
        ...xx
        xxxxx
        xxxxx""",
    "globals([1, 3])": """
        .x.x.
        xxxxx
        .x.x.
        xxxxx
        .x.x.""",
    # The last query is row 3, the last key is column 4: each side counts from its own end.
    "globals([-1])": """
        ....x
        ....x
        ....x
        xxxxx""",
    "globals([-9, 9])": """
        ...
        ...""",
    "globals([])": """
        ...
        ...""",
    "causal & (window(1) | sink(1))": """
        x....
        xx...
        xxx..
        x.xx.
        x..xx""",
    "window(0) | causal & chunk(2) & sink(3)": """
        x...
        xx..
        ..x.
        ..xx""",
}


def drawn(picture: str) -> np.ndarray:
    return np.array([[mark == "x" for mark in row] for row in picture.split()])


@pytest.mark.parametrize("text", BY_HAND)
def test_mask_drawn_by_hand(text):
    expected = drawn(BY_HAND[text])
    np.testing.assert_array_equal(parse(text).dense(*expected.shape), expected)
    np.testing.assert_array_equal(mask(parse(text), *expected.shape), expected)


def test_mask_with_heads_drawn_by_hand():
    pattern = parse("per_head(window(0), sink(1)) | per_head(globals([2]), full) & causal")
    first = drawn("x.. .x. xxx")
    second = drawn("x.. xx. xxx")
    np.testing.assert_array_equal(pattern.dense(3), [first, second])


def test_every_pattern_is_drawn_and_generated():
    assert set(LIBRARY) == set(NAMES) - {"shift"}
    drawn_elsewhere = {"random", "bigbird_random"}
    assert {text.partition("(")[0] for text in BY_HAND} | drawn_elsewhere >= set(NAMES)


def test_random_draws_are_uniform_and_reproducible():
    draw = "random(3, tile=2, seed={}, apart=2, ends=1)"
    mask = parse(draw.format(7)).dense(48)
    tiles = mask.reshape(24, 2, 24, 2)
    np.testing.assert_array_equal(tiles.any((1, 3)), tiles.all((1, 3)))
    tiles = tiles.all((1, 3))
    assert (tiles.sum(1) == 3).all()
    assert not tiles[:, [0, -1]].any()
    assert not (tiles & (abs(np.subtract.outer(np.arange(24), np.arange(24))) < 2)).any()
    # Over many seeds each of the 19 candidates of row 11 is drawn equally often, 3 at a time.
    row = np.mean([parse(draw.format(seed)).dense(48)[22].reshape(24, 2)[:, 0] for seed in range(2000)], axis=0)
    candidates = [column for column in range(1, 23) if abs(column - 11) >= 2]
    assert row.nonzero()[0].tolist() == candidates
    np.testing.assert_allclose(row[candidates], 3 / 19, atol=4 * (3 / 19 * 16 / 19 / 2000) ** 0.5)
    # The same draw in every version and on every machine.
    assert [np.flatnonzero(line).tolist() for line in tiles[:3]] == [[11, 18, 20], [18, 19, 21], [13, 17, 20]]
    other = [parse(f"random(3, tile=2, seed=7, apart=2, ends=1, {key}=1)").dense(48) for key in ("layer", "head")]
    assert not any((mask == other_mask).all() for other_mask in other)


@given(patterns(longest=9), st.integers(0, 14), st.integers(0, 14))
def test_dense_is_the_definition_pair_by_pair(pattern, t, s):
    np.testing.assert_array_equal(pattern.dense(t, s), mask(pattern, t, s))


@given(patterns(longest=9), st.integers(1, 12), st.integers(1, 12))
def test_counts_are_the_definition_pair_by_pair(pattern, t, s):
    q, k = np.arange(t)[:, None], np.arange(s)[None, :]
    expected = [
        [[count(pattern, i, j, t, s, head) for j in range(s)] for i in range(t)] for head in range(pattern.heads or 1)
    ]
    counts = np.broadcast_to(pattern.counts(q, k, t, s), mask(pattern, t, s).shape)
    np.testing.assert_array_equal(counts, expected if pattern.heads else expected[0])


# Lengths are fixed and examples few because each example is compiled.
@settings(max_examples=25)
@given(patterns(longest=60))
def test_allows_agrees_between_numpy_and_compiled_jax(pattern):
    t, s = 45, 64
    q, k = np.arange(t)[:, None], np.arange(s)[None, :]
    compiled = jax.jit(lambda q, k: pattern.allows(q, k, t, s))
    actual = compiled(jnp.asarray(q), jnp.asarray(k))
    assert actual.dtype == np.bool_
    np.testing.assert_array_equal(actual, pattern.allows(q, k, t, s))
    # One query at a time, as in decoding.
    np.testing.assert_array_equal(compiled(jnp.int32(17), jnp.arange(s)), pattern.dense(t, s)[..., 17, :])


@pytest.mark.parametrize("text", [*BY_HAND, "per_head(window(3), globals([-1, 2])) & causal"])
def test_allows_inside_a_kernel(text):
    pattern, t, s = parse(text), 16, 24
    heads = () if pattern.heads is None else (pattern.heads,)

    def kernel(out):
        q = jax.lax.broadcasted_iota(jnp.int32, (t, s), 0)
        k = jax.lax.broadcasted_iota(jnp.int32, (t, s), 1)
        out[...] = pattern.allows(q, k, t, s)

    shape = jax.ShapeDtypeStruct((*heads, t, s), jnp.bool_)
    actual = pallas.pallas_call(kernel, out_shape=shape, interpret=True)()
    np.testing.assert_array_equal(actual, pattern.dense(t, s))


def test_positions_from_the_end_require_the_lengths():
    pattern = parse("causal | globals([0, -1])")
    with rejects(PatternError, "globals([-1, 0])"):
        pattern.allows(np.arange(3), np.arange(3))
    np.testing.assert_array_equal(parse("globals([0, 2])").allows(1, np.arange(3)), [True, False, True])


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**63 - 1, 2**63])
@pytest.mark.parametrize(
    "form", ["window({0})", "window(0, {0})", "chunk({0})", "sink({0})", "globals([{0}])", "globals([-{0}])"]
)
def test_huge_numbers_work_or_are_rejected(form, number):
    try:
        pattern = parse(form.format(number))
    except PatternError:
        return
    expected = mask(pattern, 5, 5)
    np.testing.assert_array_equal(pattern.dense(5), expected)
    assert pattern.pairs(5) == expected.sum()
    # Positions in a compiled program are int32, where overflow is silent.
    compiled = jax.jit(lambda q, k: pattern.allows(q[:, None], k, 5, 5))
    np.testing.assert_array_equal(compiled(jnp.arange(5), jnp.arange(5)), expected)
    assert (pattern.last_query(np.arange(5)) >= -1).all()


@pytest.mark.parametrize(
    ("text", "lookahead", "last_query"),
    [
        ("causal", 0, [FOREVER] * 4),
        ("window(2, 1)", 1, [2, 3, 4, 5]),
        ("causal & window(2, 1)", 0, [2, 3, 4, 5]),
        ("window(1) | window(0, 5)", 5, [1, 2, 3, 4]),
        ("chunk(3)", 2, [2, 2, 2, 5]),
        ("causal & (window(1) | sink(2))", 0, [FOREVER, FOREVER, 3, 4]),
        ("per_head(window(3), window(0, 2))", 2, [3, 4, 5, 6]),
    ],
)
def test_lookahead_and_last_query_are_tight(text, lookahead, last_query):
    assert parse(text).lookahead() == lookahead
    np.testing.assert_array_equal(parse(text).last_query(np.arange(4)), last_query)
