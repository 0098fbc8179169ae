"""Patterns: who may look at whom, said once. NumPy only; nothing here imports the rest of the package."""

from sparsejax.patterns.advice import advise
from sparsejax.patterns.library import FOREVER, Causal, Chunk, Full, Globals, Sink, Window
from sparsejax.patterns.pattern import And, Or, Pattern, PatternError, PerHead, per_head
from sparsejax.patterns.reach import connect, count_layers, count_unreachable, grow, saturate, trace
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
    "Pattern",
    "PatternError",
    "PerHead",
    "Sink",
    "TileGrid",
    "TileLayout",
    "Window",
    "advise",
    "cache_slots",
    "connect",
    "count_layers",
    "count_unreachable",
    "grow",
    "parse",
    "per_head",
    "saturate",
    "trace",
]
