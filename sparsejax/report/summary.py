"""A study in words: the table and the sentences below it, as markdown."""

from __future__ import annotations

import math
import statistics as simple
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sparsejax.report.statistics import SURE, Comparison, Estimate, compare
from sparsejax.report.study import Setting, Study

NONE = "-"  # what is not known, and not made up
FEWEST_DECIMALS, MOST_DECIMALS, PLAIN_DECIMALS = 1, 8, 4
FACTORS = ("B", "KiB", "MiB", "GiB", "TiB")
FLOPS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


class Cell(NamedTuple):
    """What stands in a table, and the number it is sorted by, if it is one."""

    text: str
    number: float | None = None


def summarize(study: Study) -> str:
    """The summary as markdown: heading, table, sentences."""
    lines = [f"# {describe_metric(study)}", count_runs(study), write_table(study), *describe_findings(study)]
    notes = describe_notes(study)
    if notes:
        lines.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(lines) + "\n"


def write_table(study: Study) -> str:
    """The table of settings as markdown; the best is in bold letters."""
    headings, rows = tabulate(study)
    lines = []
    for setting, row in zip(study.settings, rows, strict=True):
        label, *rest = (_escape(cell.text) for cell in row)
        lines.append([_embolden(label, setting is study.best), *rest])
    return _write_markdown(headings, lines)


def write_metrics(studies: Sequence[Study]) -> str:
    """One table of several studies of the same runs as markdown: settings by metrics; the best of each is in bold."""
    labels = dict.fromkeys(one.label for study in studies for one in study.settings)
    columns = []
    for study in studies:
        decimals, found = count_decimals(study), {one.label: one for one in study.settings}
        columns.append(
            {
                label: _embolden(write_estimate(one.estimate, decimals).text, one is study.best)
                for label, one in found.items()
            }
        )
    lines = [[_escape(label), *(column.get(label, NONE) for column in columns)] for label in labels]
    return _write_markdown(["setting", *(study.metric for study in studies)], lines)


