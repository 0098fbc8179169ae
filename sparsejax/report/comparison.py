"""The comparison of runs in one metric: groups of runs, the baseline, and verdicts."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsejax import metrics
from sparsejax.overrides import describe_overrides, shorten_keys
from sparsejax.report import statistics
from sparsejax.report.statistics import Difference, Estimate, Noise
from sparsejax.report.table import CHECK, COSTS, DIVERGED, FINISHED, LEAKS, ReportError, Results, column_names

if TYPE_CHECKING:
    import pandas as pd

# The default metric is the first of these that the runs have.
MAIN = (metrics.BITS_PER_CHARACTER, metrics.BITS_PER_BYTE, metrics.ACCURACY, metrics.EVAL_LOSS)
SIGNIFICANCE = 0.05  # p from which a difference may well be chance
TOLERANCE = 0.01  # relative difference of costs up to which they count as equal
SUGGESTIONS = 3  # names that are offered for an unknown one


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs whose mean is taken: those with one label, or with equal values of the requested keys.

    Attributes:
      label: Name of the group.
      runs: Their rows in the table; all are finished and have the metric.
      values: The metric by seed; the mean if several runs have a seed.
      diverged: Number of further runs that diverged; they are in no mean.
      difference: From the baseline; None for the baseline itself.
    """

    label: str
    runs: pd.DataFrame
    values: dict[int, float]
    diverged: int = 0
    difference: Difference | None = None

    @property
    def title(self) -> str:
        """The label, and that a model reads the future if it does."""
        return f"{self.label} ({LEAKS})" if (self.runs[CHECK] == LEAKS).any() else self.label

    @property
    def estimate(self) -> Estimate:
        """The metric over seeds."""
        return statistics.estimate(self.values.values())

    def mean(self, column: str) -> float:
        """The mean of a column over the runs that have a value."""
        return float(self.runs[column].astype(float).mean())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Results, grouped and compared in one metric.

    Attributes:
      results: All runs.
      metric: A column of the table.
      lower: Whether lower is better.
      by: The keys by which runs are grouped; empty for labels.
      groups: In the order of their first runs.
      baseline: The group that others are compared with.
      noise: Of a run, pooled over all groups; None without degrees of freedom.
      lost: Number of runs by label of the groups of which every run diverged.
    """

    results: Results
    metric: str
    lower: bool
    by: tuple[str, ...]
    groups: tuple[Group, ...]
    baseline: Group
    noise: Noise | None
    lost: dict[str, int]

    @property
    def best(self) -> Group:
        """The group with the best mean."""
        return sorted(self.groups, key=lambda group: group.estimate.mean, reverse=not self.lower)[0]

    @property
    def heading(self) -> str:
        """What distinguishes the groups."""
        return ", ".join(shorten_keys(self.by)[key] for key in self.by) or "label"

    @property
    def unfinished(self) -> pd.DataFrame:
        """Rows of the runs that have not ended."""
        return self.results.runs[~self.results.runs["status"].isin([FINISHED, DIVERGED])]

    @property
    def diverged(self) -> pd.DataFrame:
        """Rows of the runs that diverged."""
        return self.results.runs[self.results.runs["status"] == DIVERGED]

    @property
    def without_value(self) -> pd.DataFrame:
        """Rows of the finished runs without a value of the metric."""
        runs = self.results.runs
        return runs[(runs["status"] == FINISHED) & runs[self.metric].isna()]

    def verdict(self, group: Group) -> str:
        """The difference of a group from the baseline in words."""
        difference = group.difference
        if group.diverged:
            return f"{group.diverged} diverged"
        if difference is None:
            return "baseline"
        if difference.mean is None or difference.p is None:
            return f"needs {statistics.MIN_SEEDS} seeds"
        if difference.p >= SIGNIFICANCE:
            return "not significant"
        return "better" if (difference.mean < 0) == self.lower else "worse"

    def excess(self, group: Group, cost: str) -> float | None:
        """Relative difference of a cost from the baseline's; None if they are equal up to `TOLERANCE`, or unknown."""
        expected, actual = self.baseline.mean(cost), group.mean(cost)
        unequal = abs(actual - expected) > TOLERANCE * expected  # False for NaN
        return actual / expected - 1 if unequal and expected else None

    def similar(self, group: Group) -> list[Group]:
        """The groups whose difference from a group is tested and not significant."""
        differences, _ = statistics.compare_groups([other.values for other in self.groups], self.groups.index(group))
        tested = zip(self.groups, differences, strict=True)
        return [other for other, d in tested if d is not None and d.p is not None and d.p >= SIGNIFICANCE]


