"""Figures: the overview of the README, and patterns as papers draw them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sparsejax import svg
from sparsejax.palette import CELLS, GREY, SERIES
from sparsejax.patterns import draw_pattern, parse
from sparsejax.patterns.drawing import FULL, panels_to_svg
from sparsejax.schedule import Schedule

FOLDER = Path("docs/figures")

# Child et al. 2019 (arXiv:1904.10509), figure 3: a stride of 4, and the last of every 4 keys as a summary.
SPARSE_TRANSFORMER = {
    "Dense": "causal",
    "Strided": "causal & (window(3) | strided(4))",
    "Fixed": "causal & (chunk(4) | fixed(4, 1))",
}
# Zaheer et al. 2020 (arXiv:2007.14062), figure 1, in tiles of 64: 2 random, 3 in a window, 2 global.
RANDOM, GLOBAL = "random(2, tile=64, seed=3, apart=2)", "globals(128)"
WINDOW = "chunk(64) | shift(chunk(64), 64) | shift(chunk(64), -64)"
BIGBIRD = {"Random": RANDOM, "Window": WINDOW, "Global": GLOBAL, "BigBird": f"{RANDOM} | {WINDOW} | {GLOBAL}"}

OVERVIEW = {
    "Dense causal": "causal",
    "Window and sink": "causal & (window(7) | sink(3))",
    "Sparse Transformer": "sparse_transformer_strided(8)",
    "BigBird": "bigbird(3, 2, 7)",
}
MIXERS = {
    "conv": ("gated convolution, 4 taps", "causal & window(3)"),
    "local": ("attention, window of 16 keys", "causal & window(15)"),
    "ssm": ("Mamba", "causal"),
    "full": ("attention", "causal"),
}
SCHEDULE = Schedule.parse("2x(conv local) ssm full", {name: pattern for name, (_, pattern) in MIXERS.items()})
INPUTS = 96


def generate() -> dict[Path, str | bytes]:
    """The figures by path in the repository."""
    return {
        FOLDER / "overview.svg": draw_overview(),
        FOLDER / "sparse_transformer.svg": _draw_side_by_side(SPARSE_TRANSFORMER, 16, 1),
        FOLDER / "bigbird.svg": _draw_side_by_side(BIGBIRD, 1024, 64),
    }


def _draw_side_by_side(texts: dict[str, str], length: int, tile: int) -> str:
    return panels_to_svg(
        [panel for title, text in texts.items() for panel in draw_pattern(parse(text), length, tile, title)]
    )


TOKENS, CELL, GAP, LEFT = 48, 4, 24, 34  # of the patterns; pixels of a cell, between panels, and left of them
SIDE = TOKENS * CELL
PANEL_TOP, STRIP_TOP, ROW = 48, 330, 20
STRIP_LEFT, STRIP_CELL = 256, 5


def draw_overview() -> str:
    """Four patterns above a hybrid schedule with its receptive field."""
    width = LEFT + 4 * SIDE + 3 * GAP + 24
    height = STRIP_TOP + ROW * len(SCHEDULE.names) + 44
    title = f"Four attention patterns, and the receptive field of the layer schedule {SCHEDULE}"
    return svg.document(width, height, title, [*_draw_patterns(), *_draw_schedule()])


def _draw_patterns() -> Iterator[str]:
    for number, (title, text) in enumerate(OVERVIEW.items()):
        x = LEFT + number * (SIDE + GAP)
        mask = parse(text).dense(TOKENS)
        yield svg.text(x, 22, title, size=14, font_weight="600")
        yield svg.text(x, 39, text, size=9.5, mono=True)
        yield svg.cells(FULL * mask.astype(int), x, PANEL_TOP, (CELL, CELL))
        share = f"{100 * mask.mean():.0f}% of pairs"
        yield svg.text(x + SIDE / 2, PANEL_TOP + SIDE + 17, share, anchor="middle", fill=GREY)
    middle = PANEL_TOP + SIDE / 2
    yield svg.text(
        LEFT - 12, middle, "query", anchor="middle", transform=f"rotate(-90 {LEFT - 12} {svg.number(middle)})"
    )
    yield svg.text(LEFT, PANEL_TOP + SIDE + 17, "key")


def _draw_schedule() -> Iterator[str]:
    yield svg.text(LEFT, STRIP_TOP - 34, "A hybrid schedule", size=14, font_weight="600")
    yield svg.text(LEFT + 156, STRIP_TOP - 34, str(SCHEDULE), size=11, mono=True)
    caption = f"Inputs that can influence the last of {INPUTS} positions, layer by layer"
    yield svg.text(LEFT, STRIP_TOP - 16, caption, fill=GREY)
    colours = dict(zip(MIXERS, SERIES, strict=False))
    for number, (name, inputs) in enumerate(zip(SCHEDULE.names, SCHEDULE.receptive_fields(INPUTS), strict=True)):
        y = STRIP_TOP + number * ROW
        yield svg.text(LEFT, y + 13, name, mono=True)
        yield svg.text(LEFT + 44, y + 13, MIXERS[name][0], fill=GREY)
        shades = (CELLS[0], colours[name])
        yield svg.cells(inputs[None, :].astype(int), STRIP_LEFT, y, (STRIP_CELL, ROW - 3), shades)
        yield svg.text(STRIP_LEFT + INPUTS * STRIP_CELL + 10, y + 13, f"{int(inputs.sum())} of {INPUTS} inputs")
    bottom = STRIP_TOP + ROW * len(SCHEDULE.names)
    yield svg.text(STRIP_LEFT, bottom + 14, "first input", size=10, fill=GREY)
    yield svg.text(STRIP_LEFT + INPUTS * STRIP_CELL, bottom + 14, "last", anchor="end", size=10, fill=GREY)
