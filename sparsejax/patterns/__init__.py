"""Patterns: who may look at whom, said once. NumPy only; nothing here imports the rest of the package."""

from sparsejax.patterns import recipes
from sparsejax.patterns.advice import advise
from sparsejax.patterns.drawing import Panel, draw_mask, draw_pattern, name_numbers
from sparsejax.patterns.library import (
    NAMES,
    Causal,
    Chunk,
    Dilated,
    Fixed,
    Full,
    GlobalKeys,
    GlobalQueries,
    Globals,
    Prefix,
    Sink,
    Strided,
    Window,
    from_ranges,
)
from sparsejax.patterns.pattern import (
    FOREVER,
    And,
    Minus,
    Multiset,
    Or,
    Pattern,
    PatternError,
    PerHead,
    Shift,
    per_head,
)
from sparsejax.patterns.reach import connect, connect_each, count_layers, count_unreachable, grow, saturate, trace
from sparsejax.patterns.retention import cache_slots
from sparsejax.patterns.text import parse
from sparsejax.patterns.tiled import BigBirdRandom, Random, Tiles
from sparsejax.patterns.tiles import TileGrid, TileLayout

__all__ = [
    "FOREVER",
    "NAMES",
    "And",
    "BigBirdRandom",
    "Causal",
    "Chunk",
    "Dilated",
    "Fixed",
    "Full",
    "GlobalKeys",
    "GlobalQueries",
    "Globals",
    "Minus",
    "Multiset",
    "Or",
    "Panel",
    "Pattern",
    "PatternError",
    "PerHead",
    "Prefix",
    "Random",
    "Shift",
    "Sink",
    "Strided",
    "TileGrid",
    "TileLayout",
    "Tiles",
    "Window",
    "advise",
    "cache_slots",
    "connect",
    "connect_each",
    "count_layers",
    "count_unreachable",
    "draw_mask",
    "draw_pattern",
    "from_ranges",
    "grow",
    "name_numbers",
    "parse",
    "per_head",
    "recipes",
    "saturate",
    "trace",
]
