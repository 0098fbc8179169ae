"""Patterns: which keys each query attends to, defined once. Requires NumPy only."""

from sparsejax.patterns import receptive_field, recipes, testing
from sparsejax.patterns.algebra import And, Minus, Multiset, Or, PerHead, Shift, per_head
from sparsejax.patterns.base import FOREVER, Pattern, PatternError, require
from sparsejax.patterns.drawing import Panel, draw_mask, draw_pattern, format_numbers, picture
from sparsejax.patterns.kv_cache import CachePlan, plan_cache
from sparsejax.patterns.layout import TileGrid, TileLayout, from_ranges
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
)
from sparsejax.patterns.lint import lint_schedule
from sparsejax.patterns.recipes import RECIPES
from sparsejax.patterns.text import REGISTRY, parse, register
from sparsejax.patterns.tiled import BigBirdRandom, Random, Tiles

__all__ = [
    "FOREVER",
    "NAMES",
    "RECIPES",
    "REGISTRY",
    "And",
    "BigBirdRandom",
    "CachePlan",
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
    "draw_mask",
    "draw_pattern",
    "format_numbers",
    "from_ranges",
    "lint_schedule",
    "parse",
    "per_head",
    "picture",
    "plan_cache",
    "receptive_field",
    "recipes",
    "register",
    "require",
    "testing",
]
