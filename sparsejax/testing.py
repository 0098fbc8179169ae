"""Checks of models, mixers and patterns, including a user's, against what they state."""

from sparsejax.check import Certificate, CheckFailed, Finding, check_mixer, check_model
from sparsejax.patterns.testing import check_pattern

__all__ = ["Certificate", "CheckFailed", "Finding", "check_mixer", "check_model", "check_pattern"]
