"""Streams: text that is read and tokenized during training, file by file, in bounded memory and without a cache.

A stream is read in blocks: about `data.buffer` rows of adjacent text, which are shuffled and then read in their new
order. The state of a reader is the position in the text at which its block starts; a reader that resumes tokenizes the
block again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np

from sparsejax.data.batches import Transform, share_of
from sparsejax.data.config import DataConfig
from sparsejax.data.errors import DataError
from sparsejax.data.files import File, Files
from sparsejax.data.kinds import BYTES
from sparsejax.data.rows import Batch, Packed, RowReader, Rows, Windows
from sparsejax.data.tokenizers import Tokenizer

SPAN = 1 << 20  # bytes of a document that are tokenized at once; a longer document is cut at the end of a line


class Position(NamedTuple):
    """Position of a reader.

    Attributes:
      epoch: Number of times that it has read all of its files.
      file: Index of the file in the order of the epoch.
      span: Number of spans of the file before the position.
      token: Number of tokens of the span before the position.
      row: Number of rows before the position.
    """

    epoch: int = 0
    file: int = 0
    span: int = 0
    token: int = 0
    row: int = 0


class Span(NamedTuple):
    """A tokenized span of a document.

    Attributes:
      position: Where it starts.
      tokens: Tokens [n].
      starts: Whether it starts a document.
    """

    position: Position
    tokens: np.ndarray
    starts: bool


class Block(NamedTuple):
    """Rows that are shuffled together.

    Attributes:
      rows: The rows in the order of the text.
      order: Shuffled indices of the rows, int64 [r].
      start: Position of the block.
      stop: Position of the next block.
    """

    rows: Rows
    order: np.ndarray
    start: Position
    stop: Position


@dataclasses.dataclass(frozen=True)
class Stream:
    """Training text that is read during training.

    Attributes:
      config: The configuration.
      text: The files.
      tokenizer: The tokenizer.
    """

    config: DataConfig
    text: Files
    tokenizer: Tokenizer

    def read(self, file: File) -> Iterator[tuple[bytes, bool]]:
        """Iterates over the spans of a file, and whether each starts a document."""
        for document in self.text.open_chunks(file):
            yield from _cut(document, file.kind.format == BYTES)

    def encode(self, epoch: int, files: list[File], file: int, span: int) -> Iterator[Span]:
        """Tokenizes the spans from a position to the end of the epoch."""
        for index in range(file, len(files)):
            for number, (text, starts) in enumerate(self.read(files[index])):
                if number >= span:
                    try:
                        tokens = self.tokenizer.encode(text)
                    except DataError as error:
                        raise DataError("data.files", f"{files[index].path}: {error}") from error
                    if len(tokens):
                        yield Span(Position(epoch, index, number), tokens, starts)
            span = 0


def _cut(chunks: Iterable[bytes], anywhere: bool) -> Iterator[tuple[bytes, bool]]:
    """Cuts the chunks of a document into spans, after the end of a line or at least after a character."""
    text, starts = b"", True
    for chunk in chunks:
        text += chunk
        while len(text) > SPAN:
            stop = SPAN if anywhere else text.rfind(b"\n", 0, SPAN) + 1
            while not stop or (not anywhere and text[stop] & 0xC0 == 0x80):  # 10... continues a character of UTF-8
                stop = (stop or SPAN + 1) - 1
            yield text[:stop], starts
            text, starts = text[stop:], False
    if text:
        yield text, starts


class StreamReader:
    """Reads every `readers`-th file of a stream, in an order that is shuffled every epoch.

    Args:
      stream: The stream.
      seed: Seed of all shuffles.
      transform: Applied to every batch, see `shuffled_batches`.
      reader: Index of the reader.
      readers: Number of readers.
    """

    def __init__(self, stream: Stream, seed: int, transform: Transform | None, reader: int = 0, readers: int = 1):
        self._stream, self._seed, self._transform = stream, seed, transform
        self._reader, self._readers = reader, readers
        self._executor = ThreadPoolExecutor(1)  # tokenizes the next block beside the training steps
        self._next: Future[Block] | None = None
        self._block: Block | None = None
        self._seek(Position())

    def draw(self, numbers: np.ndarray) -> Batch:
        """Returns the rows of this reader with these numbers, int64 [b], which increase from call to call."""
        parts, remaining = [], numbers
        while len(remaining):
            block = self._advance(int(remaining[0]))
            inside = remaining[remaining < block.stop.row]
            parts.append(block.rows.take(block.order[inside - block.start.row]))
            remaining = remaining[len(inside) :]
        batch = concatenate(parts)
        return batch if self._transform is None else self._transform(batch, numbers * self._readers + self._reader)

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the block in progress."""
        return self._start._asdict()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a position."""
        self._seek(Position(**state))

    def _seek(self, position: Position) -> None:
        if self._next is not None:
            self._next.exception()  # waits for the block in progress
        self._start, self._block, self._next = position, None, None
        self._pending: list[Span] = []  # read ahead of the next block
        self._spans = self._read(position)

    def _advance(self, row: int) -> Block:
        """Returns the block that holds a row."""
        while self._block is None or row >= self._block.stop.row:
            if self._next is None:
                self._next = self._executor.submit(self._build, self._start)
            block = self._next.result()
            self._block, self._start = block, block.start
            self._next = self._executor.submit(self._build, block.stop)
        return self._block

    def _read(self, start: Position) -> Iterator[Span]:
        epoch, file, span = start[:3]
        while True:
            empty = file == span == 0
            for encoded in self._stream.encode(epoch, self._order(epoch), file, span):
                empty = False
                yield encoded
            if empty:
                raise DataError("data.files", f"reader {self._reader} of {self._readers} has no text")
            epoch, file, span = epoch + 1, 0, 0

    def _order(self, epoch: int) -> list[File]:
        files = self._stream.text.files
        random = _generator(self._seed, epoch, 0)
        return [files[index] for index in random.permutation(len(files))[self._reader :: self._readers]]

    def _build(self, start: Position) -> Block:
        config, spans = self._stream.config, self._pending
        spans += [] if spans else [next(self._spans)]
        size = sum(len(span.tokens) for span in spans) - start.token
        while size <= config.buffer * config.length:
            spans.append(next(self._spans))
            size += len(spans[-1].tokens)
        rows, stop = (self._pack if config.packing == "packed" else self._cut)(spans, start)
        random = _generator(self._seed, start.row, self._reader + 1)
        return Block(rows, random.permutation(len(rows)), start, stop._replace(row=start.row + len(rows)))

    def _pack(self, spans: list[Span], start: Position) -> tuple[Rows, Position]:
        self._pending = [next(self._spans)]
        stops = np.cumsum([len(span.tokens) for span in spans])
        bounds = np.stack([np.concatenate([[0], stops[:-1]]), stops], 1)
        tokens = np.concatenate([span.tokens for span in spans])
        rows = Packed(tokens, bounds, self._stream.tokenizer.separator, self._stream.config.length)
        return rows, self._pending[0].position

    def _cut(self, spans: list[Span], start: Position) -> tuple[Rows, Position]:
        length = self._stream.config.length
        tokens = np.concatenate([self._separated(span) for span in spans])[start.token :]
        rows = Windows(tokens, length)
        used = start.token + len(rows) * length  # the last target is the first input of the next block
        while used >= (size := len(self._separated(spans[0]))):
            used -= size
            del spans[0]
        self._pending = spans
        return rows, spans[0].position._replace(token=used)

    def _separated(self, span: Span) -> np.ndarray:
        """The tokens of a span, after a separator if it starts a document."""
        separator = self._stream.tokenizer.separator
        if separator is None or not span.starts:
            return span.tokens
        return np.concatenate([np.array([separator], span.tokens.dtype), span.tokens])


def _generator(seed: int, number: int, reader: int) -> np.random.Generator:
    """Returns the random numbers of an epoch (reader 0), or of the block at a row of a reader (from 1)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, reader]))


