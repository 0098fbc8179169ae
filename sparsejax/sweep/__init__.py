"""Sweeps and searches: many runs of one configuration, planned, launched and resumed.

The module `sparsejax.sweep.search` needs Optuna and is not imported here.
"""

from sparsejax.schedule import place_layers, repeat_period
from sparsejax.sweep.executors import build_executor
from sparsejax.sweep.grid import SweepError, align, chain, grid, product, seeds, suggest_period, suggest_placement
from sparsejax.sweep.runs import Run, plan_runs, read_sweep, show_command
from sparsejax.sweep.supervisor import RunsFailed, launch, sweep

SAMPLERS = ("tpe", "nsga2", "random")  # of searches

__all__ = [
    "SAMPLERS",
    "Run",
    "RunsFailed",
    "SweepError",
    "align",
    "build_executor",
    "chain",
    "grid",
    "launch",
    "place_layers",
    "plan_runs",
    "product",
    "read_sweep",
    "repeat_period",
    "seeds",
    "show_command",
    "suggest_period",
    "suggest_placement",
    "sweep",
]
