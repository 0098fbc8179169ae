"""Evaluation: loss in nats and bits per byte, and loss by position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data import Dataset


class Evaluation(NamedTuple):
    """Result of an evaluation.

    Attributes:
      loss: Mean over the scored tokens, in nats.
      by_position: The same at each position of a document [t].
      tokens: Number of scored tokens.
      scored: Number of them at each position [t].
      answers: How many of them the model would have chosen, if that was counted.
    """

    loss: float
    by_position: np.ndarray
    tokens: int
    scored: np.ndarray | None = None
    answers: Answers | None = None

    @property
    def bits(self) -> float:
        """The loss in bits for each token."""
        return self.loss / math.log(2)

    def position_bins(self) -> list[tuple[int, int, float]]:
        """Mean bits per token at positions `[start, stop)`, in bins that double: shows what context is used.

        A bin without a scored token is left out.
        """
        bins = []
        for start, stop in _double(len(self.by_position)):
            values = self.by_position[start:stop]
            values = values if self.scored is None else values[self.scored[start:stop] > 0]
            if len(values):
                bins.append((start, stop, float(values.mean()) / math.log(2)))
        return bins


class Answers(NamedTuple):
    """How many scored tokens are the model's first choice.

    Attributes:
      accuracy: Of all scored tokens.
      exact: Share of the rows whose scored tokens are all right.
      by_distance: Weights of the right and of all scored tokens, by how far back the answer stands [2, t + 1].
    """

    accuracy: float
    exact: float
    by_distance: np.ndarray

    def distance_bins(self) -> list[tuple[int, int, float]]:
        """Accuracy at distances `[start, stop)`, in bins that double; distances that do not occur are left out."""
        right, scored = self.by_distance
        bins = [
            (start, stop, right[start:stop].sum(), scored[start:stop].sum()) for start, stop in _double(len(right), 1)
        ]
        return [(start, stop, float(good / all_)) for start, stop, good, all_ in bins if all_]


def _double(stop: int, start: int = 0) -> list[tuple[int, int]]:
    """Bins from `start` to `stop` whose edges are 8, 16, 32, ..."""
    edges = [start, *(2**i for i in range(3, stop.bit_length())), stop]
    return list(itertools.pairwise(sorted({e for e in edges if e <= stop})))


def evaluate(run: Callable[[Any, Any], tuple[Any, ...]], parameters: Any, batches: Iterable[Any]) -> Evaluation:
    """Adds up `run(parameters, batch)`, the sums of `build_evaluation`, over the batches."""
    sums = None
    for batch in batches:
        found = [np.asarray(one, np.float64) for one in run(parameters, batch)]
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    losses, weights, *counted = sums
    total = weights.sum()
    answers = None
    if counted:
        right, (exact, rows), by_distance = counted
        answers = Answers(float(right.sum() / total), float(exact / rows), by_distance)
    return Evaluation(float(losses.sum() / total), losses / np.maximum(weights, 1), int(total), weights, answers)


def summarize(evaluation: Evaluation, dataset: Dataset) -> dict[str, float]:
    """The metrics of an evaluation, by name.

    Where every token of a text is predicted, bits are for each byte (and for each character, if tokens are not bytes):
    those of all tokens over the bytes that they stand for. Else they are for each scored token, and do not compare.
    """
    metrics = {"eval/loss": evaluation.loss}
    scale = dataset.tokens_per_byte
    if scale is None:
        metrics["eval/bits_per_token"] = evaluation.bits
    else:
        metrics["eval/bits_per_byte"] = evaluation.bits * scale
        if dataset.config.tokenizer != "bytes":
            metrics["eval/bits_per_character"] = evaluation.bits * dataset.tokens_per_character
    metrics |= {f"eval/bits_at_{start}": bits * (scale or 1) for start, _, bits in evaluation.position_bins()}
    if evaluation.answers is not None:
        metrics |= {"eval/accuracy": evaluation.answers.accuracy, "eval/exact_match": evaluation.answers.exact}
        distances = evaluation.answers.distance_bins()
        metrics |= {f"eval/accuracy_at_distance_{start}": accuracy for start, _, accuracy in distances}
    return metrics


def describe(metrics: dict[str, float]) -> str:
    """The main one of the metrics of `summarize`, in words."""
    if "eval/accuracy" in metrics:
        exact = f"accuracy {metrics['eval/accuracy']:.4f}, of whole examples {metrics['eval/exact_match']:.4f}"
        return f"{exact}, {metrics['eval/bits_per_token']:.4f} bits/token"
    character = metrics.get("eval/bits_per_character")
    more = "" if character is None else f", {character:.4f} bits/character"
    return f"{metrics['eval/bits_per_byte']:.4f} bits/byte{more}"
