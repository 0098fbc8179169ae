"""Means over seeds, and differences of groups from a baseline: plain numbers in, plain numbers out.

Runs with the same seed read the same batches in the same order. A value is therefore modelled as the effect of its
group plus the effect of its seed plus noise (a randomized block design), and the noise is estimated once, from all
groups: three seeds alone estimate a standard deviation within a factor of six.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

MIN_SEEDS = 3  # common seeds of a group and the baseline from which a difference is tested
UNEQUAL = 3.0  # ratio of a group's standard deviation to the median group's, above which the group is not pooled
ROUNDING = 1e-12  # relative size of differences that are rounding errors

Values = Mapping[int, float]  # by seed


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of `count` values; the standard error is None for fewer than two."""

    mean: float
    error: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of a group from the baseline.

    Attributes:
      mean: From the fit of all groups, which is the mean over seeds if every group has the same seeds; with fewer than
        `MIN_SEEDS` common seeds, the mean over these, and None without any.
      error: Standard error of the mean; None with fewer than `MIN_SEEDS` common seeds.
      p: Of a two-sided t-test, corrected for all tests against the same baseline by the method of Holm (1979); None
        with fewer than `MIN_SEEDS` common seeds.
      seeds: Number of seeds that the group shares with the baseline.
      pooled: Whether the noise is that of all groups; False if the group or the baseline is much noisier than the rest
        and the test is that of Welch, which estimates the noise of both groups from their own seeds.
    """

    mean: float | None
    error: float | None = None
    p: float | None = None
    seeds: int = 0
    pooled: bool = True


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviation of a run around the effects of its group and its seed, and its degrees of freedom."""

    deviation: float
    degrees: int


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and standard error: the sample's standard deviation over the square root of the count."""
    sample = np.asarray(list(values), np.float64)
    count = len(sample)
    error = float(sample.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return Estimate(float(sample.mean()), error, count)


def compare_groups(groups: Sequence[Values], baseline: int) -> tuple[list[Difference | None], Noise | None]:
    """Returns the difference of each group from the baseline, and the pooled noise.

    Args:
      groups: Values by seed.
      baseline: Index of the baseline; its difference is None.

    Returns:
      The differences, and the noise; it is None without degrees of freedom.
    """
    noisy = _find_noisy(groups)
    fit = _Fit([{} if i in noisy else values for i, values in enumerate(groups)])
    differences: list[Difference | None] = []
    for i, values in enumerate(groups):
        common = sorted(values.keys() & groups[baseline].keys())
        if i == baseline:
            differences.append(None)
        elif len(common) < MIN_SEEDS:
            mean = float(np.mean([values[seed] - groups[baseline][seed] for seed in common])) if common else None
            differences.append(Difference(mean, seeds=len(common)))
        elif {i, baseline} & noisy:
            differences.append(dataclasses.replace(_welch(values, groups[baseline]), seeds=len(common)))
        else:
            differences.append(dataclasses.replace(fit.contrast(i, baseline), seeds=len(common)))
    return _correct(differences), fit.noise


def _find_noisy(groups: Sequence[Values]) -> set[int]:
    """Indices of the groups whose standard deviation over seeds is far above that of the median group."""
    deviations = {i: np.std(list(values.values()), ddof=1) for i, values in enumerate(groups) if len(values) > 1}
    limit = UNEQUAL * np.median(list(deviations.values())) if deviations else 0.0
    return {i for i, deviation in deviations.items() if deviation > limit + _resolution(groups[i].values())}


def _resolution(values: Iterable[float]) -> float:
    """The size of differences that are rounding errors."""
    return ROUNDING * max(map(abs, values), default=0.0)


class _Fit:
    """The least-squares fit of `value = group + seed`."""

    def __init__(self, groups: Sequence[Values]) -> None:
        seeds = sorted({seed for values in groups for seed in values})
        cells = [(i, seeds.index(seed), value) for i, values in enumerate(groups) for seed, value in values.items()]
        design = np.zeros((len(cells), len(groups) + len(seeds)))
        for row, (group, seed, _) in enumerate(cells):
            design[row, [group, len(groups) + seed]] = 1
        observed = np.array([value for *_, value in cells])
        self.inverse = np.linalg.pinv(design.T @ design)
        self.effects = self.inverse @ design.T @ observed
        self.resolution = _resolution(observed)
        degrees = len(cells) - int(np.linalg.matrix_rank(design)) if cells else 0
        squares = float(((observed - design @ self.effects) ** 2).sum())
        self.noise = Noise(math.sqrt(squares / degrees), degrees) if degrees else None

    def contrast(self, group: int, baseline: int) -> Difference:
        """The difference of two groups with at least two common seeds, with a p that is not corrected."""
        from scipy import stats

        weights = np.zeros(len(self.effects))
        weights[[group, baseline]] = 1, -1
        mean = float(weights @ self.effects)
        assert self.noise is not None
        error = self.noise.deviation * math.sqrt(float(weights @ self.inverse @ weights))
        if error <= self.resolution:  # equal seeds give equal differences: there is no noise
            return Difference(mean, error, float(abs(mean) <= self.resolution))
        return Difference(mean, error, 2 * float(stats.t.sf(abs(mean) / error, self.noise.degrees)))


def _welch(values: Values, others: Values) -> Difference:
    """Welch's t-test of two groups, one of which has a spread over seeds; p is not corrected."""
    from scipy import stats

    samples = [np.array(list(group.values())) for group in (values, others)]
    difference = float(samples[0].mean() - samples[1].mean())
    squares = np.array([sample.var(ddof=1) / len(sample) for sample in samples])  # squared standard errors
    degrees = squares.sum() ** 2 / sum(squares**2 / [len(sample) - 1 for sample in samples])
    error = math.sqrt(squares.sum())
    return Difference(difference, error, 2 * float(stats.t.sf(abs(difference) / error, degrees)), pooled=False)


def _correct(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """Corrects p for the number of tests: Holm, "A simple sequentially rejective multiple test procedure" (1979)."""
    corrected, largest = list(differences), 0.0
    tested = sorted((d.p, i, d) for i, d in enumerate(differences) if d is not None and d.p is not None)
    for rank, (p, i, difference) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = dataclasses.replace(difference, p=largest)
    return corrected
