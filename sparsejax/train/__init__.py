"""Training: the loop, the step, the state, checkpoints and what a run writes down."""

from sparsejax.train.checkpoint import CheckpointError, Checkpoints, list_steps, read_arrays
from sparsejax.train.evaluate import Answers, Evaluation, evaluate, summarize
from sparsejax.train.loop import BadLoss, Interrupted, find_change, train
from sparsejax.train.optimizer import build_optimizer, build_schedule
from sparsejax.train.phases import Phase, plan_phases
from sparsejax.train.state import TrainState, init_state, state_shapes
from sparsejax.train.step import build_evaluation, build_step
from sparsejax.train.writers import RESULT, read_rows, write_json

__all__ = [
    "RESULT",
    "Answers",
    "BadLoss",
    "CheckpointError",
    "Checkpoints",
    "Evaluation",
    "Interrupted",
    "Phase",
    "TrainState",
    "build_evaluation",
    "build_optimizer",
    "build_schedule",
    "build_step",
    "evaluate",
    "find_change",
    "init_state",
    "list_steps",
    "plan_phases",
    "read_arrays",
    "read_rows",
    "state_shapes",
    "summarize",
    "train",
    "write_json",
]
