"""Means over seeds and differences paired by seed: plain numbers in, plain numbers out.

Runs with the same seed read the same batches in the same order, so part of the effect of a seed is common to them and
cancels in their difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

NOISE_FACTOR = 2.0  # standard errors that a difference must exceed


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of `count` values; the standard error is None for fewer than two."""

    mean: float
    error: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two groups of values, paired by seed.

    Attributes:
      mean: Over the common seeds; None without any.
      error: Standard error of the mean; None for fewer than two common seeds.
      p: Of a two-sided paired t-test; None for fewer than two common seeds or if all differences are equal.
      pairs: Number of common seeds.
    """

    mean: float | None
    error: float | None
    p: float | None
    pairs: int

    @property
    def below_noise(self) -> bool | None:
        """Whether the mean is within twice its standard error; None without a standard error."""
        return None if self.error is None or self.mean is None else abs(self.mean) <= NOISE_FACTOR * self.error


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and standard error: the sample's standard deviation over the square root of the count."""
    sample = np.asarray(list(values), np.float64)
    count = len(sample)
    error = float(sample.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return Estimate(float(sample.mean()), error, count)


def paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> Difference:
    """Returns `values - others`, both by seed, over the seeds that both have."""
    from scipy import stats

    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return Difference(None, None, None, 0)
    pairs = np.array([[values[seed], others[seed]] for seed in seeds], np.float64).T
    mean = estimate(pairs[0] - pairs[1])
    p = float(stats.ttest_rel(*pairs).pvalue) if mean.error else None  # undefined without any spread
    return Difference(mean.mean, mean.error, p, mean.count)


def pool_deviations(groups: Iterable[Sequence[float]]) -> float | None:
    """Standard deviation within groups, pooled over all of them; None if no group has two values."""
    samples = [np.asarray(group, np.float64) for group in groups if len(group) > 1]
    if not samples:
        return None
    squares = sum(float(((sample - sample.mean()) ** 2).sum()) for sample in samples)
    return math.sqrt(squares / sum(len(sample) - 1 for sample in samples))
