"""Schedules: parsing, errors and the fold with the fewest layers to compile."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsejax import schedule
from sparsejax.schedule import Fold, ScheduleError
from tests.messages import rejects

pytestmark = pytest.mark.quick

GOOD = {
    "a": "a",
    "  a  b ": "a b",
    "a b a": "a b a",
    "1x(a)": "a",
    "3x(a b) c": "a b a b a b c",
    "3x( a b )c": "a b a b a b c",
    "2x(a 2x(b c) d)": "a b c b c d a b c b c d",
    "2x(2x(2x(a)))": "a a a a a a a a",
    "2x(a)2x(b)": "a a b b",
    "\ta\nb": "a b",
    "2x(x) x2": "x x x2",
    "10x(a)": "a " * 10,
    "_local Full full": "_local Full full",
}
BAD = {
    "": None,
    "  \t": None,
    ")": 1,
    "a )": 3,
    "2x(a)) b": 6,
    "2x(": 1,
    "a 2x(b 3x(c)": 3,
    "a 12x(b 3x(c": 9,
    "a 3x()": 3,
    "2x(a 3x( ))": 6,
    "a  0x(b)": 4,
    "a, b": 2,
    "a  - b": 4,
    "(a b)": 1,
    "a(b)": 2,
    "3 x(a)": 1,
    "3x (a)": 1,
    "a 3*(b)": 3,
    "-1x(a)": 1,
    "2x(a.b)": 5,
}  # the column of the error


@pytest.mark.parametrize(("text", "names"), GOOD.items())
def test_parses(text, names):
    assert schedule.parse(text) == tuple(names.split())


@pytest.mark.parametrize(("text", "column"), BAD.items())
def test_malformed_text_is_rejected_at_the_column(text, column):
    with rejects(ScheduleError, f"schedule: {text!r}" + (f": column {column}: " if column else "")):
        schedule.parse(text)


def repeat(count, parts):
    texts, names = zip(*parts, strict=True)
    return f"{count}x({' '.join(texts)})", [name for part in names for name in part] * count


@given(
    st.recursive(
        st.sampled_from(["a", "b", "x"]).map(lambda name: (name, [name])),
        lambda inner: st.builds(repeat, st.integers(1, 3), st.lists(inner, min_size=1, max_size=3)),
        max_leaves=8,
    )
)
def test_repeats_are_expanded(built):
    text, names = built
    assert schedule.parse(text) == tuple(names)


@given(st.text("ab3x() \t", max_size=12))
def test_any_text_parses_or_is_rejected(text):
    try:
        names = schedule.parse(text)
    except ScheduleError as error:
        message = str(error)
    else:
        message = schedule.write(names)
        assert schedule.parse(message) == names
    assert len(message.splitlines()) == 1


def test_check_names_the_undefined_layer():
    assert schedule.check("2x(ssm local) full", ["full", "local", "ssm", "unused"]) == ("ssm", "local") * 2 + ("full",)
    with rejects(ScheduleError, "column 8: ") as caught:
        schedule.check("2x(ssm loca ssm) full", {"local": 1, "ssm": 2, "full": 3})
    assert "'local'" in str(caught.value)


def test_check_points_at_the_whole_word():
    with rejects(ScheduleError, "column 9: layer 'loc'"):
        schedule.check("local x loc", ["local", "x"])


def test_check_without_any_layer_defined():
    with rejects(ScheduleError, "column 1: layer 'a'"):
        schedule.check("a", [])


def test_check_points_at_the_name_and_not_at_a_repeat():
    with rejects(ScheduleError, "column 9: layer 'x'"):
        schedule.check("2x(a) y x", ["a", "y"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", "", 0, "")),
        ("a b", ("a b", "", 0, "")),
        ("a a", ("", "a", 2, "")),
        ("3x(a a b) c", ("", "a a b", 3, "c")),
        ("a 2x(b c)", ("a", "b c", 2, "")),
        ("c 12x(a) b", ("c", "a", 12, "b")),
        ("2x(ssm local) full", ("", "ssm local", 2, "full")),
        ("2x(a b) a c", ("", "a b", 2, "a c")),
        ("a b c a b d", ("a b c a b d", "", 0, "")),
        ("2x(2x(a b) c)", ("", "a b a b c", 2, "")),
        ("7x(a) b 7x(a) b", ("", " ".join("aaaaaaab"), 2, "")),
    ],
)
def test_folds(text, expected):
    before, period, repeats, after = expected
    fold = schedule.fold(schedule.parse(text))
    assert fold == Fold(*(tuple(part.split()) for part in (before, period)), repeats, tuple(after.split()))


@settings(max_examples=300)
@given(st.lists(st.sampled_from("abc"), max_size=12) | st.lists(st.sampled_from("ab"), max_size=16))
@example(list("ab" * 4 + "a"))
def test_fold_is_the_schedule_and_compiles_the_fewest_layers(names):
    names = tuple(names)
    before, period, repeats, after = schedule.fold(names)
    assert before + period * repeats + after == names
    assert (repeats >= 2 and period) or (repeats, period, after) == (0, (), ())
    assert len(before) + len(period) + len(after) == fewest(names)


def fewest(names):
    """The smallest number of layers if one repeated stretch is counted once, by trying all."""
    n = len(names)
    return min(
        [n]
        + [
            n - (repeats - 1) * width
            for width in range(1, n)
            for repeats in range(2, n // width + 1)
            for start in range(n - width * repeats + 1)
            if names[start : start + width] * repeats == names[start : start + width * repeats]
        ]
    )


@pytest.mark.parametrize(
    "text",
    ["10000000000000x(local)", f"{'9' * 5000}x(local)", "32x(32x(local) local)", "local " * 1025, "1000x(100x(a b)"],
)
def test_layers_are_counted_before_they_are_listed(text):
    with rejects(ScheduleError, "column") as caught:
        schedule.parse(text)
    assert len(str(caught.value)) < 250


def test_long_schedules_fold_in_linear_time():
    names = schedule.parse("1024x(local)")
    assert schedule.fold(names) == Fold((), ("local",), 1024, ())
    assert schedule.fold(("local",) * 100_000).repeats == 100_000
    assert schedule.write(names) == "1024x(local)"
    assert schedule.parse(schedule.write(("a", "b", "b") * 300 + ("c",) * 100)) == ("a", "b", "b") * 300 + ("c",) * 100
