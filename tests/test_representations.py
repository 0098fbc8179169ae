"""What notebooks show: patterns, layouts, schedules, models and reports as SVG and HTML whose cells are the values."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given

from sparsejax import config as configs
from sparsejax import patterns, schedule, svg
from sparsejax.palette import CELLS, SERIES
from sparsejax.patterns import receptive_field
from sparsejax.patterns.drawing import MAX_LENGTH, PICTURE_CELLS, default_length, draw_layout, picture
from tests.patterns.strategies import shared_patterns
from tests.train import recipe

pytestmark = pytest.mark.quick

SVG = "{http://www.w3.org/2000/svg}"


def matrices(text, colours=CELLS):
    """The matrices of cells that an SVG draws, as indices of the colours, read back from its paths."""
    for group in ElementTree.fromstring(text).iter(f"{SVG}g"):
        background, *paths = group
        states = np.zeros((int(background.get("height")), int(background.get("width"))), int)
        assert background.get("fill") == colours[0]
        for path in paths:
            for left, top, width, height in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", path.get("d")):
                cells = states[int(top) : int(top) + int(height), int(left) : int(left) + int(width)]
                assert cells.size == int(width) * int(height), "a cell outside of the matrix"
                assert (cells == 0).all(), "a cell drawn twice"
                cells[:] = colours.index(path.get("fill"))
        yield states


def texts(text):
    return [element.text for element in ElementTree.fromstring(text).iter(f"{SVG}text")]


@given(shared_patterns())
def test_the_cells_of_a_picture_are_the_mask(pattern):
    (states,) = matrices(picture(pattern, 40))
    np.testing.assert_array_equal(states > 0, pattern.dense(40))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 2)])
def test_outlines_are_exact(shape):
    states = np.random.default_rng(0).integers(0, 3, shape)
    (drawn,) = matrices(svg.document(10, 10, "", [svg.cells(states, 0, 0, (2, 2), lines=True)]))
    np.testing.assert_array_equal(drawn, states)


def test_large_patterns_are_drawn_in_tiles():
    pattern = patterns.parse("causal & (window(255) | sink(4))")
    (states,) = matrices(pattern._repr_svg_())
    np.testing.assert_array_equal(states, pattern.layout(1024, tile=(16, 16)).dense())
    assert set(texts(pattern._repr_svg_())) >= {str(pattern), "query", "key", "768", "partial tile"}


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("causal", PICTURE_CELLS),
        ("window(16)", 64),
        ("window(17)", 128),
        ("random(2, tile=64, seed=99999)", 1024),
        ("bigbird_random(30, tile=64, seed=1)", 8192),  # more tokens than full attention
        ("globals([0, 700])", 4096),
        ("causal & window(1000000)", MAX_LENGTH),
    ],
)
def test_default_lengths_are_valid_and_show_the_structure(text, length):
    pattern = patterns.parse(text)
    assert default_length(pattern) == length
    pattern.check(length, length)


def test_a_pattern_without_a_valid_length_is_an_error():
    with pytest.raises(patterns.PatternError):
        default_length(patterns.parse("random(70000, tile=64, seed=0)"))


def test_heads_are_small_multiples():
    pattern = patterns.parse("per_head(window(7), causal & strided(8), window(7))")
    drawn = list(matrices(pattern._repr_svg_()))
    np.testing.assert_array_equal(np.array(drawn) > 0, pattern.dense(64)[:2])
    assert texts(pattern._repr_svg_()).count("query") == 2


def test_multisets_show_multiplicities():
    pattern = patterns.parse("multiset(causal, window(3), sink(2))")
    (states,) = matrices(pattern._repr_svg_())
    q, k = np.arange(64)[:, None], np.arange(64)
    counts = (k <= q) * 1 + ((k <= q) & (k >= q - 3)) + (k < 2)
    np.testing.assert_array_equal(states, np.where(counts, counts + 1, 0))
    assert {"attended", "twice", "three times"} <= set(texts(pattern._repr_svg_()))
    assert "more often" not in texts(pattern._repr_svg_())


@pytest.mark.parametrize("tile", [(16, 16), (8, 32)])
def test_layouts_show_their_tiles(tile):
    layout = patterns.parse("causal & (window(30) | sink(2))").layout(100, 150, tile=tile)
    (states,) = matrices(layout._repr_svg_())
    np.testing.assert_array_equal(states, layout.dense())
    assert f"{len(layout.columns)} of {layout.dense().size} tiles are live" in layout._repr_svg_()


def test_large_layouts_are_downsampled():
    pattern = patterns.parse("causal & (window(4095) | strided(128))")
    layout = pattern.layout(129 * 128)
    (states,) = matrices(layout._repr_svg_())
    np.testing.assert_array_equal(states, pattern.layout(129 * 128, tile=(256, 256)).dense())
    assert draw_layout(layout).caption.endswith("2 x 2 tiles per cell")
    assert len(pattern.layout(131072)._repr_svg_()) < 20_000


@given(shared_patterns())
def test_repr_evaluates_to_the_pattern(pattern):
    assert eval(repr(pattern), {"patterns": patterns}) == pattern


def test_repr_of_joined_patterns():
    pattern = patterns.parse("per_head(causal & (window(255) | sink(4)), shift(causal, 1))")
    assert repr(pattern) == "patterns.parse('per_head(causal & (window(255) | sink(4)), shift(causal, 1))')"
    assert repr((pattern,)) == f"({pattern!r},)"


SCHEDULE = schedule.Schedule.parse(
    "2x(conv local) comb full",
    {
        "conv": "causal & window(3)",
        "local": "causal & window(15)",
        "comb": "causal & strided(9)",
        "full": "causal",
        "unused": "full",
    },
)


def read_rows(picture, colours):
    """The inputs that each row of the picture of a schedule marks, and the colours of the rows."""
    groups = list(ElementTree.fromstring(picture).iter(f"{SVG}g"))
    fills = [next(path.get("fill") for path in group if path.get("fill") in colours) for group in groups]
    rows = []
    for group, fill in zip(groups, fills, strict=True):
        row = ElementTree.tostring(group).decode()
        rows += matrices(f"<svg>{row}</svg>", (CELLS[0], fill))
    return np.concatenate(rows), fills


def test_schedules_show_the_receptive_field_layer_by_layer():
    rows, fills = read_rows(SCHEDULE.to_svg(64), SERIES)
    expected = list(receptive_field.matrices((pattern for _, pattern in SCHEDULE.layers), 64))[1:]
    np.testing.assert_array_equal(rows, [reached[-1] for reached in expected])
    colours = {"conv": SERIES[0], "local": SERIES[1], "comb": SERIES[2], "full": SERIES[3]}
    assert fills == [colours[name] for name in SCHEDULE.names]
    assert {f"{reached[-1].sum()}" for reached in expected} <= set(texts(SCHEDULE.to_svg(64)))


def test_receptive_fields_of_a_schedule_have_the_known_sizes():
    sizes = [int(inputs.sum()) for inputs in SCHEDULE.receptive_fields(200)]
    assert sizes == receptive_field.sizes([pattern for _, pattern in SCHEDULE.layers], 200)[1:].tolist()


def test_deep_schedules_stay_small():
    deep = schedule.Schedule.parse("100x(a b) 40x(a)", {"a": "causal & window(63)", "b": "causal & strided(8)"})
    html = deep._repr_html_()
    assert len(html) < 60_000
    assert deep.to_svg().count("<g ") == 240
    assert "a" in texts(deep.to_svg())


def test_repr_evaluates_to_the_schedule():
    assert eval(repr(SCHEDULE), {"schedule": schedule}) == SCHEDULE
    assert str(SCHEDULE) == "2x(conv local) comb full"


def test_a_schedule_without_a_pattern_is_an_error():
    with pytest.raises(schedule.ScheduleError, match="did you mean 'local'"):
        schedule.Schedule.parse("local locl", {"local": "causal"})


def test_models_show_their_layers():
    model = configs.check(recipe.get_config()).model
    html = model._repr_html_()
    root = ElementTree.fromstring(html.replace("&#9632;", ""))
    cells = [["".join(cell.itertext()).strip() for cell in row] for row in root.iter("tr")]
    assert cells[0] == ["name", "layers", "mixer", "pattern"]
    assert [[row[0], row[1], row[3]] for row in cells[1:]] == [
        ["ssm", "0, 2", "causal"],
        ["local", "1, 3", "causal & (window(5) | sink(2))"],
        ["full", "4", "causal"],
    ]
    assert all(row[2] for row in cells[1:])
    assert model.layer_schedule.layers == model.connectivity


def test_values_are_escaped():
    hostile = schedule.Schedule(("a",), {"a": patterns.parse("causal")}, {"a": "<script>&"})
    assert "<script>" not in hostile._repr_html_()
    assert "&lt;script&gt;&amp;" in hostile._repr_html_()
    picture = svg.document(10, 10, '<b> & "', [svg.text(0, 0, "<i> & x"), *svg.legend(0, 0, [("#fff", "<u>")])[:1]])
    root = ElementTree.fromstring(picture)
    assert root.find(f"{SVG}title").text == '<b> & "'
    assert texts(picture) == ["<i> & x", "<u>"]


def test_equal_values_have_equal_pictures():
    text = "per_head(random(2, tile=4, seed=1), causal)"
    assert patterns.parse(text)._repr_svg_() == patterns.parse(text)._repr_svg_()
    assert SCHEDULE._repr_html_() == SCHEDULE._repr_html_()
