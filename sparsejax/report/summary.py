"""A comparison in words: the table and the sentences below it, as Markdown."""

from __future__ import annotations

import math
import statistics as simple
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparsejax.metrics import TOKENS_PER_SECOND
from sparsejax.report.comparison import Comparison, Group
from sparsejax.report.statistics import NOISE_FACTOR, Difference, Estimate, paired_difference

NONE = "-"  # an unknown value
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
    """Returns the table of groups; the best one is bold."""
    headings, rows = tabulate(comparison)
    lines = []
    for group, row in zip(comparison.groups, rows, strict=True):
        label, *values = (_escape(cell.text) for cell in row)
        lines.append([_embolden(label, group is comparison.best), *values])
    return _write_markdown(headings, lines)


def write_metrics(comparisons: Sequence[Comparison]) -> str:
    """Returns one table of several comparisons of the same runs, groups by metrics; the best per metric is bold."""
    labels = dict.fromkeys(group.label for comparison in comparisons for group in comparison.groups)
    columns = []
    for comparison in comparisons:
        decimals, best = count_decimals(comparison), comparison.best
        texts = {group.label: write_estimate(group.estimate, decimals).text for group in comparison.groups}
        columns.append({label: _embolden(text, label == best.label) for label, text in texts.items()})
    lines = [[_escape(label), *(column.get(label, NONE) for column in columns)] for label in labels]
    return _write_markdown(["group", *(comparison.metric for comparison in comparisons)], lines)


def _write_markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [[_escape(heading) for heading in headings], ["---", *(["---:"] * (len(headings) - 1))], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _embolden(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def tabulate(comparison: Comparison, costs: bool = False) -> tuple[list[str], list[list[Cell]]]:
    """Returns headings and a row of cells per group; with `costs` also FLOPs, cache and speed."""
    better = "lower" if comparison.lower else "higher"
    headings = ["group", "seeds", f"{comparison.metric} ({better} is better)"]
    headings += [f"difference from {comparison.baseline.label}", "seed noise", "p", "verdict", "parameters", "seconds"]
    headings += ["training FLOPs", "cache", "tokens/s"] if costs else []
    decimals = count_decimals(comparison)
    rows = []
    for group in comparison.groups:
        difference, seconds = group.difference, group.mean("seconds")
        row = [
            Cell(group.label),
            Cell(_count_seeds(group), len(group.values)),
            write_estimate(group.estimate, decimals),
            write_difference(difference, decimals),
            Cell(NONE) if difference is None else write_noise(comparison, decimals),
            write_p(difference),
            Cell(comparison.verdict(difference)),
            write_number(group.mean("parameters"), "{:,.0f}"),
            write_number(seconds, "{:,.0f}" if seconds >= 10 else "{:.2g}"),
        ]
        if costs:
            row.append(write_flops(group.mean("training_flops")))
            row.append(write_bytes(group.mean("cache_bytes")))
            row.append(write_number(group.mean(TOKENS_PER_SECOND), "{:,.0f}"))
        rows.append(row)
    return headings, rows


def describe_metric(comparison: Comparison) -> str:
    """The metric and its direction."""
    return f"{comparison.metric}, {'lower' if comparison.lower else 'higher'} is better"


def count_runs(comparison: Comparison) -> str:
    """Numbers of runs in the table and of runs that are left out."""
    counted = sum(len(group.runs) for group in comparison.groups)
    text = f"{_number(counted, 'finished run')} in {_number(len(comparison.groups), 'group')}"
    for rows, reason in ((comparison.unfinished, "unfinished"), (comparison.without_value, "without a value")):
        text += f"; {len(rows)} {reason}, left out" if len(rows) else ""
    return f"{text}. Mean ± standard error over seeds; differences are paired by seed, p is from a paired t-test."


def describe_findings(comparison: Comparison) -> list[str]:
    """Sentences about the best group, the noise, and the certainty of the differences."""
    decimals, best = count_decimals(comparison), comparison.best
    text = f"Best: {best.label}, {write_estimate(best.estimate, decimals).text}."
    noise = {
        group.label: paired_difference(group.values, best.values).below_noise
        for group in comparison.groups
        if group is not best
    }
    if similar := [label for label, below in noise.items() if below]:
        text += f" The difference is below twice its standard error for: {', '.join(similar)}."
    if unknown := [label for label, below in noise.items() if below is None]:
        text += f" Fewer than two common seeds, so that the difference is uncertain: {', '.join(unknown)}."
    spread = "Seed noise is unknown: no group has two seeds."
    if comparison.noise is not None:
        spread = f"Seed noise: the standard deviation over the seeds of a group is {comparison.noise:.{decimals}f}."
    return [text, " ".join([spread, *_describe_threshold(comparison)])]


def _describe_threshold(comparison: Comparison) -> list[str]:
    """The p of twice the standard error with the number of seeds, and the number of comparisons."""
    from scipy import stats

    pairs = [group.difference.pairs for group in comparison.groups if group.difference and group.difference.pairs > 1]
    if not pairs:
        return []
    p = 2 * float(stats.t.sf(NOISE_FACTOR, min(pairs) - 1))
    text = f"A difference of twice its standard error has p = {p:.2f} with {min(pairs)} seeds"
    return [f"{text}; p is not corrected for {len(pairs)} comparisons." if len(pairs) > 1 else f"{text}."]


def describe_notes(comparison: Comparison) -> list[str]:
    """Notes about runs that are left out, means over more than seeds, and mixed data, hardware and code."""
    results, metric = comparison.results, comparison.metric
    notes = [f"{_name(row)}: {row['status']} at step {row['step']}" for _, row in comparison.unfinished.iterrows()]
    notes += [f"{_name(row)}: finished without a value of {metric}" for _, row in comparison.without_value.iterrows()]
    for group in comparison.groups:
        if mixed := [key for key in results.keys if group.runs[key].nunique() > 1]:
            notes.append(f"{group.label}: its runs differ in {', '.join(mixed)}; the value of a seed is their mean")
    counts = {len(group.values) for group in comparison.groups}
    if len(counts) > 1:
        notes.append(f"groups have between {min(counts)} and {max(counts)} seeds")
    counted = results.runs.loc[[index for group in comparison.groups for index in group.runs.index]]
    corpora, devices, commits = (counted[column].nunique() for column in ("corpus", "device", "git"))
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
    errors = [group.estimate.error for group in comparison.groups if group.estimate.error]
    if not errors:
        return DEFAULT_DECIMALS
    return min(max(1 - math.floor(math.log10(simple.median(errors))), MIN_DECIMALS), MAX_DECIMALS)


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


def write_noise(comparison: Comparison, decimals: int) -> Cell:
    """Standard deviation over seeds."""
    return Cell(NONE) if comparison.noise is None else Cell(f"{comparison.noise:.{decimals}f}", comparison.noise)


def write_p(difference: Difference | None) -> Cell:
    """The p of a paired t-test."""
    if difference is None or difference.p is None:
        return Cell(NONE)
    return Cell("< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}", difference.p)


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
