"""Patterns: who may look at whom, said once. NumPy only; nothing here imports the rest of the package."""

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
from sparsejax.patterns.pattern import FOREVER, And, Minus, Or, Pattern, PatternError, PerHead, Shift, per_head
from sparsejax.patterns.retention import cache_slots
from sparsejax.patterns.text import parse
from sparsejax.patterns.tiled import Random, Tiles
from sparsejax.patterns.tiles import TileGrid, TileLayout

__all__ = [
    "FOREVER",
    "NAMES",
    "And",
    "Causal",
    "Chunk",
    "Dilated",
    "Fixed",
    "Full",
    "GlobalKeys",
    "GlobalQueries",
    "Globals",
    "Minus",
    "Or",
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
    "cache_slots",
    "parse",
    "per_head",
]
