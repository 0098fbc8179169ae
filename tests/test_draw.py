"""`sparsejax draw`: terminal output by hand, reproducible files, and invalid input."""

import io
import itertools
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.color import Color
from rich.console import Console

from sparsejax import config as configs
from sparsejax.cli import USAGE_ERROR, main
from sparsejax.draw import MAX_CELLS, Part, Subject, build_figure, draw_panels, title_layers
from sparsejax.palette import CELLS
from sparsejax.patterns import draw_pattern, parse
from sparsejax.patterns.drawing import STATE, TITLE_LINES, fold_text, picture, wrap_title
from tests.messages import check_message
from tests.train import recipe, runs

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def output(capsys, *arguments):
    """The lines that `draw` prints, without trailing blanks."""
    assert main(["draw", *arguments]) == 0
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def texts(path):
    """All text elements of an SVG file."""
    return [element.text.strip() for element in ElementTree.parse(path).iter() if (element.text or "").strip()]


def test_tokens_in_a_pipe(capsys):
    assert output(capsys, "causal & (window(1) | sink(1))", "--length=4") == [
        "causal & (window(1) | sink(1))",
        "# . . .",
        "# # . .",
        "# # # .",
        "# . # #",
        "56.2% of pairs",
        "# attended   . masked",
    ]


def test_tiles_in_a_pipe_side_by_side(capsys):
    lines = output(capsys, "causal & window(2)", "full", "--length=5", "--tile=2", "--titles=Local, Dense")
    assert [re.split("   +", line) for line in lines[:5]] == [
        ["Local", "Dense"],
        ["+ . .", "# # #"],
        ["+ + .", "# # #"],
        [". # #", "# # #"],
        ["55.6% of tiles of 2, 48% of pairs", "100% of tiles of 2, 100% of pairs"],
    ]
    assert lines[5] == "# full tile   + partial tile   . dead tile"


