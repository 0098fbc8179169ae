"""Examples of a data set for people to read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from sparsejax.data.dataset import Dataset
from sparsejax.data.rows import Batch

SHOWN = 400  # positions of a row that are shown at most


def preview(dataset: Dataset, seed: int, count: int) -> Iterator[str]:
    """The first training rows of a run, in lines.

    Of each: what a model reads; what it is to predict where it is scored, if that is not simply the next token; and the
    documents that share the row, with their positions.
    """
    batches = dataset.train_batches(1, seed)
    for number, batch in enumerate(islice(batches, count)):
        row = {name: values[0] for name, values in batch.items()}
        scored = int((row["weights"] > 0).sum())
        yield f"row {number}: {scored:,} of {len(row['weights']):,} positions are scored"
        yield f"  inputs   {_show(dataset, row['inputs'][:SHOWN])}"
        if scored < len(row["weights"]) or dataset.answers:
            yield f"  targets  {_show_targets(dataset, row)}"
        if "segments" in row:
            yield f"  segments {_show_segments(row)}"


def _show(dataset: Dataset, tokens: np.ndarray) -> str:
    if dataset.tokenizer is None:
        return " ".join(map(str, tokens.tolist()))
    return repr(dataset.tokenizer.decode(tokens))[1:-1]


def _show_targets(dataset: Dataset, row: Batch) -> str:
    places = np.flatnonzero(row["weights"] > 0)
    if len(places) == len(row["weights"]):
        return _show(dataset, row["targets"][:SHOWN])
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    classes = dataset.config.objective == "classify"
    shown = []
    for run in (run for run in runs[:SHOWN] if len(run) and run[0] < SHOWN):
        targets = row["targets"][run]
        shown.append(f"{run[0]}: {targets[0] if classes else _show(dataset, targets)}")
    return " | ".join(shown)


def _show_segments(row: Batch) -> str:
    segments, positions = row["segments"], row["positions"]
    shown = []
    for segment in range(1, segments.max(initial=0) + 1):
        places = np.flatnonzero(segments == segment)
        shown.append(f"{places[0]}-{places[-1]} (positions {positions[places[0]]}-{positions[places[-1]]})")
    padding = int((segments == 0).sum())
    return ", ".join(shown) + (f", padding {padding}" if padding else "")
