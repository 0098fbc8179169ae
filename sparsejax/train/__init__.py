"""Training: the loop, the step and the records of a run."""

from sparsejax.signals import Interrupted
from sparsejax.train.loop import LossDiverged, train
from sparsejax.train.start import find_change
from sparsejax.train.step import build_step

__all__ = ["Interrupted", "LossDiverged", "build_step", "find_change", "train"]
