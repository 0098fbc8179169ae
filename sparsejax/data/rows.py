"""Rows of batches: windows of a stream, packed documents, labelled documents, examples of a probe."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Mapping
from typing import Any, NotRequired, Protocol, TypedDict, cast, runtime_checkable

import numpy as np

from sparsejax.data.packing import pack
from sparsejax.data.probes.example import Probe

RELEASE_EVERY = 1 << 8  # windows read from a memory map before its pages are released


class Batch(TypedDict):
    """Rows of one shape [b, t].

    Attributes:
      inputs: Tokens, int32.
      targets: Token to predict at each position, int32.
      weights: 1 where the prediction is scored, else 0; float32.
      segments: Document of each token, from 1; 0 is padding; int32.
      positions: Position within the segment, int32.
      distance: At scored positions of probes, the distance to the token before the answer; int32.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: NotRequired[np.ndarray]
    positions: NotRequired[np.ndarray]
    distance: NotRequired[np.ndarray]


class Rows(Protocol):
    """Random access to rows of one shape."""

    @property
    def length(self) -> int:
        """Tokens per row."""
        ...

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the batch of the rows with these indices, int64 [b]; -1 is a row of padding with weights 0."""
        ...

    def counts(self) -> dict[str, int | float]:
        """Statistics of how text became rows: tokens that are scored, cut off, or padding."""
        ...


class RowReader(Protocol):
    """The training rows of a run, as far as they are read."""

    def draw(self, numbers: np.ndarray) -> Batch:
        """Returns the rows with these numbers, int64 [b], counted from 0; they increase from call to call."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns, as JSON, what a reader of later rows needs."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues with a state."""
        ...


@runtime_checkable
class BatchIterator(Protocol):
    """An endless iterator over training batches, such as `grain.DatasetIterator`."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position."""
        ...


class _Tokens:
    """A token stream that releases the pages of its memory map from time to time.

    Released pages stay in the page cache but no longer count towards the resident memory of this process, which
    stays small however much of the stream is read.
    """

    def __init__(self, data: np.ndarray):
        # A plain view of the mapped memory: slicing an np.memmap is much slower.
        self.data, self._map, self._reads = np.asarray(data), getattr(data, "_mmap", None), 0

    def release(self, reads: int) -> None:
        self._reads += reads
        if self._map is not None and self._reads >= RELEASE_EVERY:
            self._reads = 0
            self._map.madvise(mmap.MADV_DONTNEED)


