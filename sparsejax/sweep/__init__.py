"""Sweeps: many runs of one config, planned, launched and found again."""

from sparsejax.sweep.axes import Overrides, SweepError, align, chain, grid, product, seeds
from sparsejax.sweep.runs import Run, plan_runs, read_sweep, show_command

__all__ = [
    "Overrides",
    "Run",
    "SweepError",
    "align",
    "chain",
    "grid",
    "plan_runs",
    "product",
    "read_sweep",
    "seeds",
    "show_command",
]
