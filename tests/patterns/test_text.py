"""The text form, and patterns as values."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.patterns import (
    And,
    Causal,
    Chunk,
    Dilated,
    Fixed,
    Full,
    GlobalKeys,
    GlobalQueries,
    Globals,
    Minus,
    Or,
    PatternError,
    PerHead,
    Prefix,
    Random,
    Shift,
    Sink,
    Strided,
    Tiles,
    Window,
    parse,
    per_head,
)
from tests.patterns.strategies import patterns, patterns_with_heads, shared_patterns


@given(patterns(longest=1_000_000))
def test_text_parses_back_to_an_equal_value(pattern):
    again = parse(str(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert again.digest == pattern.digest
    assert str(again) == str(pattern)


@given(patterns(), st.sampled_from([" ", "  ", "\t", "\n "]))
def test_space_between_words_means_nothing(pattern, space):
    words = re.findall(r"\w+|-\d+|[^\w\s]", str(pattern))
    assert parse(space.join(["", *words, ""])) == pattern
    assert parse("".join(str(pattern).split())) == pattern


@given(patterns())
def test_parentheses_around_the_whole_mean_nothing(pattern):
    assert parse(f"(({pattern}))") == pattern


@given(patterns(), patterns())
def test_equal_texts_are_equal_values(one, other):
    assert (one == other) == (str(one) == str(other))
    assert (one == other) == (one.digest == other.digest)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("full", Full()),
        ("full()", Full()),
        ("causal", Causal()),
        ("window(255)", Window(255)),
        ("window(3, 0)", Window(3)),
        ("window(left=3)", Window(3, 0)),
        ("window(right=2, left=1)", Window(1, 2)),
        ("dilated(3, stride=2)", Dilated(3, stride=2)),
        ("dilated(3, 1, 2)", Dilated(3, 1, stride=2)),
        ("strided(4)", Strided(4)),
        ("fixed(8, 2)", Fixed(8, 2)),
        ("prefix(4)", Prefix(4)),
        ("global_keys(2)", GlobalKeys(2)),
        ("global_queries([0, -1])", GlobalQueries((-1, 0))),
        ("random(3, tile=64, seed=1)", Random(3, tile=64, seed=1)),
        ("random(3, 64, 1, reach=512)", Random(3, tile=64, seed=1, reach=512)),
        ("tiles([[0], [1, 0]])", Tiles(((0,), (0, 1)))),
        ("tiles([[0], []], tile=8)", Tiles(((0,), ()), tile=8)),
        ("causal - window(3) - sink(1)", Minus((Causal(), Window(3), Sink(1)))),
        ("causal - (window(3) - sink(1))", Minus((Causal(), Minus((Window(3), Sink(1)))))),
        ("causal -window(3)", Minus((Causal(), Window(3)))),
        ("full | causal & full - sink(1)", Or((Full(), And((Causal(), Minus((Full(), Sink(1)))))))),
        ("shift(causal | sink(1), -2)", Shift(Causal() | Sink(1), -2)),
        ("shift(per_head(causal, full), by=3)", Shift(per_head(Causal(), Full()), 3)),
        ("window(1, right=2)", Window(1, 2)),
        ("chunk(8)", Chunk(8)),
        ("chunk(size=8)", Chunk(8)),
        ("sink(n=4)", Sink(4)),
        ("globals(3)", Globals(3)),
        ("globals([])", Globals(())),
        ("globals([5, -1, 5])", Globals((-1, 5))),
        ("globals(ids=[7])", Globals((7,))),
        ("causal & window(3) | sink(1)", Or((And((Causal(), Window(3))), Sink(1)))),
        ("causal & (window(3) | sink(1))", And((Causal(), Or((Window(3), Sink(1)))))),
        ("per_head(causal)", PerHead((Causal(),))),
        ("per_head(causal | sink(1), full)", per_head(Causal() | Sink(1), Full())),
        ("per_head(causal, full) & chunk(4)", per_head(Causal(), Full()) & Chunk(4)),
    ],
)
def test_text_means(text, pattern):
    assert parse(text) == pattern


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Window(3, 0), "window(3)"),
        (Window(3, 1), "window(3, 1)"),
        (Globals([4, -2, 4]), "globals([-2, 4])"),
        (Globals([]), "globals([])"),
        (Globals(0), "globals(0)"),
        (Causal() & (Window(2) | Sink(1)), "causal & (window(2) | sink(1))"),
        (Causal() & Window(2) | Sink(1), "(causal & window(2)) | sink(1)"),
        (per_head(Causal() & Sink(1), Full()) | Chunk(2), "per_head(causal & sink(1), full) | chunk(2)"),
    ],
)
def test_text_shown(pattern, text):
    assert str(pattern) == text


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("", 1, "expected a pattern"),
        ("   ", 1, "expected a pattern"),
        ("causal &", 9, "expected a pattern"),
        ("causal & ", 9, "expected a pattern"),
        ("& causal", 1, "expected a pattern, found '&'"),
        ("causal && full", 9, "expected a pattern, found '&'"),
        ("3", 1, "expected a pattern, found '3'"),
        ("[1]", 1, "expected a pattern, found '['"),
        ("globals((1, 2))", 10, "expected a pattern, found '1'"),
        ("causal causal", 8, "expected '&', '|', '-' or the end, found 'causal'"),
        ("causal)", 7, "expected '&', '|', '-' or the end, found ')'"),
        ("window(3)(4)", 10, "expected '&', '|', '-' or the end, found '('"),
        ("(causal", 8, "expected ')' for the parenthesis opened at column 1"),
        ("full & (causal", 15, "expected ')' for the parenthesis opened at column 8"),
        ("((causal)", 10, "expected ')' for the parenthesis opened at column 1"),
        ("window(1", 9, "expected ',' or ')' for the parenthesis opened at column 7"),
        ("window(1 2)", 10, "expected ',' or ')' for the parenthesis opened at column 7"),
        ("window(3_0)", 9, "expected ',' or ')' for the parenthesis opened at column 7"),
        ("per_head(causal full)", 17, "expected ',' or ')' for the parenthesis opened at column 9"),
        ("globals([1 2])", 12, "expected ',' or ']'"),
        ("globals([1, 2)", 14, "expected ',' or ']'"),
        ("causal $ full", 8, "unexpected '$'"),
        ("causal &  $", 11, "unexpected '$'"),
        ("window(1.5)", 9, "unexpected '.'"),
        ("window(+3)", 8, "unexpected '+'"),
        ("causal;full", 7, "unexpected ';'"),
        ("__import__('os')", 12, 'unexpected "\'"'),
        ("windw(3)", 1, "unknown pattern 'windw', did you mean 'window'?"),
        ("causal & sinks(3)", 10, "unknown pattern 'sinks', did you mean 'sink'?"),
        ("full | (chunk(2) & casual)", 20, "unknown pattern 'casual', did you mean 'causal'?"),
        ("Causal", 1, "unknown pattern 'Causal', did you mean 'causal'?"),
        ("per_heads(causal)", 1, "unknown pattern 'per_heads', did you mean 'per_head'?"),
        ("\ncausal & fulll", 11, "unknown pattern 'fulll', did you mean 'full'?"),
        ("window(letf=2)", 8, "unknown argument of window 'letf', did you mean 'left'?"),
        ("window(2, rihgt=2)", 11, "unknown argument of window 'rihgt', did you mean 'right'?"),
        ("window", 1, "window needs left"),
        ("full & window()", 8, "window needs left"),
        ("window(right=2)", 1, "window needs left"),
        ("window(1, 2, 3)", 14, "window takes at most 2 arguments"),
        ("full(1)", 6, "full takes at most 0 arguments"),
        ("window(left=1, left=2)", 16, "window got left twice"),
        ("window(1, left=2)", 11, "window got left twice"),
        ("causal | window(4, right=-2)", 10, "window: right must be an integer >= 0, got -2"),
        ("window(-1)", 1, "window: left must be an integer >= 0, got -1"),
        ("causal & sink(0)", 10, "sink: n must be an integer >= 1, got 0"),
        ("chunk(0)", 1, "chunk: size must be an integer >= 1, got 0"),
        ("chunk([2])", 1, "chunk: size must be an integer >= 1"),
        ("window(causal)", 1, "window: left must be an integer >= 0"),
        ("globals(-2000000000)", 1, "globals: ids must be an integer >= -1073741824, got -2000000000"),
        ("globals([causal])", 1, "globals: ids must be integers"),
        ("per_head()", 1, "per_head takes one or more patterns"),
        ("per_head", 1, "per_head takes one or more patterns"),
        ("per_head(causal, 1)", 18, "per_head takes patterns only"),
        ("per_head(a=causal)", 10, "per_head takes patterns only"),
        ("full & per_head(per_head(causal))", 8, "per_head takes one or more patterns that are not per_head"),
        ("causal & per_head(full, sink(0))", 25, "sink: n must be an integer >= 1, got 0"),
        ("full & (per_head(full, full) | per_head(full))", 9, "patterns for 1 and 2 heads do not combine"),
        ("causal & dilated(3, stride=0)", 10, "dilated: stride must be an integer >= 1, got 0"),
        ("causal & dilated(3)", 10, "dilated needs stride"),
        ("strided(0)", 1, "strided: stride must be an integer >= 1, got 0"),
        ("full - fixed(4, 5)", 8, "fixed: c must be at most l = 4, got 5"),
        ("window(-3)", 1, "window: left must be an integer >= 0, got -3"),
        ("tiles([0, 1])", 1, "tiles: rows must be lists of key tiles"),
        ("tiles([[0, 2], [1]])", 1, "tiles: key tile 2 of 2; the first is 0"),
        ("tiles([[-1]])", 1, "tiles: key tiles must be integers >= 0"),
        ("full & shift(3, 1)", 8, "shift: pattern must be a pattern, got 3"),
        ("random(3, tile=64)", 1, "random needs seed"),
        ("causal - ", 9, "expected a pattern, found 'the end'"),
        ("strid(4)", 1, "unknown pattern 'strid', did you mean 'strided'?"),
    ],
)
def test_malformed_text_is_refused_at_the_column(text, column, problem):
    with pytest.raises(PatternError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith(f"pattern {text!r}: column {column}: {problem}")
    assert len(message.splitlines()) == 1
    assert message.count("column") == 1 + problem.count("column"), "a problem inside a problem is told once"


@given(st.text(alphabet="causlwindo_hefp()[]&|,=-0123 \n$.'é²", max_size=25) | st.text(max_size=8))
def test_any_text_parses_or_is_a_pattern_error(text):
    try:
        pattern = parse(text)
    except PatternError:
        return
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("full & globals([3, 64])", 8, "globals: token 64 lies outside of a sequence of 64"),
        ("full | global_keys([-65])", 8, "global_keys: token -65 lies outside"),
        ("globals(65)", 1, "globals: token 64 lies outside"),
        ("causal & (sink(4) | random(3, tile=32, seed=0))", 21, "random: 3 tiles of 32 do not fit: 2 to draw from"),
        ("random(3, tile=8, seed=0, apart=2, ends=2)", 1, "random: 3 tiles of 8 do not fit: 1 to draw from"),
        ("per_head(full, shift(globals([64]), 1))", 22, "globals: token 64 lies outside"),
        ("tiles([[0], [8]], tile=8)", 1, "tiles: tiles of 8 that lie outside of a sequence of 64"),
    ],
)
def test_what_does_not_fit_a_length_is_refused_at_the_column(text, column, problem):
    parse(text)
    with pytest.raises(PatternError) as caught:
        parse(text, 64)
    assert str(caught.value).startswith(f"pattern {text!r}: column {column}: {problem}")
    with pytest.raises(PatternError):
        parse(text).check(64, 64)
    parse(text, 640)


@pytest.mark.parametrize(
    ("text", "column"),
    [("causal & " * 1200 + "causal", 10_000), ("causal & " * 500 + "cuasal", 4501), ("x" * 12_000, 10_000)],
)
def test_an_error_in_a_long_text_shows_where_it_is(text, column):
    with pytest.raises(PatternError, match=f"column {column}: ") as caught:
        parse(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["(" * 3000, "window(" + "9" * 5000 + ")"], ids=["deep", "long number"])
def test_absurd_text_is_a_pattern_error(text):
    with pytest.raises(PatternError):
        parse(text)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Window(-1),
        lambda: Window(1, -1),
        lambda: Window(1.0),
        lambda: Window(True),
        lambda: Chunk(0),
        lambda: Sink(0),
        lambda: Sink("3"),
        lambda: Globals(-(2**31)),
        lambda: Globals((1, 2.5)),
        lambda: Globals((True,)),
        lambda: per_head(),
        lambda: per_head(Causal(), per_head(Causal())),
        lambda: per_head(Causal() & per_head(Causal())),
        lambda: per_head(Causal(), Full()) & per_head(Causal()),
        lambda: (per_head(Causal(), Full()) | Sink(1)) & (Window(1) | per_head(Causal())),
    ],
)
def test_values_that_cannot_be_are_refused(build):
    with pytest.raises(PatternError):
        build()


def test_only_patterns_combine():
    for sign in ("__and__", "__or__"):
        assert getattr(Causal(), sign)("full") is NotImplemented
    with pytest.raises(TypeError):
        Causal() & True


def test_patterns_are_frozen():
    with pytest.raises(AttributeError):
        Window(3).left = 4


@given(shared_patterns(), shared_patterns(), shared_patterns())
def test_joins_of_one_kind_flatten(a, b, c):
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)
    for term in (a & b & c).terms:
        assert type(term) is not And
    for term in (a | b | c).terms:
        assert type(term) is not Or


def test_joins_of_two_kinds_stay_nested():
    assert (Causal() & (Full() | Sink(1))).terms == (Causal(), Or((Full(), Sink(1))))
    assert Causal() & Sink(1) != Causal() | Sink(1)
    assert Causal() & Sink(1) != Sink(1) & Causal()


@given(patterns_with_heads(2))
def test_the_pattern_of_a_head_is_flat_too(pattern):
    for head in (pattern.for_head(0), pattern.for_head(1)):
        assert head.heads is None
        assert parse(str(head)) == head


@given(patterns())
def test_every_pattern_has_a_name(pattern):
    assert isinstance(pattern.name, str)


def test_kinds_with_equal_numbers_differ():
    assert len({Chunk(3), Sink(3), Window(3), Globals(3), Globals((3,))}) == 5


def test_patterns_are_keys():
    assert {Causal() & Window(3): 1}[parse("causal & window(3, 0)")] == 1
    assert Globals([3, 1, 3]) == Globals((1, 3))


def test_digest_is_the_same_everywhere():
    # It names files and checkpoints: the first digits of `printf 'causal & (window(255) | sink(4))' | sha256sum`.
    assert parse("causal&(window(255,0)|sink(4))").digest == "5fb2601fec58"
