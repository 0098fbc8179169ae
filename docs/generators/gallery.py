"""The gallery: a card per pattern and recipe with its picture, receptive field, cost and config line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from generators import markdown
from sparsejax import svg
from sparsejax.palette import GREY, SERIES
from sparsejax.patterns import Pattern, parse, plan_cache, receptive_field
from sparsejax.patterns.drawing import picture
from sparsejax.patterns.library import NAMES
from sparsejax.patterns.recipes import RECIPES
from sparsejax.patterns.text import JOINS

FOLDER = Path("docs/gallery")
LENGTH = 131_072  # tokens of the costs
LAYERS, INPUTS = 8, 16_384  # of the receptive fields

INTRODUCTION = f"""\
Each card shows which keys (to the right) each query (downwards) attends to, how many inputs can influence the last of
{INPUTS:,} positions after 1 to {LAYERS} layers of the pattern, and its cost over {LENGTH:,} tokens.

Pairs and live tiles (of 1,048,576 tiles of 128 x 128) are per head. A bidirectional pattern needs
`model.causal = False`; it does not decode and has no KV cache. The last line of a card belongs in a config, where
`local` is `config.model.layers.local`. [Patterns](../reference/patterns.md) lists all arguments."""


class Card(NamedTuple):
    """One pattern of the gallery."""

    title: str
    text: str  # text form, with typical arguments
    purpose: str
    source: str = ""
    shown: str = ""  # text form of the picture, if smaller arguments show the structure better


FAMILIES: dict[str, tuple[Card, ...]] = {
    "Dense": (
        Card(
            "full", "full", "Dense attention of encoders, and the reference for every other cost.", "arXiv:1706.03762"
        ),
        Card("causal", "causal", "Dense attention of decoders. `causal & pattern` is the causal form of a pattern."),
    ),
    "Local": (
        Card(
            "window",
            "causal & window(255)",
            "Cost linear in the length, and a cache of constant size: the workhorse of hybrid models.",
            "Longformer, arXiv:2004.05150",
        ),
        Card(
            "dilated",
            "causal & dilated(255, stride=4)",
            "A window four times as long for the same number of keys; strides above 1 skip tokens.",
            "Longformer, arXiv:2004.05150, section 3.1",
            shown="causal & dilated(7, stride=4)",
        ),
        Card(
            "chunk",
            "causal & chunk(256)",
            "Blocks that never read from one another: cheap, but deeper layers add nothing.",
            "Llama 4",
        ),
    ),
    "Strided": (
        Card(
            "strided",
            "causal & strided(362)",
            "Column head of the strided Sparse Transformer, for data with a period such as images.",
            "arXiv:1904.10509",
        ),
        Card(
            "fixed",
            "causal & fixed(128, 8)",
            "Column head of the fixed Sparse Transformer: the last keys of each block summarize it.",
            "arXiv:1904.10509",
        ),
    ),
    "Global tokens": (
        Card(
            "sink",
            "causal & (window(255) | sink(4))",
            "The first keys absorb attention that has no target, which keeps a sliding window stable.",
            "StreamingLLM, arXiv:2309.17453",
        ),
        Card(
            "prefix",
            "causal | prefix(256)",
            "Prefix LM: the prompt is read in both directions.",
            "T5, arXiv:1910.10683",
        ),
        Card(
            "globals",
            "window(128, 128) | globals(4)",
            "Global tokens exchange information over any distance in two layers.",
            "Longformer, arXiv:2004.05150",
        ),
        Card(
            "global_keys",
            "window(128, 128) | global_keys(4)",
            "The half of `globals` through which every query reads the global tokens.",
            "Longformer, arXiv:2004.05150",
        ),
        Card(
            "global_queries",
            "window(128, 128) | global_queries(4)",
            "The half of `globals` through which the global tokens read every key.",
            "Longformer, arXiv:2004.05150",
        ),
    ),
    "Tiles": (
        Card(
            "random",
            "causal & (chunk(64) | random(3, tile=64, seed=0))",
            "Random key tiles per query tile connect distant tokens in a few layers.",
            "BigBird, arXiv:2007.14062",
        ),
        Card(
            "bigbird_random",
            "bigbird_random(3, tile=64, seed=0)",
            "The random tiles of the released BigBird checkpoints. The first and the last query tile have none.",
            "BigBird, arXiv:2007.14062",
        ),
        Card(
            "tiles", "causal & tiles([[0], [0, 1], [1, 2], [0, 2, 3]])", "Any layout: the key tiles of each query tile."
        ),
    ),
    "Algebra": (
        Card(
            "a & b",
            "window(255) & strided(2)",
            "Intersection: the keys to which both patterns attend.",
            shown="window(15) & strided(2)",
        ),
        Card("a | b", "causal & (window(63) | strided(64))", "Union: the keys to which at least one pattern attends."),
        Card("a - b", "causal - window(255)", "Difference: here everything before the window."),
        Card(
            "shift",
            "shift(causal & window(255), 256)",
            "A pattern moved back by a number of keys; here without the query.",
        ),
        Card(
            "multiset",
            "multiset(window(7, 7), sink(4), strided(16))",
            "A union in which a key counts once per term in the softmax.",
            "released BigBird code",
        ),
        Card("per_head", "causal & per_head(window(63), strided(64))", "One pattern per query head."),
    ),
    "Recipes": (
        Card(
            "longformer",
            "longformer(256, ids=4)",
            "Encoder for long documents.",
            "Longformer, arXiv:2004.05150",
        ),
        Card(
            "bigbird", "bigbird(64, 3, 0)", "Encoder with window, global and random tiles.", "BigBird, arXiv:2007.14062"
        ),
        Card(
            "sparse_transformer_strided",
            "sparse_transformer_strided(362)",
            "A decoder of n√n pairs for images and audio; the stride is the square root of the length.",
            "arXiv:1904.10509",
        ),
        Card(
            "sparse_transformer_fixed",
            "sparse_transformer_fixed(128, 8)",
            "A decoder with summaries per block, for text.",
            "arXiv:1904.10509",
        ),
        Card("mistral", "mistral(4096)", "The sliding window of Mistral 7B in every layer.", "arXiv:2310.06825"),
        Card("streaming_llm", "streaming_llm(4, 1020)", "Decoding without end in constant memory.", "arXiv:2309.17453"),
        Card("llama4_local", "llama4_local(8192)", "Three of four layers of Llama 4."),
        Card("gemma_local", "gemma_local(1024)", "Five of six layers of Gemma 3.", "arXiv:2503.19786"),
        Card("gemma_global", "gemma_global", "The sixth layer of Gemma 3.", "arXiv:2503.19786"),
    ),
}


def generate() -> dict[Path, str | bytes]:
    """The page of the gallery and its pictures, by path in the repository.

    Raises:
      ValueError: A pattern, recipe or combinator has no card.
    """
    cards = [card for family in FAMILIES.values() for card in family]
    if missing := {*NAMES, *RECIPES, *JOINS} - {card.title for card in cards}:
        raise ValueError(f"no card for {', '.join(sorted(missing))}")
    files: dict[Path, str | bytes] = {}
    parts = []
    for family, members in FAMILIES.items():
        parts += [f"## {family}", '<div class="grid cards" markdown>', *map(_write_card, members), "</div>"]
    for card in cards:
        shown = card.shown or card.text
        files[FOLDER / f"{_slug(card)}.svg"] = picture(parse(shown), title=shown, columns=1)
        files[FOLDER / f"{_slug(card)}_field.svg"] = _draw_curve(card)
    return {FOLDER / "index.md": markdown.page("Gallery", INTRODUCTION, *parts), **files}


def _slug(card: Card) -> str:
    return {"a & b": "and", "a | b": "or", "a - b": "minus"}.get(card.title, card.title)


def _write_card(card: Card) -> str:
    """A list item, which is a card on the site."""
    pattern, slug = parse(card.text), _slug(card)
    source = f" *{card.source}*" if card.source else ""
    parts = [
        f'<a id="{slug}"></a>**`{card.title}`**',
        card.purpose + source,
        f"![{card.title}: queries downwards, keys to the right]({slug}.svg)",
        f"![Receptive field of {LAYERS} layers of {card.title}]({slug}_field.svg)",
        markdown.table((f"{LENGTH:,} tokens", ""), _list_costs(pattern), right=("",)),
        f"`local.mixer.pattern = {card.text!r}`",
    ]
    return "-   " + "\n\n".join(parts).replace("\n", "\n    ").replace("\n    \n", "\n\n")


def _list_costs(pattern: Pattern) -> Iterable[tuple[str, str]]:
    """Names and values of the costs of a pattern."""
    heads = pattern.heads or 1
    pairs, dense = pattern.pairs(LENGTH) / heads, LENGTH * (LENGTH + 1) // 2
    live, _ = pattern.tiles(LENGTH)
    yield "Scored pairs", f"{pairs:,.0f}"
    yield "Of dense causal", f"{pairs / dense:.2f}" if pairs > dense / 10 else f"1/{dense / pairs:,.0f}"
    yield "Live tiles", f"{live / heads:,.0f}"
    yield "KV-cache slots", "-" if pattern.lookahead() > 0 else f"{plan_cache(pattern, LENGTH).count:,}"


WIDTH, HEIGHT, LEFT, TOP = 256, 120, 52, 32  # pixels of the curve


def _draw_curve(card: Card) -> str:
    """Inputs that reach the last position after each number of layers, on a logarithmic axis."""
    sizes = receptive_field.sizes([parse(card.text)] * LAYERS, INPUTS).tolist()
    heights = [TOP + HEIGHT * (1 - math.log(size) / math.log(INPUTS)) for size in sizes]
    points = [(LEFT + WIDTH * layer / LAYERS, height) for layer, height in enumerate(heights)]
    elements = [svg.text(LEFT, 18, f"inputs that reach the last of {INPUTS:,} positions", size=10.5)]
    for value in (1, 16, 256, 4096, INPUTS):
        y = TOP + HEIGHT * (1 - math.log(value) / math.log(INPUTS))
        elements.append(svg.rectangle(LEFT, y - 0.25, WIDTH, 0.5, "#d0d0d0"))
        elements.append(svg.text(LEFT - 4, y + 3, f"{value:,}", anchor="end", size=9, fill=GREY))
    elements.append(svg.polyline(points, SERIES[0]))
    for layer, (x, y) in enumerate(points):
        elements.append(f'<circle cx="{svg.number(x)}" cy="{svg.number(y)}" r="2.5" fill="{SERIES[0]}"/>')
        elements.append(svg.text(x, TOP + HEIGHT + 14, str(layer), anchor="middle", size=9, fill=GREY))
    elements.append(svg.text(LEFT + WIDTH / 2, TOP + HEIGHT + 28, "layers", anchor="middle"))
    label = heights[-1] + (16 if heights[-1] < TOP + 20 else -7)
    elements.append(svg.text(LEFT + WIDTH, label, f"{sizes[-1]:,} after {LAYERS}", anchor="end", size=10))
    title = f"{card.text}: inputs that reach the last of {INPUTS:,} positions: {', '.join(map(str, sizes))}"
    return svg.document(LEFT + WIDTH + 22, TOP + HEIGHT + 36, title, elements)
