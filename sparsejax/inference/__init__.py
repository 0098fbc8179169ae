"""Inference: sampling, generation from caches, and evaluation, as functions of a model and its parameters.

`sparsejax.load` returns a model with methods that call them.
"""

from sparsejax.inference.evaluation import Accuracy, Evaluation, build_evaluation, evaluate, summarize
from sparsejax.inference.generation import Decoder, Plan, generate
from sparsejax.inference.sampling import Sampling, log_probabilities, sample
from sparsejax.inference.text import TextStream

__all__ = [
    "Accuracy",
    "Decoder",
    "Evaluation",
    "Plan",
    "Sampling",
    "TextStream",
    "build_evaluation",
    "evaluate",
    "generate",
    "log_probabilities",
    "sample",
    "summarize",
]
