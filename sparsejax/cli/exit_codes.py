"""The exit codes of the command line."""

from sparsejax.signals import INTERRUPTED, LOSS_DIVERGED

__all__ = ["INTERRUPTED", "LOSS_DIVERGED", "RUNS_FAILED", "USAGE_ERROR", "VERIFICATION_FAILED"]

USAGE_ERROR = 2  # invalid input, which one line on stderr describes
RUNS_FAILED = 4  # a sweep has ended, but some of its runs failed
VERIFICATION_FAILED = 5  # an implementation differs from the reference, or a model from its config
