"""Rows of a data set as text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import cast

import numpy as np

from sparsejax.data.dataset import Dataset
from sparsejax.data.rows import Batch

MAX_POSITIONS = 400  # shown per row


def preview(dataset: Dataset, seed: int, count: int) -> Iterator[str]:
    """Yields lines that show the first training rows of a run.

    A row is shown by its inputs, by its targets where they are not simply the next token, and by the segments of the
    documents that share it.
    """
    rows = (
        cast(Batch, {name: values[index] for name, values in batch.items()})
        for batch in iter(dataset.train_batches(dataset.config.readers, seed).__next__, None)
        for index in range(dataset.config.readers)
    )
    for number, row in enumerate(islice(rows, count)):
        scored = int((row["weights"] > 0).sum())
        yield f"row {number}: {scored:,} of {len(row['weights']):,} positions are scored"
        yield f"  inputs   {_show(dataset, row['inputs'][:MAX_POSITIONS])}"
        if scored < len(row["weights"]) or dataset.scores_accuracy:
            yield f"  targets  {_show_targets(dataset, row)}"
        if "segments" in row:
            yield f"  segments {_show_segments(row)}"


def _show(dataset: Dataset, tokens: np.ndarray) -> str:
    if dataset.tokenizer is None:
        return " ".join(map(str, tokens.tolist()))
    return repr(dataset.tokenizer.decode(tokens))[1:-1]


def _show_targets(dataset: Dataset, row: Batch) -> str:
    scored = np.flatnonzero(row["weights"] > 0)
    if len(scored) == len(row["weights"]):
        return _show(dataset, row["targets"][:MAX_POSITIONS])
    runs = np.split(scored, np.flatnonzero(np.diff(scored) > 1) + 1)
    classes = dataset.config.objective == "classify"
    shown = []
    for run in (run for run in runs[:MAX_POSITIONS] if len(run) and run[0] < MAX_POSITIONS):
        targets = row["targets"][run]
        shown.append(f"{run[0]}: {targets[0] if classes else _show(dataset, targets)}")
    return " | ".join(shown)


def _show_segments(row: Batch) -> str:
    segments, positions = row["segments"], row["positions"]
    shown = []
    for segment in range(1, segments.max(initial=0) + 1):
        inside = np.flatnonzero(segments == segment)
        first, last = inside[0], inside[-1]
        shown.append(f"{first}-{last} (positions {positions[first]}-{positions[last]})")
    padding = int((segments == 0).sum())
    return ", ".join(shown) + (f", padding {padding}" if padding else "")
