"""Training: the loop, the step, the state, checkpoints and the records of a run."""

from sparsejax.signals import Interrupted
from sparsejax.train.checkpoint import CheckpointError, Checkpoints, list_steps, read_arrays, read_iterator
from sparsejax.train.loop import LossDiverged, train
from sparsejax.train.optimizer import build_optimizer, build_schedule
from sparsejax.train.phases import EvaluationSetting, Phase, plan_evaluations, plan_phases
from sparsejax.train.start import find_change
from sparsejax.train.state import TrainState, init_state, state_shapes
from sparsejax.train.step import build_step

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "EvaluationSetting",
    "Interrupted",
    "LossDiverged",
    "Phase",
    "TrainState",
    "build_optimizer",
    "build_schedule",
    "build_step",
    "find_change",
    "init_state",
    "list_steps",
    "plan_evaluations",
    "plan_phases",
    "read_arrays",
    "read_iterator",
    "state_shapes",
    "train",
]
