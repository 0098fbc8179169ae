"""Patterns: who may look at whom, said once. NumPy only; nothing here imports the rest of the package."""

from sparsejax.patterns.drawing import Panel, draw_mask, draw_pattern, name_numbers
from sparsejax.patterns.library import FOREVER, Causal, Chunk, Full, Globals, Sink, Window
from sparsejax.patterns.pattern import And, Or, Pattern, PatternError, PerHead, per_head
from sparsejax.patterns.retention import cache_slots
from sparsejax.patterns.text import parse
from sparsejax.patterns.tiles import TileGrid, TileLayout

__all__ = [
    "FOREVER",
    "And",
    "Causal",
    "Chunk",
    "Full",
    "Globals",
    "Or",
    "Panel",
    "Pattern",
    "PatternError",
    "PerHead",
    "Sink",
    "TileGrid",
    "TileLayout",
    "Window",
    "cache_slots",
    "draw_mask",
    "draw_pattern",
    "name_numbers",
    "parse",
    "per_head",
]
