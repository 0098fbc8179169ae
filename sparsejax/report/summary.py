"""A comparison in words: the table and the sentences below it, as Markdown."""

from __future__ import annotations

import math
import statistics as simple
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparsejax.metrics import RESTORED, TOKENS_PER_SECOND
from sparsejax.report.comparison import TOLERANCE, Comparison, Group
from sparsejax.report.statistics import MIN_SEEDS, UNEQUAL, Difference, Estimate
from sparsejax.report.table import CHECK, FAILED, NOT_CHECKED

NONE = "-"  # an unknown value
UNEQUAL_COST, UNEQUAL_NOISE = "†", "‡"  # marks of footnotes
MIN_DECIMALS, MAX_DECIMALS, DEFAULT_DECIMALS = 1, 8, 4
BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
FLOPS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


class Cell(NamedTuple):
    """The text of a cell, and the number by which it is sorted, if any."""

    text: str
    number: float | None = None


def summarize(comparison: Comparison) -> str:
    """Returns the summary: heading, table, findings and notes."""
    paragraphs = [f"# {describe_metric(comparison)}", count_runs(comparison), write_table(comparison)]
    paragraphs += describe_findings(comparison)
    if notes := describe_notes(comparison):
        paragraphs.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(paragraphs) + "\n"


def write_table(comparison: Comparison) -> str:
    """Returns the table of groups, of which the best one is bold, and its footnotes."""
    headings, rows = tabulate(comparison)
    best = comparison.groups.index(comparison.best)
    lines = []
    for i, (label, *values) in enumerate(rows):
        lines.append([_embolden(_escape(label.text), i == best), *(_escape(cell.text) for cell in values)])
    return "\n\n".join([_write_markdown(headings, lines), *describe_marks(comparison)])


def write_metrics(comparisons: Sequence[Comparison]) -> str:
    """Returns one table of several comparisons of the same runs, groups by metrics; the best per metric is bold."""
    labels = dict.fromkeys(group.title for comparison in comparisons for group in comparison.groups)
    columns = []
    for comparison in comparisons:
        decimals, best = count_decimals(comparison), comparison.best
        texts = {group.title: write_estimate(group.estimate, decimals).text for group in comparison.groups}
        columns.append({label: _embolden(text, label == best.title) for label, text in texts.items()})
    lines = [[_escape(label), *(column.get(label, NONE) for column in columns)] for label in labels]
    return _write_markdown([comparisons[0].heading, *(comparison.metric for comparison in comparisons)], lines)


