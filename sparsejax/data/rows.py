"""Rows of batches: windows of a stream, packed documents, documents with a class, examples of a probe."""

from __future__ import annotations

import dataclasses
import mmap
from typing import Any, Protocol

import numpy as np

from sparsejax.data.packing import pack

# inputs, targets, segments, positions: int32 [b, t]; weights: float32 [b, t], 0 = not scored
Batch = dict[str, np.ndarray]
RELEASE = 1 << 8  # windows of mapped tokens that are read before their pages are given back


class Rows(Protocol):
    """What batches are made of: row after row, each of the same shape."""

    length: int  # tokens of a row

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, int64 [b]; -1 is a row of padding, whose weights are 0."""

    def counts(self) -> dict[str, int | float]:
        """What became of the text in making rows of it: how much is scored, cut off, or padding."""


class _Tokens:
    """A text whose pages are given back now and then if it is mapped from a file.

    They stay in the system's cache, but count no more as this program's memory: however much of a text is read, that
    stays small.
    """

    def __init__(self, data: np.ndarray):
        # A plain view of mapped memory: slicing an np.memmap costs far more.
        self.data, self._map, self._reads = np.asarray(data), getattr(data, "_mmap", None), 0

    def release(self, reads: int) -> None:
        self._reads += reads
        if self._map is not None and self._reads >= RELEASE:
            self._reads = 0
            self._map.madvise(mmap.MADV_DONTNEED)


class Windows:
    """Windows of a text: item i is [length + 1], from token i * stride on.

    Of an item, all tokens but the last are inputs and all but the first are targets. Without a stride of their own,
    neighbours share one token: every token is a target once, but for the text's first and the rest after the last
    full window. With a smaller stride windows overlap, and of each but the first only the last `stride` targets are
    scored, so that every target is still scored once (as in Longformer, arXiv:2004.05150, section 4).

    Args:
      data: Tokens [n].
      length: Tokens per window, t.
      stride: Tokens from one window to the next; 0 is `length`.
      whole: Leave out the last window if it is not full; else it is padded with tokens of weight 0.
    """

    def __init__(self, data: np.ndarray, length: int, stride: int = 0, whole: bool = True):
        self._tokens, self.length, self._stride, self._whole = _Tokens(data), length, stride or length, whole

    def __len__(self) -> int:
        targets = len(self._tokens.data) - 1
        if targets < (self.length if self._whole else 1):
            return 0
        rest = max(0, targets - self.length)
        return 1 + (rest // self._stride if self._whole else -(-rest // self._stride))

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._stride
        return self._tokens.data[start : start + self.length + 1]

    def take(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, int64 [b]; -1 is a row of padding, whose weights are 0."""
        inputs, targets = np.zeros((2, len(rows), self.length), np.int32)
        weights = np.zeros((len(rows), self.length), np.float32)
        for place, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            window = self[row]
            size = len(window) - 1
            inputs[place, :size], targets[place, :size] = window[:-1], window[1:]
            inputs[place, size : size + 1] = window[-1]
            weights[place, 0 if row == 0 else self.length - self._stride : size] = 1
        self._tokens.release(len(rows))
        return {"inputs": inputs, "targets": targets, "weights": weights}

    def counts(self) -> dict[str, int | float]:
        """Targets that are scored, and tokens behind the last window."""
        targets = max(0, len(self._tokens.data) - 1)
        scored = len(self) * self.length if self._whole and self._stride == self.length else targets
        return {"scored_tokens": scored, "tokens_left_over": targets - scored}


