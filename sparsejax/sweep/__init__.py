"""Sweeps: many runs of one config, planned, launched and found again."""

from sparsejax.sweep.axes import Overrides, SweepError, align, chain, grid, product, seeds
from sparsejax.sweep.launch import RunsFailed, launch, sweep
from sparsejax.sweep.record import RECORD, read_record
from sparsejax.sweep.runs import Run, limit_steps, plan_runs, read_sweep, show_command

__all__ = [
    "RECORD",
    "Overrides",
    "Run",
    "RunsFailed",
    "SweepError",
    "align",
    "chain",
    "grid",
    "launch",
    "limit_steps",
    "plan_runs",
    "product",
    "read_record",
    "read_sweep",
    "seeds",
    "show_command",
    "sweep",
]
