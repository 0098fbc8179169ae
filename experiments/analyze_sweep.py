"""Analyzes the runs of a sweep on a probe: accuracy by schedule, seed and cell, and a figure of the means.

    python experiments/analyze_sweep.py runs/needle needle --out=experiments/needle

The same command resumes: analyzed runs are kept in the folder `analysis` of the sweep. Runs that are not complete are
skipped.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

import sparsejax
from sparsejax import analysis
from sparsejax.analysis.figures import draw_cells, mark_unreachable, new_axes, note, outline_reachable
from sparsejax.figures import write_figure
from sparsejax.palette import SERIES

OPTIONS = {  # by kind: changes of the section data, and options of the analysis
    "needle": ({}, dict(lengths=(64, 128, 192), depths=tuple(i / 8 for i in range(9)), examples=32)),
    "retrieval": ({"length": 27, "probe.queries": 1}, dict(examples=128)),
}
COLUMNS = {"needle": ("length", "depth"), "retrieval": ("pair",)}


def analyze(workdir, kind):
    """Yields a row per run and cell: label, seed, the cell, accuracy, and whether the schedule predicts an answer."""
    data, options = OPTIONS[kind]
    for name, run in json.loads((workdir / "sweep.json").read_text())["runs"].items():
        folder = workdir / "runs" / name
        if not (folder / "result.json").exists():
            print(f"{run['label']}, seed {run['seed']}: not complete")
            continue
        out = workdir / "analysis" / name
        findings = analysis.analyze(sparsejax.load(folder), kind, out, data, **options)
        print(f"{run['label']}, seed {run['seed']}:", *findings.lines, flush=True)
        for row in findings.tables["accuracy"]:
            cell = {column: row[column] for column in COLUMNS[kind]}
            measured = {"accuracy": round(row["accuracy"], 6), "reachable": row["reachable"]}
            yield {"schedule": run["label"], "seed": run["seed"]} | cell | measured


def average(rows, kind):
    """Returns mean, standard error over seeds and reachability by schedule and cell."""
    groups = {}
    for row in rows:
        groups.setdefault((row["schedule"], *(row[column] for column in COLUMNS[kind])), []).append(row)
    return {key: summarize(group) for key, group in groups.items()}


def summarize(group):
    values = np.array([row["accuracy"] for row in group])
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return values.mean(), error, group[0]["reachable"]


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_needle(means):
    """Heat maps of length and depth, a panel per schedule, with the boundary of the receptive field."""
    schedules, lengths, depths = (list(dict.fromkeys(key[i] for key in means)) for i in range(3))
    figure, axes = new_axes(2, -(-len(schedules) // 2), width=2.3, height=2.6)
    for axis, schedule in zip(axes, schedules, strict=False):
        cells = np.array([[means[schedule, n, depth] for n in lengths] for depth in depths])
        draw_cells(axis, cells[..., 0], [f"{depth:g}" for depth in depths], [f"{n}" for n in lengths])
        outline_reachable(axis, cells[..., 2] >= 0.5)
        axis.set(xlabel="length (tokens)", ylabel="depth")
        note(axis, schedule)
    return figure


def draw_retrieval(means):
    """Accuracy by position of the pair, a panel per schedule, with unreachable pairs in grey."""
    schedules, pairs = (list(dict.fromkeys(key[i] for key in means)) for i in range(2))
    figure, axes = new_axes(1, len(schedules), width=2.5, height=2.4)
    for axis, schedule in zip(axes, schedules, strict=True):
        accuracy, error, reachable = zip(*(means[schedule, pair] for pair in pairs), strict=True)
        mark_unreachable(axis, pairs, [share >= 0.5 for share in reachable])
        axis.errorbar(pairs, accuracy, error, color=SERIES[0], marker="o", markersize=3.5, linewidth=1.3, capsize=2)
        axis.axhline(1 / 16, color="#666666", linewidth=1, linestyle="dotted")
        axis.set(xlabel="position of the pair (0: start)", ylabel="accuracy", ylim=(-0.02, 1.04), xticks=pairs)
        note(axis, schedule)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("kind", choices=list(OPTIONS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = list(analyze(options.workdir, options.kind))
    means = average(rows, options.kind)
    write_rows(options.out / "accuracy.csv", rows)
    names = ("schedule", *COLUMNS[options.kind], "mean", "standard_error", "reachable")
    table = [dict(zip(names, (*key, *(round(float(v), 6) for v in cell)), strict=True)) for key, cell in means.items()]
    write_rows(options.out / "means.csv", table)
    draw = {"needle": draw_needle, "retrieval": draw_retrieval}[options.kind]
    write_figure(lambda: draw(means), options.out / "accuracy.png")


if __name__ == "__main__":
    main()
