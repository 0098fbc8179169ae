"""The batches that training and evaluation read: which rows, in which order, and from which step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grain
import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.rows import Batch, Rows, Windows

ENDLESS = 1 << 48  # steps; more than any run has
Transform = Callable[[Batch, np.ndarray], Batch]  # a batch and the numbers of its rows, int64 [b]


def train_batches(
    data: np.ndarray, length: int, batch: int, seed: int, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless training batches of windows of a text, see `shuffled_batches`.

    Args:
      data: Tokens [n].
      length: Tokens per window, t.
      batch: Rows of the global batch.
      seed: Any non-negative integer.
      process_index: Which of `process_count` equal runs of the global batch's rows to return.
      process_count: Number of processes that share the global batch.

    Returns:
      An iterator over dicts of inputs int32 [b, t], targets int32 [b, t] (the next token) and weights float32
      [b, t] (ones), with b = batch / process_count.

    Raises:
      DataError: The text is shorter than a window, or the processes cannot share the batch.

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
    """Endless training batches, shuffled anew in every epoch; batch i is a function of `seed` and i alone.

    The iterator's state (`get_state`, `set_state`, `grain.checkpoint`) is the number of batches read. The
    last rows of an epoch share a batch with the first of the next, so that none is dropped.

    Args:
      rows: What batches are made of.
      batch: Rows of the global batch.
      seed: Any non-negative integer.
      transform: Of each batch; also gets how many rows of the run came before each of its own, int64 [b].
      process_index: Which of `process_count` equal runs of the global batch's rows to return.
      process_count: Number of processes that share the global batch.

    Raises:
      DataError: There are no rows, or the processes cannot share the batch.

    """
    share = _share("train.batch", batch, process_count)
    if not len(rows):
        raise DataError("data.files: no rows to train on")
    # Epoch e is shuffled by seed + e: unmixed, seed 1 would read what seed 0 reads, one epoch early.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    count = len(rows)

    def draw(step: int) -> Batch:
        numbers = step * batch + process_index * share + np.arange(share)
        places = [
            grain.experimental.index_shuffle(
                number % count, max_index=count - 1, seed=(mixed + number // count) % (1 << 32), rounds=4
            )
            for number in numbers.tolist()
        ]
        drawn = rows.take(np.array(places))
        return drawn if transform is None else transform(drawn, numbers)

    return _in_turn(draw)


def fresh_batches(rows: Rows, batch: int, *, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """Endless training batches of rows in order, of rows that never come to an end; otherwise as `shuffled_batches`."""
    share = _share("train.batch", batch, process_count)
    return _in_turn(lambda step: rows.take(step * batch + process_index * share + np.arange(share)))


def _share(key: str, batch: int, process_count: int) -> int:
    """Rows of a batch for each process."""
    if batch < 1 or batch % process_count:
        raise DataError(f"{key}: {batch} rows cannot be shared equally by {process_count} processes")
    return batch // process_count


def _in_turn(draw: Callable[[int], Batch]) -> grain.DatasetIterator:
    # No threads: the text is in memory, and a batch costs less than handing it from thread to thread.
    in_turn = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.range(ENDLESS).map(draw).to_iter_dataset(in_turn))


def validation_batches(data: np.ndarray, length: int, batch: int, *, limit: int = 0) -> Iterator[Batch]:
    """All windows of a text in order, in batches of one shape; every token but the first is scored once.

    The last window is padded with tokens of weight 0, the last batch with rows of weight 0.

    Args:
      data: Tokens [m].
      length: Tokens per window, t.
      batch: Rows per batch, b.
      limit: If positive, at most so many batches, of windows spread evenly over the text.

    Returns:
      A fresh iterator over dicts like those of `train_batches`.

    Raises:
      DataError: The text is shorter than a window.

    """
    require_window(data, length, "validation")
    return ordered_batches(Windows(data, length, whole=False), batch, limit=limit)


def ordered_batches(
    rows: Rows,
    batch: int,
    *,
    limit: int = 0,
    transform: Transform | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """All rows in order, in batches of one shape; the last is padded with rows of weight 0.

    Args:
      rows: What batches are made of.
      batch: Rows of a global batch.
      limit: If positive, at most so many batches, of rows spread evenly.
      transform: As of `shuffled_batches`.
      process_index: As of `shuffled_batches`.
      process_count: As of `shuffled_batches`.
    """
    share = _share("eval.batch", batch, process_count)
    count = len(rows)
    kept = min(count, limit * batch) if limit > 0 else count
    places = np.full((-(-kept // batch), batch), -1)
    places.flat[:kept] = np.arange(kept) * count // max(kept, 1)
    for own in places[:, process_index * share : (process_index + 1) * share]:
        drawn = rows.take(own)
        yield drawn if transform is None else transform(drawn, np.maximum(own, 0))


def require_window(data: np.ndarray, length: int, side: str) -> None:
    """Refuses a text, tokens [n], that has no full window.

    Raises:
      DataError: The text is shorter than a window.
    """
    if length < 1:
        raise DataError(f"data.length: {length} is not a window's length")
    if len(data) <= length:
        unit = "bytes" if data.dtype == np.uint8 else "tokens"
        needed = f"a window of {length} needs {length + 1} {unit}"
        raise DataError(f"data.length: {needed}, the {side} text has {len(data)}")
