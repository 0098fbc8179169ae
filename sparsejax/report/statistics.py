"""Means over seeds, and differences paired by seed: plain numbers in, plain numbers out.

Runs of the same seed see the same batches in the same order, so that part of what a seed does to the result is common
to them and falls out of their difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

SURE = 2.0  # standard errors that a difference must exceed


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of `count` values; its standard error is None if there are fewer than two."""

    mean: float
    error: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What remains of one setting's values if another's of the same seeds are taken away.

    Attributes:
      difference: The mean over the common seeds, or None without any.
      error: Its standard error; None with fewer than two common seeds.
      p: Of a paired t-test, two-sided; None with fewer than two common seeds or where all differences are equal.
      pairs: The number of common seeds.
    """

    difference: float | None
    error: float | None
    p: float | None
    pairs: int

    @property
    def below_noise(self) -> bool | None:
        """Whether the difference is smaller than twice its standard error; None if that has none."""
        return None if self.error is None else abs(self.difference) <= SURE * self.error


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and standard error, the sample's standard deviation over the root of the count."""
    values = np.asarray(list(values), np.float64)
    count = len(values)
    error = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return Estimate(float(values.mean()), error, count)


def compare(values: Mapping[int, float], others: Mapping[int, float]) -> Comparison:
    """`values` less `others`, both by seed, over the seeds that both have."""
    from scipy import stats

    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return Comparison(None, None, None, 0)
    pairs = np.array([[values[seed], others[seed]] for seed in seeds], np.float64).T
    found = estimate(pairs[0] - pairs[1])
    # Without any spread there is nothing to hold the difference against.
    p = float(stats.ttest_rel(*pairs).pvalue) if found.error else None
    return Comparison(found.mean, found.error, p, found.count)


def pool_deviations(groups: Iterable[Sequence[float]]) -> float | None:
    """The standard deviation within groups, from all of them together; None if none has two values."""
    groups = [np.asarray(group, np.float64) for group in groups if len(group) > 1]
    if not groups:
        return None
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))