def concatenate(parts: list[Batch]) -> Batch:
    """Joins batches of the same fields."""
    if len(parts) == 1:
        return parts[0]
    fields = {name: np.concatenate([cast(dict, part)[name] for part in parts]) for name in parts[0]}
    return cast(Batch, fields)


class StreamBatches:
    """An endless iterator over batches whose rows come from several readers, each an equal range of the rows.

    The batches do not depend on the number of processes, each of which only needs the readers of its own rows. The
    state holds the step and the states of these readers.
    """

    def __init__(self, readers: list[RowReader], batch: int, process_index: int = 0, process_count: int = 1):
        share = share_of("train.batch", batch, process_count)
        if batch % len(readers):
            raise DataError("data.readers", f"{len(readers)} readers cannot share {batch} rows equally")
        self._per_reader, self._step = batch // len(readers), 0
        self._readers: dict[int, tuple[RowReader, np.ndarray]] = {}
        rows = process_index * share + np.arange(share)
        for index in np.unique(rows // self._per_reader).tolist():
            mine = rows[rows // self._per_reader == index] - index * self._per_reader
            self._readers[index] = readers[index], mine

    def __iter__(self) -> StreamBatches:
        return self

    def __next__(self) -> Batch:
        first = self._step * self._per_reader
        self._step += 1
        return concatenate([reader.draw(first + rows) for reader, rows in self._readers.values()])

    def get_state(self) -> dict[str, Any]:
        """Returns the step, and the states of the readers by index."""
        states = {str(index): reader.get_state() for index, (reader, _) in self._readers.items()}
        return {"step": self._step, "readers": states}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the step of a state, which may hold the readers of other processes, too."""
        self._step = state["step"]
        for index, (reader, _) in self._readers.items():
            reader.set_state(state["readers"][str(index)])
