"""The text form and patterns as values."""

import dataclasses
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
    recipes,
    register,
)
from tests.messages import rejects
from tests.patterns.strategies import patterns, patterns_with_heads, shared_patterns


@given(patterns(longest=1_000_000))
def test_text_parses_back_to_an_equal_value(pattern):
    again = parse(str(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert again.digest == pattern.digest
    assert str(again) == str(pattern)


@given(patterns(), st.sampled_from([" ", "  ", "\t", "\n "]))
def test_whitespace_is_ignored(pattern, space):
    words = re.findall(r"\w+|-\d+|[^\w\s]", str(pattern))
    assert parse(space.join(["", *words, ""])) == pattern
    assert parse("".join(str(pattern).split())) == pattern


@given(patterns())
def test_outer_parentheses_are_ignored(pattern):
    assert parse(f"(({pattern}))") == pattern


@given(patterns(), patterns())
def test_equal_texts_are_equal_values(first, second):
    assert (first == second) == (str(first) == str(second))
    assert (first == second) == (first.digest == second.digest)


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
        ("mistral", Causal() & Window(4095)),
        ("mistral(w=8) | sink(1)", (Causal() & Window(7)) | Sink(1)),
        ("sparse_transformer_fixed(8, 2, heads=2)", Causal() & per_head(Chunk(8), Fixed(8, 2))),
        (
            "longformer(4, ids=[0, 5], strides=[1, 2])",
            per_head(Window(4, 4), Dilated(4, 4, stride=2)) | Globals((0, 5)),
        ),
        ("bigbird(4, 1, seed=0, heads=2)", recipes.bigbird(4, 1, 0, heads=2)),
        ("bigbird(4, 1, 0, plan=released, multiset=true)", recipes.bigbird(4, 1, 0, plan="released", multiset=True)),
        ("bigbird(4, 1, 0, plan=[[[2], [3]]])", recipes.bigbird(4, 1, 0, plan=[[[2], [3]]])),
        ("shift(gemma_local(3), 1)", Shift(Causal() & Window(2), 1)),
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
    ("text", "column"),
    [
        ("", 1),
        ("   ", 1),
        ("causal &", 9),
        ("causal & ", 9),
        ("& causal", 1),
        ("causal && full", 9),
        ("3", 1),
        ("[1]", 1),
        ("globals((1, 2))", 10),
        ("causal causal", 8),
        ("causal)", 7),
        ("window(3)(4)", 10),
        ("(causal", 8),
        ("full & (causal", 15),
        ("((causal)", 10),
        ("window(1", 9),
        ("window(1 2)", 10),
        ("window(3_0)", 9),
        ("per_head(causal full)", 17),
        ("globals([1 2])", 12),
        ("globals([1, 2)", 14),
        ("causal $ full", 8),
        ("causal &  $", 11),
        ("window(1.5)", 9),
        ("window(+3)", 8),
        ("causal;full", 7),
        ("__import__('os')", 12),
        ("windw(3)", 1),
        ("causal & sinks(3)", 10),
        ("full | (chunk(2) & casual)", 20),
        ("Causal", 1),
        ("per_heads(causal)", 1),
        ("\ncausal & fulll", 11),
        ("window(letf=2)", 8),
        ("window(2, rihgt=2)", 11),
        ("window", 1),
        ("full & window()", 8),
        ("window(right=2)", 1),
        ("window(1, 2, 3)", 14),
        ("full(1)", 6),
        ("window(left=1, left=2)", 16),
        ("window(1, left=2)", 11),
        ("causal | window(4, right=-2)", 10),
        ("window(-1)", 1),
        ("causal & sink(0)", 10),
        ("chunk(0)", 1),
        ("chunk([2])", 1),
        ("window(causal)", 1),
        ("globals(-2000000000)", 1),
        ("globals([causal])", 1),
        ("per_head()", 1),
        ("per_head", 1),
        ("per_head(causal, 1)", 18),
        ("per_head(a=causal)", 10),
        ("full & per_head(per_head(causal))", 8),
        ("causal & per_head(full, sink(0))", 25),
        ("full & (per_head(full, full) | per_head(full))", 9),
        ("causal & dilated(3, stride=0)", 10),
        ("causal & dilated(3)", 10),
        ("strided(0)", 1),
        ("full - fixed(4, 5)", 8),
        ("window(-3)", 1),
        ("tiles([0, 1])", 1),
        ("tiles([[0, 2], [1]])", 1),
        ("tiles([[-1]])", 1),
        ("full & shift(3, 1)", 8),
        ("random(3, tile=64)", 1),
        ("causal - ", 9),
        ("strid(4)", 1),
        ("causal | mistral(0)", 10),
        ("mistral(causal)", 1),
        ("mistra(8)", 1),
        ("mistral(8, 9)", 12),
        ("longformer()", 1),
        ("longformer(1, strides=2)", 1),
        ("longformer(1, strides=[0])", 1),
        ("longformer(1, ids=causal)", 1),
        ("bigbird(4, 1)", 1),
        ("bigbird(4, 1, 0, plan=best)", 1),
        ("bigbird(4, 1, 0, plan=3)", 1),
        ("bigbird(4, 2, 0, plan=[[[1]]])", 1),
        ("bigbird(4, 1, 0, multiset=yes)", 27),
        ("bigbird(4, 1, 0, multiset=1)", 27),
        ("streaming_llm(0)", 1),
        ("streaming_llm(1, 0)", 1),
        ("sparse_transformer_strided(4, heads=0)", 1),
        ("bigbird_random(1, tile=4, seed=0, head=causal)", 1),
    ],
)
def test_malformed_text_is_rejected_at_the_column(text, column):
    with rejects(PatternError, f"pattern: {text!r}: column {column}: ") as caught:
        parse(text)
    assert str(caught.value).count(": column ") == 1, "an error inside an error is reported once"


@given(st.text(alphabet="causlwindo_hefp()[]&|,=-0123 \n$.'é²", max_size=25) | st.text(max_size=8))
def test_any_text_parses_or_is_rejected(text):
    try:
        pattern = parse(text)
    except PatternError:
        return
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("full & globals([3, 64])", 8),
        ("full | global_keys([-65])", 8),
        ("globals(65)", 1),
        ("causal & (sink(4) | random(3, tile=32, seed=0))", 21),
        ("random(3, tile=8, seed=0, apart=2, ends=2)", 1),
        ("per_head(full, shift(globals([64]), 1))", 22),
        ("tiles([[0], [8]], tile=8)", 1),
        ("causal & bigbird(16, 3, seed=0)", 10),
    ],
)
def test_patterns_that_do_not_fit_a_length_are_rejected_at_the_column(text, column):
    parse(text)
    with rejects(PatternError, f"pattern: {text!r}: column {column}: "):
        parse(text, 64)
    with pytest.raises(PatternError):
        parse(text).check(64, 64)
    parse(text, 640)