class Packed:
    """Whole documents, as many to a row as fit, kept apart by segments (from 1; padding is 0).

    A document is read after a separator and ends in one, where the tokenizer has one: it is scored from its first
    token to its end, whatever stands beside it. One that is longer than a row is cut into pieces, each a segment of
    its own; with a `stride` they overlap, and of each but the first only the last `stride` targets are scored.

    Args:
      data: Tokens [n].
      documents: Where they start and stop, int64 [d, 2].
      separator: The token before and after each, or None.
      length: Tokens per row, t.
      stride: See above; 0 is `length`.
    """

    def __init__(self, data: np.ndarray, documents: np.ndarray, separator: int | None, length: int, stride: int = 0):
        self._tokens, self._separator, self.length = _Tokens(data), separator, length
        stride = stride or length
        sizes = documents[:, 1] - documents[:, 0] + (1 if separator is not None else -1)  # positions with a target
        counts = np.where(sizes > 0, 1 + np.maximum(0, -(-(sizes - length) // stride)), 0)
        self.cut = int((counts > 1).sum())  # documents longer than a row
        self.unscored = int((counts == 0).sum())  # documents of one token, which predicts nothing
        owner = np.repeat(np.arange(len(documents)), counts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = number * stride
        sizes = np.minimum(sizes[owner] - first, length)
        row = pack(sizes, length)
        order = np.argsort(row, kind="stable")
        scored = np.where(number > 0, length - stride, 0)
        self._pieces = np.stack([documents[owner, 0], documents[owner, 1], first, sizes, scored], 1)[order]
        self._starts = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
        self.scored = int((sizes - scored).sum())  # tokens

    def __len__(self) -> int:
        return len(self._starts) - 1

    def counts(self) -> dict[str, int | float]:
        """Targets that are scored; documents that were cut, or predict nothing; the share of positions scored."""
        positions = max(1, len(self) * self.length)
        return {
            "scored_tokens": self.scored,
            "documents_cut": self.cut,
            "documents_unscored": self.unscored,
            "efficiency": round(self.scored / positions, 6),
        }

    def take(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, int64 [b]; -1 is a row of padding, whose weights are 0."""
        counts = np.where(rows < 0, 0, self._starts[rows + 1] - self._starts[rows])
        places = np.repeat(np.arange(len(rows)), counts)  # of each piece, its row of the batch
        segment = _count_up(counts)
        start, stop, first, size, scored = self._pieces[self._starts[rows[places]] + segment].T
        # Of each token: which piece it is of, where it is in it, and where in the batch.
        piece, at = np.repeat(np.arange(len(size)), size), _count_up(size)
        filled = np.bincount(places, size, len(rows)).astype(np.int64)
        into = np.repeat(np.arange(len(rows)) * self.length, filled) + _count_up(filled)
        within = (first - (self._separator is not None))[piece] + at  # a separator stands at -1
        values = {
            "inputs": self._read(start[piece], stop[piece], within),
            "targets": self._read(start[piece], stop[piece], within + 1),
            "weights": at >= scored[piece],
            "segments": segment[piece] + 1,
            "positions": at,
        }
        self._tokens.release(len(size))
        batch = {}
        for name, value in values.items():
            flat = np.zeros(len(rows) * self.length, np.float32 if name == "weights" else np.int32)
            flat[into] = value
            batch[name] = flat.reshape(len(rows), self.length)
        return batch

    def _read(self, start: np.ndarray, stop: np.ndarray, within: np.ndarray) -> np.ndarray:
        """Tokens of documents [n]; separators before and behind them."""
        tokens = self._tokens.data.take(start + within, mode="clip")
        if self._separator is None:
            return tokens
        return np.where((within < 0) | (start + within >= stop), self._separator, tokens)


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class Labelled:
    """One document to a row, cut at the row's end; what is to be told is its class, at the first position.

    Args:
      data: Tokens [n].
      documents: Where they start and stop, int64 [d, 2].
      labels: Their classes, int32 [d].
      length: Tokens per row, t.
    """

    def __init__(self, data: np.ndarray, documents: np.ndarray, labels: np.ndarray, length: int):
        self._data, self._documents, self._labels, self.length = np.asarray(data), documents, labels, length

    def __len__(self) -> int:
        return len(self._documents)

    def take(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, int64 [b]; -1 is a row of padding, whose weights are 0."""
        inputs, targets, segments, positions = np.zeros((4, len(rows), self.length), np.int32)
        weights = np.zeros((len(rows), self.length), np.float32)
        for place, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            start, stop = self._documents[row]
            size = min(stop - start, self.length)
            inputs[place, :size] = self._data[start : start + size]
            segments[place, :size], positions[place, :size] = 1, np.arange(size)
            targets[place, 0], weights[place, 0] = self._labels[row], 1
        batch = {"inputs": inputs, "targets": targets, "weights": weights}
        return batch | {"segments": segments, "positions": positions}

    def counts(self) -> dict[str, int | float]:
        """Documents that are longer than a row and lose their ends, and the share of positions that hold text."""
        sizes = self._documents[:, 1] - self._documents[:, 0]
        used = int(np.minimum(sizes, self.length).sum()) / max(1, len(self) * self.length)
        lost = int(np.maximum(0, sizes - self.length).sum())
        return {"documents_cut": int((sizes > self.length).sum()), "tokens_cut_off": lost, "efficiency": round(used, 6)}


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a probe; see `data.probes`.

    Attributes:
      probe: Has `length` and `example(seed, index, validation)`.
      seed: Of the examples.
      count: How many there are.
      validation: Whether they are those that are held out.
    """

    probe: Any
    seed: int
    count: int
    validation: bool = False

    @property
    def length(self) -> int:
        """Tokens of an example."""
        return self.probe.length

    def __len__(self) -> int:
        return self.count

    def take(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, int64 [b]; -1 is a row of padding, whose weights are 0."""
        examples = [self.probe.example(self.seed, max(0, row), self.validation) for row in rows.tolist()]
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        return batch | {"weights": batch["weights"] * (rows >= 0)[:, None].astype(np.float32)}

    def counts(self) -> dict[str, int | float]:
        """Nothing is lost."""
        return {}