def compare(
    results: Results, metric: str | None = None, baseline: str | None = None, by: Sequence[str] = ()
) -> Comparison:
    """Groups runs and compares the groups.

    Args:
      results: Runs, from `table.read`.
      metric: A column, or `COLUMN:min` or `COLUMN:max`; defaults to the first of `MAIN` that the runs have.
      baseline: Label of a group; defaults to the first.
      by: Keys of the configuration, or the ends of keys, by which runs are grouped; defaults to labels.

    Raises:
      ReportError: No run has finished, or a metric, baseline or key is unknown.
    """
    finished = results.runs[results.runs["status"] == FINISHED]
    if finished.empty:
        raise ReportError("inputs", f"none of {len(results.runs)} runs has finished")
    name, lower = _choose_metric(finished, metric)
    counted = finished[finished[name].notna()]
    if counted.empty:
        raise ReportError("metric", f"{name} has no value in any of the {len(finished)} finished runs")
    keys = tuple(_resolve_key(key, results.keys) for key in by)
    labels = _label(results.runs[results.runs["status"] == DIVERGED], keys)
    diverged = {str(label): int(count) for label, count in labels.value_counts(sort=False).items()}
    groups = [
        Group(str(label), runs, _average(runs, name), diverged.pop(str(label), 0))
        for label, runs in counted.groupby(_label(counted, keys), sort=False)
    ]
    reference = 0 if baseline is None else _find_group(baseline, groups)
    differences, noise = statistics.compare_groups([group.values for group in groups], reference)
    compared = tuple(dataclasses.replace(group, difference=d) for group, d in zip(groups, differences, strict=True))
    return Comparison(results, name, lower, keys, compared, compared[reference], noise, diverged)


def _label(runs: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """The name of each run's group."""
    if not keys or runs.empty:
        return runs["label"]
    return runs[list(keys)].astype(object).apply(lambda row: describe_overrides(row.to_dict()), axis=1)


def _average(runs: pd.DataFrame, name: str) -> dict[int, float]:
    """A metric by seed."""
    return {int(str(seed)): float(mean) for seed, mean in runs.groupby("seed")[name].mean().items()}


def _choose_metric(finished: pd.DataFrame, requested: str | None) -> tuple[str, bool]:
    """The column, and whether lower is better."""
    if requested is None:
        available = [name for name in MAIN if name in finished and finished[name].notna().any()]
        complete = [name for name in available if finished[name].notna().all()]
        if not available:
            nearest = ", ".join(_nearest("", _metrics(finished)))
            raise ReportError("metric", f"the runs have none of {', '.join(MAIN)}; name one of {nearest}")
        name = (complete or available)[0]
        return name, metrics.direction(name) == "min"
    name, colon, direction = requested.partition(":")
    if name not in _metrics(finished):
        raise ReportError("metric", f"no {name!r}; the nearest are {', '.join(_nearest(name, _metrics(finished)))}")
    if colon and direction not in ("min", "max"):
        raise ReportError("metric", f"write {name}:min or {name}:max, got {requested!r}")
    if not colon and metrics.direction(name) is None:
        raise ReportError("metric", f"the direction of {name} is unknown; write {name}:min or {name}:max")
    return name, (direction if colon else metrics.direction(name)) == "min"


def _metrics(finished: pd.DataFrame) -> list[str]:
    return [name for name in column_names(finished) if "/" in name or name in COSTS]


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=SUGGESTIONS, cutoff=0)


def _resolve_key(requested: str, keys: Sequence[str]) -> str:
    matching = [key for key in keys if key == requested] or [key for key in keys if key.endswith(f".{requested}")]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise ReportError("by", f"{requested!r} is ambiguous: {', '.join(matching)}")
    nearest = f"; the nearest are {', '.join(_nearest(requested, keys))}" if keys else ""
    raise ReportError("by", f"the runs do not differ in a key {requested!r}{nearest}")


def _find_group(label: str, groups: Sequence[Group]) -> int:
    for i, group in enumerate(groups):
        if group.label == label:
            return i
    nearest = ", ".join(map(repr, _nearest(label, [group.label for group in groups])))
    raise ReportError("baseline", f"no finished run has the label {label!r}; the nearest are {nearest}")


def natural_order(value: Any) -> tuple[Any, ...]:
    """Sort key: numbers by size, texts by the numbers in them."""
    if isinstance(value, int | float):
        return (0, value)
    parts = re.split(r"(\d+)", str(value))
    return (1, *(part if i % 2 == 0 else int(part) for i, part in enumerate(parts)))
