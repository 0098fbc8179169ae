"""What is asked of the runs: which metric, which of them belong together, and what they are compared with."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsejax.report import statistics
from sparsejax.report.statistics import Comparison, Estimate
from sparsejax.report.table import COSTS, FINISHED, ReportError, Results, describe

if TYPE_CHECKING:
    import pandas as pd

# Metrics that are reported if none is named: the first that the runs have. Which way is up, by what a name begins with.
MAIN = ("eval/bits_per_character", "eval/bits_per_byte", "eval/accuracy", "eval/loss")
LOWER = ("eval/loss", "eval/bits", "train/loss", *(cost for cost in COSTS if cost != "tokens_per_second"))
HIGHER = ("eval/accuracy", "eval/exact_match", "tokens_per_second")
LIKELY = 0.05  # from this p on a difference may well be chance
NEAR = 3  # names that are offered for one that is not known


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but what means are taken over: the seed, unless they were put together otherwise.

    Attributes:
      label: Its name.
      runs: Their rows in the table; all are finished and have the metric.
      values: The metric by seed; where a seed has several runs, their mean.
      comparison: With the baseline; None for the baseline itself.
    """

    label: str
    runs: pd.DataFrame
    values: dict[int, float]
    comparison: Comparison | None = None

    @property
    def estimate(self) -> Estimate:
        """The metric over seeds."""
        return statistics.estimate(self.values.values())

    def mean(self, column: str) -> float:
        """The mean of a column over the runs that have a value there."""
        return float(self.runs[column].astype(float).mean())


@dataclasses.dataclass(frozen=True)
class Study:
    """A table of results, and what it says of one metric.

    Attributes:
      results: All runs.
      metric: A column of the table.
      lower: Whether lower is better.
      by: The keys that put runs together; none: their labels.
      settings: In the order of their first runs.
      baseline: One of them.
      noise: The standard deviation over seeds within a setting, from all settings together.
    """

    results: Results
    metric: str
    lower: bool
    by: tuple[str, ...]
    settings: tuple[Setting, ...]
    baseline: Setting
    noise: float | None

    @property
    def best(self) -> Setting:
        """The setting with the best mean."""
        return sorted(self.settings, key=lambda one: one.estimate.mean, reverse=not self.lower)[0]

    @property
    def unfinished(self) -> pd.DataFrame:
        """Rows of the runs that have not ended."""
        return self.results.runs[self.results.runs["status"] != FINISHED]

    @property
    def without_value(self) -> pd.DataFrame:
        """Rows of the runs that have ended without a value of the metric, such as after a loss that was not finite."""
        runs = self.results.runs
        return runs[(runs["status"] == FINISHED) & runs[self.metric].isna()]

    def judge(self, comparison: Comparison | None) -> str:
        """A comparison in words."""
        if comparison is None:
            return "baseline"
        if comparison.below_noise is None:
            return "too few seeds"
        if comparison.below_noise:
            return "below noise"
        verdict = "better" if (comparison.difference < 0) == self.lower else "worse"
        # With few seeds, twice the standard error happens by chance more often than one would think.
        return verdict if comparison.p is None or comparison.p < LIKELY else f"perhaps {verdict}"


def study(results: Results, metric: str | None = None, baseline: str | None = None, by: Sequence[str] = ()) -> Study:
    """Puts runs together and compares them.

    Args:
      results: from `table.read`.
      metric: a column, or `COLUMN:min` or `COLUMN:max`; the first of `MAIN` that the runs have if None.
      baseline: the label of a setting; the first if None.
      by: keys of the configuration, whole or their last parts, that put runs together; their labels if empty.

    Raises:
      ReportError: no finished run; a metric, baseline or key that there is not, with the nearest names.
    """
    finished = results.runs[results.runs["status"] == FINISHED]
    if finished.empty:
        raise ReportError(f"no finished run: of {len(results.runs)} runs none has a result.json")
    name, lower = _choose_metric(finished, metric)
    counted = finished[finished[name].notna()]
    if counted.empty:
        raise ReportError(f"--metric: {name} has no value in any of the {len(finished)} finished runs")
    keys = tuple(_find_key(key, results.keys) for key in by)
    labels = counted["label"]
    if keys:
        labels = counted[list(keys)].astype(object).apply(lambda row: describe(row.to_dict()), axis=1)
    groups = counted.groupby(labels, sort=False)
    settings = [
        Setting(label, runs, {int(seed): float(value) for seed, value in runs.groupby("seed")[name].mean().items()})
        for label, runs in groups
    ]
    first = settings[0] if baseline is None else _find_setting(baseline, settings)
    compared = [
        one if one is first else dataclasses.replace(one, comparison=statistics.compare(one.values, first.values))
        for one in settings
    ]
    noise = statistics.pool_deviations([list(one.values.values()) for one in settings])
    return Study(results, name, lower, keys, tuple(compared), first, noise)


def _choose_metric(finished: pd.DataFrame, given: str | None) -> tuple[str, bool]:
    """The column, and whether lower is better."""
    if given is None:
        have = [name for name in MAIN if name in finished and finished[name].notna().any()]
        name = next((name for name in have if finished[name].notna().all()), next(iter(have), None))
        if name is None:
            raise ReportError(f"--metric: the runs have none of {', '.join(MAIN)}; name one of {_offer('', finished)}")
        return name, name.startswith(LOWER)
    name, colon, direction = given.partition(":")
    if name not in _metrics(finished):
        raise ReportError(f"--metric: no {name!r}; the nearest are {_offer(name, finished)}")
    if colon and direction not in ("min", "max"):
        raise ReportError(f"--metric: {name}:min or {name}:max, got {given!r}")
    if not colon and not name.startswith(LOWER + HIGHER):
        raise ReportError(f"--metric: is more of {name} better or less? write {name}:max or {name}:min")
    return name, direction == "min" if colon else name.startswith(LOWER)


def _metrics(finished: pd.DataFrame) -> list[str]:
    return [name for name in finished if "/" in name or name in COSTS]


def _offer(name: str, finished: pd.DataFrame) -> str:
    return ", ".join(_nearest(name, _metrics(finished)))


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=NEAR, cutoff=0)


def _find_key(given: str, keys: Sequence[str]) -> str:
    found = [key for key in keys if key == given] or [key for key in keys if key.endswith(f".{given}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ReportError(f"--by: {given!r} is the end of {' and of '.join(found)}")
    near = f"; the nearest are {', '.join(_nearest(given, keys))}" if keys else ""
    raise ReportError(f"--by: the runs do not differ in a key {given!r}{near}")


def _find_setting(label: str, settings: Sequence[Setting]) -> Setting:
    for one in settings:
        if one.label == label:
            return one
    near = ", ".join(map(repr, _nearest(label, [one.label for one in settings])))
    raise ReportError(f"--baseline: no finished run is labelled {label!r}; the nearest are {near}")


def natural_order(value: Any) -> tuple:
    """For sorting: numbers by size, texts by the numbers in them."""
    if isinstance(value, int | float):
        return (0, value)
    parts = re.split(r"(\d+)", str(value))
    return (1, *(part if i % 2 == 0 else int(part) for i, part in enumerate(parts)))