def test_narrow_terminals_show_tiles(capsys):
    lines = output(capsys, "causal", "--length=1000")  # 160 characters are 80 cells
    assert len(lines[1].split()) == -(-1000 // 16)
    assert "of tiles of 16" in lines[-2]


def test_colours_of_a_terminal():
    (panel,) = draw_pattern(parse("causal & (window(5) | sink(2))"), 33, 3)
    out = io.StringIO()
    draw_panels([panel], Console(file=out, width=60, force_terminal=True, color_system="truecolor"))
    state_of = {";".join(map(str, Color.parse(name).triplet)): state for state, name in enumerate(CELLS)}
    rows = []
    for line in out.getvalue().splitlines()[1:-2]:
        runs_of_cells = re.findall(r"38;2;(\d+;\d+;\d+)(?:;48;2;(\d+;\d+;\d+))?m(▀+)", line)
        pairs = [(upper, lower) for upper, lower, run in runs_of_cells for _ in run]
        rows += [[state_of[part[i]] for part in pairs] for i in (0, 1) if pairs[0][i]]
    np.testing.assert_array_equal(rows, panel.states)


def test_sixteen_colours():
    out = io.StringIO()
    panels = draw_pattern(parse("causal"), 4, 2)
    draw_panels(panels, Console(file=out, width=60, force_terminal=True, color_system="standard"))
    *_, key = out.getvalue().splitlines()
    assert re.findall(r"\x1b\[(\d+)m██", key) == ["34", "36", "37"]  # blue, cyan, white


def test_equal_layers_of_a_schedule_share_a_panel(capsys):
    model = configs.check(recipe.get_config()).model
    kinds = {"ssm": ("mamba", STATE), "local": ("attention", None), "full": ("attention", None)}
    layers = [
        (number, name, [Part(kinds[name][0], pattern, kinds[name][1])])
        for number, (name, pattern) in enumerate(model.connectivity)
    ]
    assert title_layers(layers) == [
        Subject(parse("causal"), "layers 0, 2: ssm (mamba)", STATE),
        Subject(parse("causal & (window(5) | sink(2))"), "layers 1, 3: local", describe=True),
        Subject(parse("causal"), "layer 4: full", describe=True),
    ]
    lines = output(capsys, f"--config={runs.RECIPE}", "--config.model.schedule=local full local", "--length=8")
    assert lines[0].split("   ")[0] == "layers 0, 2: local"
    assert lines[0].endswith("layer 1: full")
    assert [line.split("   ")[0] for line in lines[1:3]] == ["causal & (window(5) | sink(2))", "# . . . . . . ."]
    assert len(lines[2].split()) == 16
    assert len(output(capsys, f"--config={runs.RECIPE}")[2].split()) == 2 * recipe.get_config().data.length


@pytest.mark.parametrize("length", [16, 65])  # with and without lines between the cells
@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_files_are_reproducible(length, ending, tmp_path, capsys):
    files = [tmp_path / f"{name}{ending}" for name in ("first", "second")]
    for file in files:
        assert output(capsys, "causal & window(9)", "sink(2)", f"--length={length}", f"--out={file}") == []
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert first.startswith(PNG if ending == ".png" else b"<svg")
    assert len(first) < 100_000


def test_svg_holds_titles_captions_and_axes(tmp_path, capsys):
    file = tmp_path / "figure.svg"
    output(capsys, "per_head(window(1), full, full)", "causal", "--length=8", "--titles=$A & B_,C", f"--out={file}")
    assert {"$A & B_, head 0", "$A & B_, heads 1-2", "C", "56.2% of pairs", "query", "key", "attended"} <= set(
        texts(file)
    )
    output(capsys, "causal", "--length=40", "--tile=8", f"--out={file}")
    assert {"full tile", "partial tile", "dead tile", "60% of tiles of 8, 51.2% of pairs", "32"} <= set(texts(file))


def test_svg_needs_no_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pattern = "causal & (window(2) | sink(1))"
    output(capsys, pattern, "--length=16", f"--out={tmp_path / 'figure.svg'}")
    assert (tmp_path / "figure.svg").read_text() == picture(parse(pattern), 16)


BAD = {
    "long": ("causal --receptive-field --length=5000", "--length"),
    "name": ("'causal & windw(3)' --length=8", "column 10"),
    "zero": ("causal --length=0", "--length"),
    "not a number": ("causal --length=x", "--length"),
    "too long": ("causal --length=1000000", "--length"),
    "zero tile": ("causal --length=8 --tile=0", "--tile"),
    "odd tile": ("causal --length=1024 --tile=200", "--tile"),
    "pdf": ("causal --length=8 --out=picture.pdf", "--out"),
    "no suffix": ("causal --length=8 --out=picture", "--out"),
    "no folder": ("causal --length=8 --out=absent/picture.png", "--out"),
    "too many cells": (f"causal --length={MAX_CELLS + 1} --tile=1 --out=picture.png", "--tile"),
    "titles": ("causal --length=8 --titles=A,B", "--titles"),
    "nothing": ("--length=8", "--config"),
    "both": (f"causal --config={runs.RECIPE} --length=8", "--config"),
    "override": ("causal --length=8 --config.model.width=8", "--config.model.width"),
    "config and length": (f"--config={runs.RECIPE} --length=0", "--length"),
    "unknown key": (f"--config={runs.RECIPE} --config.model.widht=8", "model.widht"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input(case, tmp_path, capsys, monkeypatch):
    flags, argument = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert main(["draw", *shlex.split(flags)]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert argument in err
    check_message(err.strip())
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["draw", "causal", "--length=8", f"--out={tmp_path / 'picture.png'}"]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "picture.png" in err
    check_message(err.strip())
    assert list(tmp_path.iterdir()) == []
    assert output(capsys, "causal", "--length=2")[1:3] == ["# .", "# #"]


def test_receptive_field_by_layer(capsys):
    # One key back per layer; the third layer adds nothing and shares the panel of the second.
    lines = output(capsys, "window(1)", "window(2)", "window(0)", "--receptive-field", "--length=5")
    assert lines[0].strip() == "after layers 1-2: window(2),"
    assert lines[1].split() == ["after", "layer", "0:", "window(1)", "window(0)"]
    assert [line.replace(" ", "") for line in lines[2:7]] == [
        "#...." + "#....",
        "##..." + "##...",
        ".##.." + "###..",
        "..##." + "####.",
        "...##" + ".####",
    ]
    assert lines[-1] == "# reached   . not reached"


def test_receptive_field_of_a_config(capsys):
    lines = output(capsys, f"--config={runs.RECIPE}", "--receptive-field", "--length=8")
    assert (
        " ".join(lines[:2]) == "after layers 0-4: ssm, local, full"
    )  # the first layer attends to all earlier positions


def test_files_have_at_most_256_cells_by_default(tmp_path, capsys):
    file = tmp_path / "figure.svg"
    output(capsys, "causal", "--length=3000", f"--out={file}")
    assert any("of tiles of 16, " in text for text in texts(file))


def test_recurrent_layers_are_not_drawn_as_attention(tmp_path, capsys):
    file = tmp_path / "figure.svg"
    lines = output(capsys, f"--config={runs.RECIPE}", "--length=4")
    assert [line.split("   ")[0] for line in lines[2:6]] == ["~ . . .", "~ ~ . .", "~ ~ ~ .", "~ ~ ~ ~"]
    assert lines[6].startswith("a state of fixed size, no pairs")
    assert "~ read through a state" in lines[-1]
    assert "# attended" in lines[-1]
    output(capsys, f"--config={runs.RECIPE}", f"--out={file}", "--length=16")
    assert {"layers 0, 2: ssm (mamba)", "input", "output", "read through a state"} <= set(texts(file))


@pytest.mark.parametrize(
    ("preset", "kinds"),
    [
        ("falcon_h1", ["layers 0-71: hybrid", "layers 0-71: hybrid (mamba2)"]),
        ("nemotron_h", ["(mamba2)", "(feed-forward)", ": full"]),
        ("kimi_linear", ["(delta)", "(latent)"]),
        ("minimax_text_01", ["(lightning)", ": full"]),
    ],
)
def test_the_mixers_of_a_preset_have_a_panel_each(preset, kinds, tmp_path, capsys):
    file = tmp_path / "figure.svg"
    output(capsys, f"--config=preset:{preset}", "--length=64", f"--out={file}")
    titles = [title for title in ElementTree.parse(file).getroot()[0].text.split("; ") if title.startswith("layer")]
    assert len(titles) == len(kinds)
    for title, kind in zip(titles, kinds, strict=True):
        assert kind in title


MANY = ", ".join(f"tiles([[{n}, {n + 1}], [{n + 2}]], tile=32)" for n in range(12))


@pytest.mark.parametrize(
    ("text", "characters", "folded"),
    [
        ("causal & window(3)", 18, "causal & window(3)"),
        ("causal & (window(2047) | sink(4) | full)", 38, "causal & (...)"),
        (f"per_head({MANY})", 40, "per_head(12 patterns)"),
        ("per_head(tiles([[0, 1]], tile=32), full)", 37, "per_head(tiles([...], tile=32), full)"),
        ("a_long_name_without_brackets", 10, "a_long_..."),
    ],
)
def test_long_texts_are_folded(text, characters, folded):
    result = fold_text(text, characters)
    assert len(result) <= characters
    assert result == folded


def test_titles_have_at_most_three_lines_per_part():
    for characters in range(12, 60, 4):
        lines = wrap_title(f"layer 0: name\nper_head({MANY})", characters)
        assert len(lines) <= 2 * TITLE_LINES
        assert max(map(len, lines)) <= characters


@pytest.mark.parametrize("config", ["configs/bigbird_mlm.py:mini", "preset:griffin", "preset:kimi_linear"])
def test_titles_of_neighbours_do_not_overlap(config, tmp_path, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "sparsejax.draw.build_figure", lambda panels: figures.append(build_figure(panels)) or figures[0]
    )
    output(capsys, f"--config={ROOT / config if '/' in config else config}", f"--out={tmp_path / 'figure.png'}")
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    axes = [axis for axis in figure.axes if axis.get_visible()]
    boxes = [axis.title.get_window_extent(renderer) for axis in axes]
    boxes += [axis.get_window_extent(renderer) for axis in axes]
    boxes += [axis.xaxis.label.get_window_extent(renderer) for axis in axes]
    overlapping = [(i, j) for (i, a), (j, b) in itertools.combinations(enumerate(boxes), 2) if a.overlaps(b)]
    assert not overlapping
    sides = {round(axis.get_window_extent(renderer).width / figure.dpi, 1) for axis in axes}
    assert min(sides) > 1