class Windows:
    """Windows of a token stream: item i is the slice [length + 1] that starts at token i * stride.

    All tokens of an item but the last are inputs, all but the first are targets. With the default stride adjacent
    windows share one token, so every token but the first of the stream is a target once, up to the last full window.
    With a smaller stride windows overlap, and only the last `stride` targets of every window but the first are
    scored, so every target is still scored once (Longformer, arXiv:2004.05150, section 4).

    Args:
      data: Tokens [n].
      length: Tokens per window, t.
      stride: Tokens between the starts of adjacent windows; 0 stands for `length`.
      drop_last: Drop an incomplete last window; otherwise it is padded with tokens of weight 0.
    """

    def __init__(self, data: np.ndarray, length: int, stride: int = 0, drop_last: bool = True):
        self._tokens, self.length, self._stride, self._drop_last = _Tokens(data), length, stride or length, drop_last

    def __len__(self) -> int:
        targets = len(self._tokens.data) - 1
        if targets < (self.length if self._drop_last else 1):
            return 0
        remaining = max(0, targets - self.length)
        return 1 + (remaining // self._stride if self._drop_last else -(-remaining // self._stride))

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._stride
        return self._tokens.data[start : start + self.length + 1]

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the batch of the rows with these indices, int64 [b]; -1 is a row of padding with weights 0."""
        inputs, targets = np.zeros((2, len(rows), self.length), np.int32)
        weights = np.zeros((len(rows), self.length), np.float32)
        for i, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            window = self[row]
            size = len(window) - 1
            inputs[i, :size], targets[i, :size] = window[:-1], window[1:]
            inputs[i, size : size + 1] = window[-1]
            weights[i, 0 if row == 0 else self.length - self._stride : size] = 1
        self._tokens.release(len(rows))
        return {"inputs": inputs, "targets": targets, "weights": weights}

    def counts(self) -> dict[str, int | float]:
        """Numbers of targets that are scored and of tokens after the last window."""
        targets = max(0, len(self._tokens.data) - 1)
        scored = len(self) * self.length if self._drop_last and self._stride == self.length else targets
        return {"scored_tokens": scored, "tokens_left_over": targets - scored}


class Packed:
    """Whole documents packed into rows, separated by segment ids (from 1; padding is 0).

    If the tokenizer has a separator, a document is preceded by one and ends in one: it is scored from its first token
    to its end, independently of its neighbours in the row. A document longer than a row is cut into fragments, each
    with its own segment id. With a `stride` fragments overlap, and only the last `stride` targets of every fragment
    but the first are scored.

    Args:
      data: Tokens [n].
      documents: Start and stop of each document, int64 [d, 2].
      separator: Token before and after each document, or None.
      length: Tokens per row, t.
      stride: Tokens between the starts of adjacent fragments; 0 stands for `length`.
    """

    def __init__(self, data: np.ndarray, documents: np.ndarray, separator: int | None, length: int, stride: int = 0):
        self._tokens, self._separator, self.length = _Tokens(data), separator, length
        stride = stride or length
        sizes = documents[:, 1] - documents[:, 0] + (1 if separator is not None else -1)  # positions with a target
        counts = np.where(sizes > 0, 1 + np.maximum(0, -(-(sizes - length) // stride)), 0)
        self.cut = int((counts > 1).sum())  # documents longer than a row
        self.unscored = int((counts == 0).sum())  # documents of one token, which predict nothing
        document = np.repeat(np.arange(len(documents)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = number * stride
        sizes = np.minimum(sizes[document] - first, length)
        row = pack(sizes, length)
        order = np.argsort(row, kind="stable")
        unscored = np.where(number > 0, length - stride, 0)
        columns = documents[document, 0], documents[document, 1], first, sizes, unscored
        self._fragments = np.stack(columns, 1)[order]
        self._starts = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
        self.scored = int((sizes - unscored).sum())  # tokens

    def __len__(self) -> int:
        return len(self._starts) - 1

    def counts(self) -> dict[str, int | float]:
        """Numbers of scored targets and of documents cut or without a target, and the share of scored positions."""
        positions = max(1, len(self) * self.length)
        return {
            "scored_tokens": self.scored,
            "documents_cut": self.cut,
            "documents_unscored": self.unscored,
            "efficiency": round(self.scored / positions, 6),
        }

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the batch of the rows with these indices, int64 [b]; -1 is a row of padding with weights 0."""
        counts = np.where(rows < 0, 0, self._starts[rows + 1] - self._starts[rows])
        batch_row = np.repeat(np.arange(len(rows)), counts)  # per fragment
        segment = _count_up(counts)
        start, stop, first, size, unscored = self._fragments[self._starts[rows[batch_row]] + segment].T
        # Per token: its fragment, its position there, its index in the flat batch, its offset in the document.
        fragment, position = np.repeat(np.arange(len(size)), size), _count_up(size)
        filled = np.bincount(batch_row, size, len(rows)).astype(np.int64)
        index = np.repeat(np.arange(len(rows)) * self.length, filled) + _count_up(filled)
        offset = (first - (self._separator is not None))[fragment] + position  # the separator is at offset -1
        values = {
            "inputs": self._read(start[fragment], stop[fragment], offset),
            "targets": self._read(start[fragment], stop[fragment], offset + 1),
            "weights": position >= unscored[fragment],
            "segments": segment[fragment] + 1,
            "positions": position,
        }
        self._tokens.release(len(size))
        batch = {}
        for name, value in values.items():
            flat = np.zeros(len(rows) * self.length, np.float32 if name == "weights" else np.int32)
            flat[index] = value
            batch[name] = flat.reshape(len(rows), self.length)
        return cast(Batch, batch)

    def _read(self, start: np.ndarray, stop: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Tokens [n] at offsets in documents; separators before and after them."""
        tokens = self._tokens.data.take(start + offset, mode="clip")
        if self._separator is None:
            return tokens
        return np.where((offset < 0) | (start + offset >= stop), self._separator, tokens)


def _count_up(counts: np.ndarray) -> np.ndarray:
    """Concatenates `arange(count)` for every count."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class Labelled:
    """One document per row, truncated to the row; its class is the target at the first position.

    Args:
      data: Tokens [n].
      documents: Start and stop of each document, int64 [d, 2].
      labels: Class of each document, int32 [d].
      length: Tokens per row, t.
    """

    def __init__(self, data: np.ndarray, documents: np.ndarray, labels: np.ndarray, length: int):
        self._data, self._documents, self._labels, self.length = np.asarray(data), documents, labels, length

    def __len__(self) -> int:
        return len(self._documents)

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the batch of the rows with these indices, int64 [b]; -1 is a row of padding with weights 0."""
        inputs, targets, segments, positions = np.zeros((4, len(rows), self.length), np.int32)
        weights = np.zeros((len(rows), self.length), np.float32)
        for i, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            start, stop = self._documents[row]
            size = min(stop - start, self.length)
            inputs[i, :size] = self._data[start : start + size]
            segments[i, :size], positions[i, :size] = 1, np.arange(size)
            targets[i, 0], weights[i, 0] = self._labels[row], 1
        return {
            "inputs": inputs,
            "targets": targets,
            "weights": weights,
            "segments": segments,
            "positions": positions,
        }

    def counts(self) -> dict[str, int | float]:
        """Numbers of documents and tokens that were truncated, and the share of positions that hold text."""
        sizes = self._documents[:, 1] - self._documents[:, 0]
        used = int(np.minimum(sizes, self.length).sum()) / max(1, len(self) * self.length)
        lost = int(np.maximum(0, sizes - self.length).sum())
        return {"documents_cut": int((sizes > self.length).sum()), "tokens_cut_off": lost, "efficiency": round(used, 6)}


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a probe.

    Attributes:
      probe: The probe.
      seed: Seed of the examples.
      count: Number of examples.
      validation: Whether to generate held-out examples.
    """

    probe: Probe
    seed: int
    count: int
    validation: bool = False

    @property
    def length(self) -> int:
        """Tokens per example."""
        return self.probe.length

    def __len__(self) -> int:
        return self.count

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the batch of the rows with these indices, int64 [b]; -1 is a row of padding with weights 0."""
        examples = [self.probe.example(self.seed, max(0, row), self.validation) for row in rows.tolist()]
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        return cast(Batch, batch | {"weights": batch["weights"] * (rows >= 0)[:, None].astype(np.float32)})

    def counts(self) -> dict[str, int | float]:
        """No text is lost."""
        return {}
