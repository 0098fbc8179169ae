"""Names of metrics, and for each whether lower or higher is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

TRAIN, EVAL = "train/", "eval/"  # prefixes: of a training step, of an evaluation
TRAIN_LOSS = "train/loss"  # nats per scored token of one batch
TRAIN_LOSS_MEAN = "train/loss_mean"  # nats per scored token of all batches since the previous row
# Metrics of a training step that depend on the model, without the prefix.
AUXILIARY = "aux/"  # + name of an auxiliary loss, weighted and summed over layers; not in TRAIN_LOSS
EXPERT_LOAD_MAX = "expert_load_max"  # choices of the most chosen expert of a layer, relative to the mean of the layer
EXPERT_LOAD_MIN = "expert_load_min"
EMA = "eval/ema_"  # prefix: of an evaluation of the exponential moving average of the parameters
EVAL_LOSS = "eval/loss"  # nats per scored token
BITS_PER_TOKEN = "eval/bits_per_token"
BITS_PER_BYTE = "eval/bits_per_byte"
BITS_PER_CHARACTER = "eval/bits_per_character"
RESTORED = "eval/restored"  # fraction of the bytes that the tokenizer gives back, if it is below 1
BITS_AT = "eval/bits_at_"  # + the first position of a bin
ACCURACY = "eval/accuracy"  # share of scored tokens that are the model's first choice
ACCURACY_AT_DISTANCE = "eval/accuracy_at_distance_"  # + the first distance of a bin
PERPLEXITY = "eval/perplexity"  # exponential of the loss per token
EXACT_MATCH = "eval/exact_match"  # share of rows of which every scored token is
# Of the selection of a layer, + /layer_INDEX, see `ops.measure_selection`.
MASS, RECALL, INDEXER_KL = "eval/mass", "eval/recall", "eval/kl"
STEPS_PER_SECOND, TOKENS_PER_SECOND = "steps_per_second", "tokens_per_second"

Direction = Literal["min", "max"]

# By prefix: `eval/bits` stands for `eval/bits_at_64`, `eval/loss` for the `eval/loss/long` of an evaluation setting.
_LOWER = (
    EVAL_LOSS,
    INDEXER_KL,
    "eval/bits",
    PERPLEXITY,
    TRAIN_LOSS,
    "parameters",
    "active_parameters",
    "training_flops",
    "flops",
    "cache_bytes",
    "kv",
    "seconds",
)
_HIGHER = (ACCURACY, EXACT_MATCH, MASS, RECALL, STEPS_PER_SECOND, TOKENS_PER_SECOND)


def direction(name: str) -> Direction | None:
    """Whether a metric or a cost is best at its minimum or at its maximum; None if the name is unknown."""
    name = EVAL + name.removeprefix(EMA) if name.startswith(EMA) else name
    if name.startswith(_LOWER):
        return "min"
    return "max" if name.startswith(_HIGHER) else None


def loss_unit(metric: str, evaluation: Mapping[str, float | None]) -> tuple[float, str]:
    """Returns the unit in which a training loss is shown beside a metric.

    Args:
      metric: Name of the metric of an evaluation.
      evaluation: Metrics of an evaluation of the same run, from which the tokens per byte follow.

    Returns:
      Factor from nats per token to the unit, and the unit: that of `metric`, or for a metric that is no loss, bits per
      byte if the run reports them and bits per token otherwise.
    """
    if metric.startswith(EVAL_LOSS):
        return 1.0, "nats per token"
    name, unit = BITS_PER_BYTE, "bits per byte"
    if metric.startswith(BITS_PER_CHARACTER):
        name, unit = BITS_PER_CHARACTER, "bits per character"
    loss, bits = evaluation.get(EVAL_LOSS) or math.nan, evaluation.get(name) or math.nan
    factor = bits / loss
    return (factor, unit) if math.isfinite(factor) else (1 / math.log(2), "bits per token")


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON, which has neither infinities nor NaN: those become None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def pareto_front(points: Sequence[tuple[float, ...]], directions: Sequence[Direction]) -> list[int]:
    """Indices of the points that no other dominates, sorted by the last coordinate, best first.

    A point dominates another if it is as good in every coordinate and better in one. Of equal points the first counts.
    """
    signs = [1 if direction == "min" else -1 for direction in directions]
    losses = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    front: dict[tuple[float, ...], int] = {}
    for i, loss in enumerate(losses):
        if not any(other != loss and all(a <= b for a, b in zip(other, loss, strict=True)) for other in losses):
            front.setdefault(loss, i)
    return [front[loss] for loss in sorted(front, key=lambda loss: loss[::-1])]
