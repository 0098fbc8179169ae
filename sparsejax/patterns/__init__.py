"""Patterns: who may look at whom, said once. NumPy only; nothing here imports the rest of the package."""

from sparsejax.patterns import receptive_field, recipes
from sparsejax.patterns.lint import lint_schedule
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
from sparsejax.patterns.base import (
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
from sparsejax.patterns.kv_cache import plan_cache
from sparsejax.patterns.text import parse
from sparsejax.patterns.tiled import BigBirdRandom, Random, Tiles
from sparsejax.patterns.layout import TileGrid, TileLayout

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
    "lint_schedule",
    "plan_cache",
    "draw_mask",
    "draw_pattern",
    "from_ranges",
    "name_numbers",
    "parse",
    "per_head",
    "receptive_field",
    "recipes",
]
