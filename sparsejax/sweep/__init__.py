"""Sweeps and searches: many runs of one configuration, planned, launched and resumed."""

from sparsejax.sweep.executors import build_executor
from sparsejax.sweep.grid import SweepError, align, chain, grid, product, seeds
from sparsejax.sweep.layer_placement import place_layers, repeat_period, suggest_period, suggest_placement
from sparsejax.sweep.match import QUANTITIES, match_runs, read_match
from sparsejax.sweep.runs import Run, limit_steps, plan_runs, read_sweep, show_command
from sparsejax.sweep.search import SAMPLERS, Search, read_objectives, read_search, run_search
from sparsejax.sweep.supervisor import RunsFailed, launch, sweep

__all__ = [
    "QUANTITIES",
    "SAMPLERS",
    "Run",
    "RunsFailed",
    "Search",
    "SweepError",
    "align",
    "build_executor",
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
