"""What a schedule is warned of, and what it is not."""

import pytest

from sparsejax.patterns import Pattern, lint_schedule, parse
from tests.patterns.test_receptive_field import Steps


def warnings(n, *layers):
    """The warnings about layers a, b, ...; equal patterns have equal names."""
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
def test_nothing_to_warn_of(n, layers):
    assert warnings(n, *layers) == []


def test_a_reach_shorter_than_the_sequence():
    assert warnings(131_072, *["causal & window(4095)"] * 32) == [
        "layers 0-31 (a): position 131,071 is reached by 131,041 of the 131,072 inputs that it could see;"
        " it takes 33 layers of this schedule"
    ]
    assert warnings(131_072, "causal & window(1)", "causal & window(2)") == [
        "layers 0-1 (a, b): position 131,071 is reached by 4 of the 131,072 inputs that it could see;"
        " 1,000 layers of this schedule are too few"
    ]


def test_a_last_position_of_its_own_kind_does_not_hide_the_others():
    (line,) = warnings(1000, "window(7, 7) | globals([-1])")
    assert line.startswith("layer 0 (a): position 500 is reached by 16 of the 1,000 inputs")


def test_multiples_of_one_stride_never_mix():
    short, mixed = warnings(256, Steps(3, 4), Steps(3, 8))
    assert short.endswith("position 255 is reached by 10 of the 256 inputs that it could see; and at any depth 64")
    assert mixed == (
        "layers 0-1 (a, b): position 255 is only ever reached from multiples of 4 away:"
        " positions of different residues never mix"
    )


def test_chunks_are_never_left():
    short, chunks, late = warnings(256, *["causal & chunk(16)"] * 4)
    assert short.endswith("is reached by 16 of the 256 inputs that it could see; and at no depth more")
    assert chunks == "layers 0-3 (a): none ever leaves its chunk, for position 255 tokens 240 to 255"
    assert late == "layers 1-3 (a): nothing new is seen: the same 16 inputs reach the last position without"


@pytest.mark.parametrize(
    "pattern",
    [
        "causal & (window(7) | globals(2))",
        "causal & (window(7) | globals([5, 200]) | sink(1))",
        "per_head(causal, causal & (chunk(8) | globals([-40])))",
    ],
)
def test_causal_globals_relay_nothing(pattern):
    lines = warnings(256, pattern, "causal", pattern)
    assert lines == [
        "layers 0, 2 (a): global tokens in a causal layer see only what is before them: they relay nothing of the rest"
    ]


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
def test_a_window_as_long_as_the_sequence_is_dense(pattern, text):
    assert warnings(256, pattern, "full") == [
        f"layer 0 (a): {text or pattern} leaves nothing out of 256 tokens: it is dense"
    ]
    assert warnings(257, pattern, "full") == [] or "300" in pattern or "255, 255" in pattern


def test_last_layers_that_see_nothing_new():
    assert warnings(256, *["causal & window(63)"] * 8) == [
        "layers 5-7 (a): nothing new is seen: all 256 inputs reach the last position without"
    ]
    lines = warnings(256, "causal & window(63)", *["causal & window(0)"] * 2)
    assert lines[-1] == "layers 1-2 (b): nothing new is seen: the same 64 inputs reach the last position without"
