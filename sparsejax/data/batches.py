"""Batches for training and evaluation, as functions of a seed and a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.rows import Batch, Rows, Windows

if TYPE_CHECKING:
    import grain

ENDLESS = 1 << 48  # steps; longer than any run
Transform = Callable[[Batch, np.ndarray], Batch]  # takes a batch and the row numbers, int64 [b]


def train_batches(
    data: np.ndarray, length: int, batch: int, seed: int, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Iterates endlessly over shuffled windows of a token stream; see `shuffled_batches`.

    Args:
      data: Tokens [n].
      length: Tokens per window, t.
      batch: Rows per global batch.
      seed: Any non-negative integer.
      process_index: Index of this process; it returns the `process_index`-th contiguous share of each global batch.
      process_count: Number of processes that share the global batch.

    Returns:
      An iterator over `Batch`: inputs int32 [b, t], targets int32 [b, t] (the next token) and weights float32 [b, t]
      (ones), where b = batch / process_count.

    Raises:
      DataError: The stream is shorter than a window, or `batch` is not divisible by `process_count`.
    """
    require_window(data, length, "training")
    return shuffled_batches(
        Windows(data, length), batch, seed, process_index=process_index, process_count=process_count
    )


def shuffled_batches(
    rows: Rows,
    batch: int,
    seed: int,
    *,
    transform: Transform | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates endlessly over rows, reshuffled every epoch; batch i is a function of `seed` and i alone.

    The state of the iterator (`get_state`, `set_state`, `grain.checkpoint`) is the number of batches read. A batch
    may span two epochs, so no row is dropped.

    Args:
      rows: Rows of an epoch.
      batch: Rows per global batch.
      seed: Any non-negative integer.
      transform: Applied to every batch. Its second argument numbers the rows of the batch within the run, int64 [b].
      process_index: Index of this process; it returns the `process_index`-th contiguous share of each global batch.
      process_count: Number of processes that share the global batch.

    Raises:
      DataError: There are no rows, or `batch` is not divisible by `process_count`.
    """
    if not len(rows):
        raise DataError("data.files", "there are no rows to train on")
    draw = functools.partial(draw_shuffled, rows, seed=seed, transform=transform)
    return numbered_batches(draw, batch, process_index=process_index, process_count=process_count)


def draw_shuffled(rows: Rows, numbers: np.ndarray, seed: int, transform: Transform | None = None) -> Batch:
    """Returns rows by their numbers in an endless sequence of epochs, each shuffled by `seed` and its number.

    Args:
      rows: Rows of an epoch.
      numbers: int64 [b].
      seed: Any non-negative integer.
      transform: See `shuffled_batches`.
    """
    from grain.experimental import index_shuffle

    # Epoch e is shuffled with mixed_seed + e. Unmixed, epoch 0 of seed 1 would be epoch 1 of seed 0.
    mixed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    count = len(rows)
    indices = [
        index_shuffle(number % count, max_index=count - 1, seed=(mixed_seed + number // count) % (1 << 32), rounds=4)
        for number in numbers.tolist()
    ]
    drawn = rows.take(np.array(indices))
    return drawn if transform is None else transform(drawn, numbers)


def numbered_batches(
    draw: Callable[[np.ndarray], Batch], batch: int, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Iterates endlessly over the batches that `draw` returns for the numbers of their rows, counted from 0.

    The state of the iterator is the number of batches read. The other arguments are those of `shuffled_batches`.
    """
    import grain

    share = share_of("train.batch", batch, process_count)
    offsets = process_index * share + np.arange(share)
    # No threads: the text is in memory, and drawing a batch costs less than passing it between threads.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.range(ENDLESS).map(lambda step: draw(step * batch + offsets)).to_iter_dataset(options))


def fresh_batches(rows: Rows, batch: int, *, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """Iterates over an endless supply of rows in order; otherwise like `shuffled_batches`."""
    return numbered_batches(rows.take, batch, process_index=process_index, process_count=process_count)


def share_of(key: str, batch: int, process_count: int) -> int:
    """Rows per process of a global batch."""
    if batch < 1 or batch % process_count:
        raise DataError(key, f"{batch} rows cannot be shared equally by {process_count} processes")
    return batch // process_count


def validation_batches(data: np.ndarray, length: int, batch: int, *, limit: int = 0) -> Iterator[Batch]:
    """Iterates once over the windows of a token stream in order, in batches of one shape.

    Every token but the first is scored once. The last window is padded with tokens of weight 0, the last batch with
    rows of weight 0.

    Args:
      data: Tokens [m].
      length: Tokens per window, t.
      batch: Rows per batch, b.
      limit: If positive, the maximum number of batches; their windows are spread evenly over the stream.

    Raises:
      DataError: The stream is shorter than a window.
    """
    require_window(data, length, "validation")
    return ordered_batches(Windows(data, length, drop_last=False), batch, limit=limit)


def ordered_batches(
    rows: Rows,
    batch: int,
    *,
    limit: int = 0,
    transform: Transform | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Iterates once over rows in order, in batches of one shape; the last is padded with rows of weight 0.

    Args:
      rows: Rows to evaluate.
      batch: Rows per global batch.
      limit: If positive, the maximum number of batches; their rows are spread evenly.
      transform: See `shuffled_batches`.
      process_index: See `shuffled_batches`.
      process_count: See `shuffled_batches`.

    Raises:
      DataError: `batch` is not divisible by `process_count`.
    """
    share = share_of("eval.batch", batch, process_count)
    count = len(rows)
    kept = min(count, limit * batch) if limit > 0 else count
    indices = np.full((-(-kept // batch), batch), -1)
    indices.flat[:kept] = np.arange(kept) * count // max(kept, 1)
    for local in indices[:, process_index * share : (process_index + 1) * share]:
        drawn = rows.take(local)
        yield drawn if transform is None else transform(drawn, np.maximum(local, 0))


def require_window(data: np.ndarray, length: int, side: str) -> None:
    """Checks that a token stream [n] has at least one full window.

    Raises:
      DataError: The stream is shorter than a window.
    """
    if length < 1:
        raise DataError("data.length", f"{length} is not positive")
    if len(data) <= length:
        unit = "bytes" if data.dtype == np.uint8 else "tokens"
        raise DataError(
            "data.length", f"a window of {length} needs {length + 1} {unit}, the {side} text has {len(data)}"
        )
