"""Sweeps: many runs of one config, planned, launched and found again."""

from sparsejax.sweep.axes import Overrides, SweepError, align, chain, grid, product, seeds
from sparsejax.sweep.engines import build_engine
from sparsejax.sweep.launch import RunsFailed, launch, sweep
from sparsejax.sweep.match import QUANTITIES, Match, Matched, match_runs, read_match
from sparsejax.sweep.pieces import place_layers, repeat_period, suggest_period, suggest_placement
from sparsejax.sweep.record import RECORD, read_record
from sparsejax.sweep.runs import Run, limit_steps, plan_runs, read_sweep, show_command
from sparsejax.sweep.search import SAMPLERS, Search, read_objectives, read_search
from sparsejax.sweep.trials import run_search

__all__ = [
    "QUANTITIES",
    "RECORD",
    "SAMPLERS",
    "Match",
    "Matched",
    "Overrides",
    "Run",
    "RunsFailed",
    "Search",
    "SweepError",
    "align",
    "build_engine",
    "chain",
    "grid",
    "launch",
    "limit_steps",
    "match_runs",
    "place_layers",
    "plan_runs",
    "product",
    "read_match",
    "read_objectives",
    "read_record",
    "read_search",
    "read_sweep",
    "repeat_period",
    "run_search",
    "seeds",
    "show_command",
    "suggest_period",
    "suggest_placement",
    "sweep",
]
