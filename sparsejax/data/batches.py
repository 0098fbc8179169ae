"""Windows of a text, and the batches that training and evaluation read."""

from collections.abc import Iterator

import grain
import numpy as np

from sparsejax.data.text import DataError

Batch = dict[str, np.ndarray]  # inputs, targets: int32 [b, t]; weights: float32 [b, t], 0 = not scored


class Windows:
    """Full windows of a text as a grain source: item i is uint8 [length + 1], from byte i * length on.

    Of an item, all bytes but the last are inputs and all but the first are targets. Neighbours share
    one byte: every byte is a target once, but for the text's first and the rest after the last full window.
    """

    def __init__(self, data: np.ndarray, length: int):
        self._data, self._length = data, length

    def __len__(self) -> int:
        return max(0, (len(self._data) - 1) // self._length)

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._length
        return self._data[start : start + self._length + 1]


def train_batches(
    data: np.ndarray, length: int, batch: int, seed: int, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless training batches, shuffled anew in every epoch; batch i is a function of `seed` and i alone.

    The iterator's state (`get_state`, `set_state`, `grain.checkpoint`) is the number of batches read. The
    last windows of an epoch share a batch with the first of the next, so that none is dropped.

    Args:
      data: uint8 [n].
      length: Bytes per window, t.
      batch: Rows of the global batch.
      seed: Any non-negative integer.
      process_index: Which of `process_count` equal runs of the global batch's rows to return.
      process_count: Number of processes that share the global batch.

    Returns:
      An iterator over dicts of inputs int32 [b, t], targets int32 [b, t] (the next byte) and weights float32
      [b, t] (ones), with b = batch / process_count.

    Raises:
      DataError: The text is shorter than a window, or the processes cannot share the batch.

    """
    _require_window(data, length, "training")
    if batch < 1 or batch % process_count:
        raise DataError(f"train.batch: {batch} rows cannot be shared equally by {process_count} processes")
    # grain shuffles epoch e by seed + e: unmixed, seed 1 would read what seed 0 reads, one epoch early.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    rows = grain.MapDataset.source(Windows(data, length)).shuffle(mixed).repeat()
    # Without drop_remainder, grain's length of an endless dataset rounds up and overflows at a batch of 1.
    shares = rows.batch(batch // process_count, drop_remainder=True)[process_index::process_count]
    # No threads: the text is in memory, and a batch costs less than handing it from thread to thread.
    in_turn = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(shares.map(_batch).to_iter_dataset(in_turn))


def validation_batches(data: np.ndarray, length: int, batch: int, *, limit: int = 0) -> Iterator[Batch]:
    """All windows of a text in order, in batches of one shape; every byte but the first is scored once.

    The last window is padded with bytes of weight 0, the last batch with rows of weight 0.

    Args:
      data: uint8 [m].
      length: Bytes per window, t.
      batch: Rows per batch, b.
      limit: If positive, at most so many batches, of windows spread evenly over the text.

    Returns:
      A fresh iterator over dicts like those of `train_batches`.

    Raises:
      DataError: The text is shorter than a window.

    """
    _require_window(data, length, "validation")
    count = -(-(len(data) - 1) // length)
    kept = min(count, limit * batch) if limit > 0 else count
    starts = np.full((-(-kept // batch), batch), len(data))  # a padding row lies behind the text
    starts.flat[:kept] = np.arange(kept) * count // kept * length
    return (_padded_batch(data, rows[:, None] + np.arange(length + 1)) for rows in starts)


def _padded_batch(data: np.ndarray, positions: np.ndarray) -> Batch:
    inside = positions < len(data)
    windows = np.where(inside, data.take(positions, mode="clip"), 0)
    return _batch(windows) | {"weights": inside[:, 1:].astype(np.float32)}


def _batch(windows: np.ndarray) -> Batch:
    inputs, targets = windows[:, :-1].astype(np.int32), windows[:, 1:].astype(np.int32)
    return {"inputs": inputs, "targets": targets, "weights": np.ones(targets.shape, np.float32)}


def _require_window(data: np.ndarray, length: int, side: str) -> None:
    if length < 1:
        raise DataError(f"data.length: {length} is not a window's length")
    if len(data) <= length:
        needed = f"a window of {length} needs {length + 1} bytes"
        raise DataError(f"data.length: {needed}, the {side} text has {len(data)}")