def _write_markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [[_escape(heading) for heading in headings], ["---", *(["---:"] * (len(headings) - 1))], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _embolden(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def tabulate(study: Study, costs: bool = False) -> tuple[list[str], list[list[Cell]]]:
    """Headings, and a row of cells for each setting; with `costs` also FLOPs, cache and speed."""
    better = "lower" if study.lower else "higher"
    headings = ["setting", "seeds", f"{study.metric} ({better} is better)", f"difference from {study.baseline.label}"]
    headings += ["seed noise", "p", "verdict", "parameters", "seconds"]
    headings += ["training FLOPs", "cache", "tokens/s"] if costs else []
    decimals = count_decimals(study)
    rows = []
    for one in study.settings:
        compared = one.comparison
        rows.append(
            [
                Cell(one.label),
                Cell(_count_seeds(one), len(one.values)),
                write_estimate(one.estimate, decimals),
                write_difference(compared, decimals),
                Cell(NONE) if compared is None else write_noise(study, decimals),
                write_p(compared),
                Cell(study.judge(compared)),
                write_number(one.mean("parameters"), "{:,.0f}"),
                write_number(one.mean("seconds"), "{:,.0f}" if one.mean("seconds") >= 10 else "{:.2g}"),
            ]
        )
        if costs:
            rows[-1] += [
                write_flops(one.mean("training_flops")),
                write_bytes(one.mean("cache_bytes")),
                write_number(one.mean("tokens_per_second"), "{:,.0f}"),
            ]
    return headings, rows


def describe_metric(study: Study) -> str:
    """The metric, and which way is up."""
    return f"{study.metric}, {'lower' if study.lower else 'higher'} is better"


def count_runs(study: Study) -> str:
    """How many runs went into the table, and how many did not."""
    counted = sum(len(one.runs) for one in study.settings)
    text = f"{_number(counted, 'finished run')} of {_number(len(study.settings), 'setting')}"
    for rows, what in ((study.unfinished, "not finished"), (study.without_value, "finished without a value")):
        text += f"; {len(rows)} {what}, left out" if len(rows) else ""
    return f"{text}. Mean ± standard error over seeds; differences are paired by seed, p is that of a paired t-test."


def describe_findings(study: Study) -> list[str]:
    """The best settings, the noise, and how sure a reader can be, in sentences."""
    decimals = count_decimals(study)
    best = study.best
    text = f"Best: {best.label}, {write_estimate(best.estimate, decimals).text}."
    others = [(one, compare(one.values, best.values)) for one in study.settings if one is not best]
    alike = [one.label for one, compared in others if compared.below_noise]
    unknown = [one.label for one, compared in others if compared.below_noise is None]
    if alike:
        text += f" Not told apart from it, the difference being smaller than twice its standard error: {_list(alike)}."
    if unknown:
        text += f" With fewer than two seeds in common, nothing can be said of its difference from {_list(unknown)}."
    noise = "Seed noise is unknown: no setting has two seeds."
    if study.noise is not None:
        noise = f"Seed noise: a standard deviation of {study.noise:.{decimals}f} over the seeds of a setting."
    return [text, " ".join([noise, *_describe_threshold(study)])]


def _describe_threshold(study: Study) -> list[str]:
    """What twice the standard error means with so few seeds, and of how many comparisons this is."""
    from scipy import stats

    compared = [one.comparison for one in study.settings if one.comparison and one.comparison.pairs > 1]
    if not compared:
        return []
    pairs = min(comparison.pairs for comparison in compared)
    p = 2 * float(stats.t.sf(SURE, pairs - 1))
    text = f"A difference of twice its standard error has p = {p:.2f} with {pairs} seeds"
    return [f"{text}; p is not corrected for {len(compared)} comparisons." if len(compared) > 1 else f"{text}."]


def describe_notes(study: Study) -> list[str]:
    """What must not be overlooked: runs that are left out, means over more than seeds, mixed data and hardware."""
    notes = [f"{_name(row)}: {row['status']}, at step {row['step']}" for _, row in study.unfinished.iterrows()]
    notes += [f"{_name(row)}: finished without a value of {study.metric}" for _, row in study.without_value.iterrows()]
    for one in study.settings:
        mixed = [key for key in study.results.keys if one.runs[key].nunique() > 1]
        if mixed:
            notes.append(f"{one.label}: its runs differ in {_list(mixed)}; the value of a seed is their mean")
    counts = {len(one.values) for one in study.settings}
    if len(counts) > 1:
        notes.append(f"settings have from {min(counts)} to {max(counts)} seeds")
    counted = study.results.runs.loc[[index for one in study.settings for index in one.runs.index]]
    for column, why in (("corpus", "their metrics do not compare"), ("device", "their seconds do not compare")):
        kinds = counted[column].nunique()
        if kinds > 1:
            notes.append(f"the runs are of {kinds} different {column}s ({column}): {why}".replace("corpuss", "corpora"))
    if counted["git"].nunique() > 1:
        notes.append(f"the runs are of {counted['git'].nunique()} states of the code (git)")
    return [*notes, *study.results.notes]


def _name(row: Any) -> str:
    seed = "" if row.isna()["seed"] else f", seed {row['seed']}"
    return f"{row['label']}{seed} ({row['name']})"


def _count_seeds(one: Setting) -> str:
    return str(len(one.values)) if len(one.runs) == len(one.values) else f"{len(one.values)} ({len(one.runs)} runs)"


# Numbers.


def count_decimals(study: Study) -> int:
    """Decimals that show two digits of a typical standard error."""
    errors = [one.estimate.error for one in study.settings if one.estimate.error]
    if not errors:
        return PLAIN_DECIMALS
    return min(max(1 - math.floor(math.log10(simple.median(errors))), FEWEST_DECIMALS), MOST_DECIMALS)


def write_estimate(found: Estimate, decimals: int) -> Cell:
    """Mean ± standard error; the mean alone where there is but one value."""
    error = "" if found.error is None else f" ± {found.error:.{decimals}f}"
    return Cell(f"{found.mean:.{decimals}f}{error}", found.mean)


def write_difference(compared: Comparison | None, decimals: int) -> Cell:
    """Difference ± its standard error."""
    if compared is None or compared.difference is None:
        return Cell(NONE)
    error = "" if compared.error is None else f" ± {compared.error:.{decimals}f}"
    return Cell(f"{compared.difference:+.{decimals}f}{error}", compared.difference)


def write_noise(study: Study, decimals: int) -> Cell:
    """The standard deviation over seeds."""
    return Cell(NONE) if study.noise is None else Cell(f"{study.noise:.{decimals}f}", study.noise)


def write_p(compared: Comparison | None) -> Cell:
    """The p of a paired t-test."""
    if compared is None or compared.p is None:
        return Cell(NONE)
    return Cell("< 0.001" if compared.p < 0.001 else f"{compared.p:.3f}", compared.p)


def write_number(value: float, form: str) -> Cell:
    """A number in a given form."""
    return Cell(NONE) if math.isnan(value) else Cell(form.format(value), value)


def write_bytes(value: float) -> Cell:
    """Bytes in the largest unit of which there is at least one."""
    return _scale(value, 1024, FACTORS, " ")


def write_flops(value: float) -> Cell:
    """FLOPs in the largest decimal unit of which there is at least one."""
    return _scale(value, 1000, FLOPS, " ")


def _scale(value: float, base: int, units: Sequence[str], gap: str) -> Cell:
    if math.isnan(value):
        return Cell(NONE)
    power = 0
    while value / base**power >= base and power < len(units) - 1:
        power += 1
    return Cell(f"{value / base**power:.3g}{gap}{units[power]}".strip(), value)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def _escape(text: str) -> str:
    """A text in a cell of markdown."""
    return " ".join(text.replace("|", "\\|").split())
