"""What a run consists of: its phases, its optimizer, its state and its checkpoints."""

from sparsejax.runs.checkpoint import CheckpointError, Checkpoints, list_steps, read_arrays, read_iterator
from sparsejax.runs.optimizer import build_optimizer, build_schedule
from sparsejax.runs.phases import EvaluationSetting, Phase, plan_evaluations, plan_phases
from sparsejax.runs.state import TrainState, init_state, state_shapes

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "EvaluationSetting",
    "Phase",
    "TrainState",
    "build_optimizer",
    "build_schedule",
    "init_state",
    "list_steps",
    "plan_evaluations",
    "plan_phases",
    "read_arrays",
    "read_iterator",
    "state_shapes",
]