def _write_markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [[_escape(heading) for heading in headings], ["---", *(["---:"] * (len(headings) - 1))], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _embolden(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def tabulate(comparison: Comparison, costs: bool = False) -> tuple[list[str], list[list[Cell]]]:
    """Returns headings and a row of cells per group, then one per group without a value, all of whose runs diverged.

    Args:
      comparison: The groups.
      costs: Whether to add cache and speed.
    """
    better = "lower" if comparison.lower else "higher"
    headings = [comparison.heading, "seeds", f"{comparison.metric} ({better} is better)"]
    headings += [f"difference from {comparison.baseline.label}", "p", "verdict"]
    headings += ["parameters", "training FLOPs", "seconds", *(["cache", "tokens/s"] if costs else [])]
    decimals = count_decimals(comparison)
    rows = []
    for group in comparison.groups:
        seconds = group.mean("seconds")
        row = [
            Cell(group.title),
            Cell(_count_seeds(group), len(group.values)),
            write_estimate(group.estimate, decimals),
            write_difference(group.difference, decimals),
            write_p(group.difference),
            Cell(comparison.verdict(group)),
            _mark(write_number(group.mean("parameters"), "{:,.0f}"), comparison.excess(group, "parameters")),
            _mark(write_flops(group.mean("training_flops")), comparison.excess(group, "training_flops")),
            write_number(seconds, "{:,.0f}" if seconds >= 10 else "{:.2g}"),
        ]
        if costs:
            row.append(write_bytes(group.mean("cache_bytes")))
            row.append(write_number(group.mean(TOKENS_PER_SECOND), "{:,.0f}"))
        rows.append(row)
    for label, count in comparison.lost.items():
        blank = [Cell(NONE)] * (len(headings) - 6)
        rows.append([Cell(label), Cell("0", 0), *[Cell(NONE)] * 3, Cell(f"{count} diverged"), *blank])
    return headings, rows


def _mark(cost: Cell, excess: float | None) -> Cell:
    """Adds the difference of a cost from the baseline's, if there is one."""
    if excess is None:
        return cost
    percent = f"{100 * excess:+.{0 if abs(excess) >= 0.1 else 1}f} %"
    return Cell(f"{cost.text} ({percent}){UNEQUAL_COST}", cost.number)


def describe_marks(comparison: Comparison) -> list[str]:
    """The footnotes of the table."""
    notes, baseline = [], comparison.baseline.label
    columns = {"parameters": "parameters", "training_flops": "training FLOPs"}
    unequal = [
        name
        for column, name in columns.items()
        if any(comparison.excess(group, column) is not None for group in comparison.groups)
    ]
    if unequal:
        text = f"{UNEQUAL_COST} More than {100 * TOLERANCE:g} % from the {' or '.join(unequal)} of {baseline}"
        notes.append(f"{text}: the difference may be due to the cost.")
    if any(group.difference and not group.difference.pooled for group in comparison.groups):
        text = f"{UNEQUAL_NOISE} Welch's t-test, without pooled noise: the standard deviation over seeds, or that of"
        notes.append(f"{text} {baseline}, is more than {UNEQUAL:g} times that of the median group.")
    return notes


def describe_metric(comparison: Comparison) -> str:
    """The metric and its direction."""
    return f"{comparison.metric}, {'lower' if comparison.lower else 'higher'} is better"


def count_runs(comparison: Comparison) -> str:
    """Numbers of runs in the table and of runs that are left out."""
    counted = sum(len(group.runs) for group in comparison.groups)
    text = f"{_number(counted, 'finished run')} in {_number(len(comparison.groups), 'group')}"
    left_out = {
        "unfinished": comparison.unfinished,
        "diverged": comparison.diverged,
        "without a value": comparison.without_value,
    }
    text += "".join(f"; {len(rows)} {reason}, left out" for reason, rows in left_out.items() if len(rows))
    return f"{text}. Mean ± standard error over seeds."


def describe_findings(comparison: Comparison) -> list[str]:
    """Sentences about the best group and about the noise and the tests of differences."""
    decimals, best = count_decimals(comparison), comparison.best
    text = f"Best: {best.title}, {write_estimate(best.estimate, decimals).text}."
    if similar := comparison.similar(best):
        text += f" Not significantly different from it: {'; '.join(group.title for group in similar)}."
    return [text, *_describe_tests(comparison)]


def _describe_tests(comparison: Comparison) -> list[str]:
    """How the verdicts are computed: noise, degrees of freedom, number of tests."""
    differences = [group.difference for group in comparison.groups if group.difference is not None]
    tested = [difference for difference in differences if difference.p is not None]
    if not tested:
        return [f"A verdict needs {MIN_SEEDS} seeds in common with the baseline."] if differences else []
    text = "p is from a t-test"
    if comparison.noise is not None:
        deviation = f"{comparison.noise.deviation:.{count_decimals(comparison)}f}"
        noise = f"the standard deviation of a run around the effects of its group and its seed is {deviation}"
        degrees = f"{comparison.noise.degrees} degrees of freedom"
        text = f"Noise: {noise}, pooled over all groups ({degrees}). {text} with this noise"
    return [f"{text}{f', corrected for {len(tested)} tests (Holm)' if len(tested) > 1 else ''}."]


def describe_notes(comparison: Comparison) -> list[str]:
    """Notes about runs that are left out, means over more than seeds, and mixed data, hardware and code."""
    results, metric = comparison.results, comparison.metric
    notes = [f"{_name(row)}: {row['status']} at step {row['step']}" for _, row in comparison.unfinished.iterrows()]
    notes += [f"{_name(row)}: diverged by step {row['step']}" for _, row in comparison.diverged.iterrows()]
    notes += [f"{_name(row)}: finished without a value of {metric}" for _, row in comparison.without_value.iterrows()]
    for group in comparison.groups:
        if mixed := [key for key in results.keys if group.runs[key].nunique() > 1]:
            notes.append(f"{group.label}: its runs differ in {', '.join(mixed)}; the value of a seed is their mean")
    counts = {len(group.values) for group in comparison.groups}
    if len(counts) > 1:
        notes.append(f"groups have between {min(counts)} and {max(counts)} seeds")
    counted = results.runs.loc[[index for group in comparison.groups for index in group.runs.index]]
    corpora, devices, commits = (counted[column].nunique() for column in ("corpus", "device", "git"))
    for verdict, text in ((FAILED, "whose model failed the check"), (NOT_CHECKED, "without a check of the model")):
        if count := int((counted[CHECK] == verdict).sum()):
            notes.append(f"{_number(count, 'run')} {text}")
    for group in comparison.groups:
        restored = group.runs[RESTORED].min() if RESTORED in group.runs else 1.0
        if restored < 1:
            kept = f"the tokenizer gives back {restored:.2%} of the text"
            notes.append(f"{group.label}: {kept}; bits per byte count these bytes only")
    if corpora > 1:
        notes.append(f"the runs read {corpora} different corpora: their metrics are not comparable")
    if devices > 1:
        notes.append(f"the runs used {devices} kinds of devices: their seconds are not comparable")
    if commits > 1:
        notes.append(f"the runs are from {commits} versions of the code (git)")
    return [*notes, *results.notes]


def _name(row: Any) -> str:
    seed = "" if row.isna()["seed"] else f", seed {row['seed']}"
    return f"{row['label']}{seed} ({row['name']})"


def _count_seeds(group: Group) -> str:
    seeds = len(group.values)
    return str(seeds) if len(group.runs) == seeds else f"{seeds} ({len(group.runs)} runs)"


# Numbers.


def count_decimals(comparison: Comparison) -> int:
    """Number of decimals that shows two digits of a typical standard error."""
    return decimals_of([group.estimate.error for group in comparison.groups])


def decimals_of(errors: Sequence[float | None]) -> int:
    """Number of decimals that shows two digits of the median of standard errors."""
    known = [error for error in errors if error and math.isfinite(error)]
    if not known:
        return DEFAULT_DECIMALS
    return min(max(1 - math.floor(math.log10(simple.median(known))), MIN_DECIMALS), MAX_DECIMALS)


def write_estimate(estimate: Estimate, decimals: int) -> Cell:
    """Mean ± standard error; the mean alone for a single value."""
    error = "" if estimate.error is None else f" ± {estimate.error:.{decimals}f}"
    return Cell(f"{estimate.mean:.{decimals}f}{error}", estimate.mean)


def write_difference(difference: Difference | None, decimals: int) -> Cell:
    """Difference ± standard error."""
    if difference is None or difference.mean is None:
        return Cell(NONE)
    error = "" if difference.error is None else f" ± {difference.error:.{decimals}f}"
    return Cell(f"{difference.mean:+.{decimals}f}{error}", difference.mean)


def write_p(difference: Difference | None) -> Cell:
    """The corrected p of a difference."""
    if difference is None or difference.p is None:
        return Cell(NONE)
    text = "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"
    return Cell(text if difference.pooled else f"{text} {UNEQUAL_NOISE}", difference.p)


def write_number(value: float, form: str) -> Cell:
    """A number in a format."""
    return Cell(NONE) if math.isnan(value) else Cell(form.format(value), value)


def write_bytes(value: float) -> Cell:
    """Bytes with a binary unit."""
    return _scale(value, 1024, BYTES)


def write_flops(value: float) -> Cell:
    """FLOPs with a decimal unit."""
    return _scale(value, 1000, FLOPS)


def _scale(value: float, base: int, units: Sequence[str]) -> Cell:
    if math.isnan(value):
        return Cell(NONE)
    power = 0
    while value / base**power >= base and power < len(units) - 1:
        power += 1
    return Cell(f"{value / base**power:.3g} {units[power]}".strip(), value)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _escape(text: str) -> str:
    """A text in a cell of Markdown."""
    return " ".join(text.replace("|", "\\|").split())
