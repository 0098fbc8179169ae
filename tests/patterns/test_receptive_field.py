"""Receptive fields by tiles, against paths followed pair by pair and against products of masks."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.patterns import Pattern, PatternError, parse, receptive_field
from sparsejax.patterns.spans import Bounds
from tests.messages import rejects
from tests.patterns import definition
from tests.patterns.strategies import patterns

pytestmark = pytest.mark.quick


@dataclasses.dataclass(frozen=True)
class Steps(Pattern):
    """A query attends to itself and to the `left` keys at 1, 2, ... times `stride` before it."""

    name = "steps"
    left: int
    stride: int

    def allows(self, q, k, t=None, s=None):
        return (k <= q) & (k >= q - self.left * self.stride) & ((q - k) % self.stride == 0)

    def bounds(self, grid):
        first, last = grid.row_bounds()
        live = grid.touched(first - self.left * self.stride, last + 1)
        none = grid.touched(first, first)
        return Bounds(none, live, none, none)

    def last_query(self, k):
        return k + self.left * self.stride

    def lookahead(self):
        return 0


def paths(layers, n, position):
    """Row l: the positions before layer l from which a path leads to `position`."""
    rows = [{position}]
    for layer in reversed(layers):
        mask = definition.mask(layer, n, n).reshape(-1, n, n).any(axis=0)
        rows.append(rows[-1] | {j for i in rows[-1] for j in range(n) if mask[i, j]})
    return np.array([[j in row for j in range(n)] for row in reversed(rows)])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_trace_agrees_with_paths_and_products(data):
    n = data.draw(st.integers(1, 20))
    layers = data.draw(st.lists(patterns(n), max_size=3))
    position = data.draw(st.integers(0, n - 1))
    trace = receptive_field.trace(layers, n, position)
    np.testing.assert_array_equal(trace, paths(layers, n, position))
    np.testing.assert_array_equal(trace[0], receptive_field.matrix(layers, n)[position])
    counts = [int(receptive_field.matrix(layers[:depth], n)[position].sum()) for depth in range(len(layers) + 1)]
    assert receptive_field.sizes(layers, n, position).tolist() == counts


MANY_TILES = [
    ["causal & (window(130) | sink(3))", "causal & chunk(100)", "causal & (window(1) | globals([200, -1]))"],
    ["window(3, 200)", "per_head(window(60, 2), chunk(150))", "globals([0, 400]) | window(1, 1)"],
    ["causal & window(5)", "causal", "causal & window(5)", "window(128)"],
]


@pytest.mark.parametrize("texts", MANY_TILES)
def test_tiles_are_refined_to_tokens(texts):
    n, layers = 555, [parse(text) for text in texts]
    reached = receptive_field.matrix(layers, n)
    for position in (0, 127, 128, 300, 554):
        np.testing.assert_array_equal(receptive_field.trace(layers, n, position)[0], reached[position])


# Computed by hand: layers, length, position, size of the receptive field.
GOLDENS = {
    "window: 4 * 7 + 1": (["causal & window(7)"] * 4, 256, 255, 29),
    "two-sided window: 4 * 8 + 1": (["window(4, 4)"] * 4, 256, 128, 33),
    "long window: 32 * 4095 + 1": (["causal & window(4095)"] * 32, 131_072, 131_071, 131_041),
    "multiples of 4": ([Steps(3, 4)] * 40, 256, 255, 64),
    "a chunk": (["causal & chunk(16)"] * 40, 256, 255, 16),
    "windows and one full layer": (["causal & window(7)"] * 5 + ["causal"], 256, 255, 256),
    # The two globals are the first two tokens and attend to one another only: the windows reach 8 * 7 + 1.
    "globals in a causal layer relay nothing": (["causal & (window(7) | globals(2))"] * 8, 256, 255, 2 + 57),
}


@pytest.mark.parametrize("case", GOLDENS)
def test_receptive_fields_by_hand(case):
    layers, n, position, expected = GOLDENS[case]
    layers = [parse(layer) if isinstance(layer, str) else layer for layer in layers]
    sizes = receptive_field.sizes(layers, n, position)
    assert sizes[-1] == expected == receptive_field.trace(layers, n, position)[0].sum()
    assert (np.diff(sizes) >= 0).all()


def test_long_stacks_take_seconds():
    start = time.process_time()
    sizes = receptive_field.sizes([parse("causal & window(4095)")] * 32, 131_072)
    assert sizes.tolist() == [4095 * depth + 1 for depth in range(33)]
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("texts", "n", "position", "expected"),
    [
        (["causal & window(7)"], 256, None, 37),  # 36 layers reach 36 * 7 + 1 = 253
        (["causal & window(4095)"] * 32, 131_072, None, 33),
        (["causal"], 256, None, 1),
        (["causal & window(2)", "causal & window(10)"], 100, None, 18),  # 17 layers reach 8 * 12 + 2 + 1 = 99
        (["causal & window(1)", "causal"], 100, None, 2),
        (["causal & window(1)"], 1, None, 0),
        (["causal & chunk(16)"], 256, None, None),
        (["causal & window(7)"], 256, 100, 15),  # nothing past position 100
        (["window(7, 7)"], 256, 255, 37),
        (["window(7, 7)"], 256, 127, 19),
    ],
)
def test_layers_to_cover(texts, n, position, expected):
    layers = [parse(text) for text in texts]
    assert receptive_field.layers_to_cover(layers, n, position) == expected
    if n <= 256:
        output = n - 1 if position is None else position
        products = enumerate(receptive_field.matrices((layers * 40)[:40], n))
        covered = (depth for depth, product in products if product[output, : output + 1].all())
        assert next(covered, None) == expected


def test_layers_to_cover_within_max_layers():
    assert receptive_field.layers_to_cover([parse("causal & window(7)")], 256, max_layers=36) is None
    assert receptive_field.layers_to_cover([parse("causal & window(7)")], 256, max_layers=37) == 37


def test_limit():
    reached, settled = receptive_field.limit([parse("causal & chunk(16)"), parse("causal & window(0)")], 100)
    assert settled
    assert np.flatnonzero(reached).tolist() == [96, 97, 98, 99]
    reached, settled = receptive_field.limit([parse("causal & window(1)")], 100, max_layers=10)
    assert (reached.sum(), settled) == (11, False)
    reached, settled = receptive_field.limit([Steps(2, 7)], 100, position=50)
    assert settled
    assert np.flatnonzero(reached).tolist() == list(range(1, 51, 7))


def test_unreachable_pairs():
    assert (
        receptive_field.unreachable_pairs([parse("causal & window(3)")] * 2, 10) == 3 * 4 // 2
    )  # the past except 6 tokens
    assert receptive_field.unreachable_pairs([parse("causal")], 10) == 0
    assert receptive_field.unreachable_pairs([parse("chunk(5)")], 10) == 2 * 25
    # When the others attend to the global token, it holds its own chunk only.
    assert receptive_field.unreachable_pairs([parse("chunk(5)"), parse("globals(1)")], 10) == 4 * 5
    assert receptive_field.unreachable_pairs([parse("globals(1)"), parse("globals(1)")], 10) == 0


def test_a_position_must_be_in_the_sequence():
    for name in ("trace", "sizes", "limit", "layers_to_cover"):
        with rejects(PatternError, "position"):
            getattr(receptive_field, name)([parse("causal")], 7, 7)
    with rejects(PatternError, "position"):
        receptive_field.trace([], 0)
