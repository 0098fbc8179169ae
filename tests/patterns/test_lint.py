"""Warnings about schedules."""

import pytest

from sparsejax.patterns import Pattern, lint_schedule, parse
from tests.messages import check_message
from tests.patterns.test_receptive_field import Steps

pytestmark = pytest.mark.quick


def warnings(n, *layers):
    """The warnings about layers named a, b, ...; equal patterns have equal names."""
    patterns = [layer if isinstance(layer, Pattern) else parse(layer) for layer in layers]
    names = {pattern: "abcdef"[number] for number, pattern in enumerate(dict.fromkeys(patterns))}
    return lint_schedule([(names[pattern], pattern) for pattern in patterns], n)


QUIET = [
    (256, ["causal"] * 3),
    (256, ["full"] * 2),
    (256, ["causal & window(63)"] * 4 + ["causal"]),
    (256, ["causal", "causal & window(63)", "causal & window(63)"]),
    (253, ["causal & window(63)"] * 4),
    (1000, ["window(7, 7) | globals(2)"] * 2),
    (1000, ["causal & (window(7) | sink(4))", "causal"]),
    (256, [Steps(63, 4), "causal & window(3)"]),
    (100, ["chunk(25)", "globals([3, 50])", "full"]),
    (1, ["causal & window(7)"]),
    (0, ["causal & window(7)"]),
    (256, []),
]


@pytest.mark.parametrize(("n", "layers"), QUIET)
def test_schedules_without_warnings(n, layers):
    assert warnings(n, *layers) == []


SCHEDULES = {
    "short": (131_072, ["causal & window(4095)"] * 32, ["0-31 (a)", "131,071", "131,041", "33"]),
    "too deep": (131_072, ["causal & window(1)", "causal & window(2)"], ["0-1 (a, b)", "131,071", "receives 4 of"]),
    "special last": (1000, ["window(7, 7) | globals([-1])"], ["layer 0 (a)", "500", "16", "1,000"]),
    "strides": (256, [Steps(3, 4), Steps(3, 8)], ["255", "receives 10 of 256", "64"]),
    "chunks": (256, ["causal & chunk(16)"] * 4, ["255", "receives 16 of 256"]),
    "redundant": (256, ["causal & window(63)"] * 8, ["layers 5-7 (a)", "all 256"]),
    "narrow": (256, ["causal & window(63)", "causal & window(0)", "causal & window(0)"], ["receives 64 of 256"]),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_receptive_fields(case):
    n, layers, parts = SCHEDULES[case]
    lines = warnings(n, *layers)
    for part in parts:
        assert part in lines[0]
    for line in lines:
        check_message(line)


def test_closed_sets():
    _, mixed = warnings(256, Steps(3, 4), Steps(3, 8))
    assert "multiples of 4;" in mixed
    _, chunks, redundant = warnings(256, *["causal & chunk(16)"] * 4)
    assert "layers 0-3 (a)" in chunks
    assert "240 to 255" in chunks
    assert "layers 1-3 (a)" in redundant
    assert "16 inputs" in redundant


@pytest.mark.parametrize(
    "pattern",
    [
        "causal & (window(7) | globals(2))",
        "causal & (window(7) | globals([5, 200]) | sink(1))",
        "per_head(causal, causal & (chunk(8) | globals([-40])))",
    ],
)
def test_causal_globals(pattern):
    (line,) = warnings(256, pattern, "causal", pattern)
    assert line.startswith("layers 0, 2 (a): ")
    check_message(line)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("causal & window(255)", None),
        ("causal & (window(300) | sink(4))", None),
        ("window(255, 255)", None),
        ("chunk(256)", None),
        ("per_head(causal & window(300), causal & window(3))", "causal & window(300)"),
    ],
)
def test_dense_layers(pattern, text):
    (line,) = warnings(256, pattern, "full")
    assert line.startswith(f"layer 0 (a): {text or pattern} ")
    assert "256" in line
    assert warnings(257, pattern, "full") == [] or "300" in pattern or "255, 255" in pattern