@pytest.mark.parametrize(
    ("text", "column"),
    [("causal & " * 1200 + "causal", 10_000), ("causal & " * 500 + "cuasal", 4501), ("x" * 12_000, 10_000)],
    ids=["expression", "middle", "name"],
)
def test_an_error_in_a_long_text_shows_its_surroundings(text, column):
    with rejects(PatternError, f"column {column}: ") as caught:
        parse(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    ["(" * 3000, "window(" + "9" * 5000 + ")", "globals(" + "[" * 3000],
    ids=["parentheses", "number", "brackets"],
)
def test_absurd_text_is_rejected(text):
    with rejects(PatternError, "column"):
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
def test_invalid_values_are_rejected(build):
    with rejects(PatternError, ""):
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


def test_classes_with_equal_fields_differ():
    assert len({Chunk(3), Sink(3), Window(3), Globals(3), Globals((3,))}) == 5


@dataclasses.dataclass(frozen=True)
class Words(Causal):
    """A pattern whose arguments are words."""

    name = "words"
    kind: str = "narrow"
    strict: bool = False


@pytest.mark.usefixtures("registries")
def test_words_are_arguments():
    register(Words)
    assert parse("words(kind=wide, strict=true)") == Words("wide", True)
    assert str(Words("wide", True)) == "words(wide, true)"
    assert parse("words(wide, true)") == Words("wide", True)
    assert parse("words") == Words()


def test_patterns_are_keys():
    assert {Causal() & Window(3): 1}[parse("causal & window(3, 0)")] == 1
    assert Globals([3, 1, 3]) == Globals((1, 3))


def test_digest_is_the_same_everywhere():
    # It names files: the first digits of `printf 'causal & (window(255) | sink(4))' | sha256sum`.
    assert parse("causal&(window(255,0)|sink(4))").digest == "5fb2601fec58"
