"""Corpora: tokens of a text, its documents, and which of them are trained on and which are held out."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.files import TRAIN, Files
from sparsejax.data.formats import Document
from sparsejax.data.tokenizers import PART, Tokenizer, load_tokenizer

FITS = 1 << 28  # bytes of text that are simply kept in memory
FORMAT = 1  # of what the cache holds


class Source(Protocol):
    """Where documents come from.

    Attributes:
      train_files: Number of files, or documents, of the training text.
      validation_files: The same of the validation text.
      bytes: About how large it is.
      digest: 16 hex digits that change with any document or its side.
    """

    train_files: int
    validation_files: int
    bytes: int
    digest: str

    def read(self) -> Iterator[tuple[int, Document]]:
        """Every document, with its side: 0 to train on, 1 held out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """The tokens of a text, document after document, the tokenizer's separator between them.

    Attributes:
      tokens: uint8, uint16 or uint32 [n], read-only.
      documents: Where each document starts and stops in `tokens`, without separators: int64 [d, 2].
      labels: The class of each document, -1 without: int32 [d].
      read: Documents that were read.
      empty: Those of them that held nothing and were left out.
      bytes: Of text that `tokens` stand for. A separator that is itself a character counts.
      characters: The same in characters of UTF-8.
    """

    tokens: np.ndarray
    documents: np.ndarray
    labels: np.ndarray
    read: int
    empty: int
    bytes: int
    characters: int


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A text in two sides, as tokens.

    Attributes:
      training: The side to train on.
      held_out: The other one.
      digest: 16 hex digits that change with any file's name, bytes or side, and with the tokenizer.
      train_files: Number of files in `training`.
      validation_files: Number of files in `held_out`. A file that is split counts on both sides.
      tokenizer: What the tokens mean.
    """

    training: Side
    held_out: Side
    digest: str
    train_files: int
    validation_files: int
    tokenizer: Tokenizer

    @property
    def train(self) -> np.ndarray:
        """Tokens to train on, [n]."""
        return self.training.tokens

    @property
    def validation(self) -> np.ndarray:
        """Tokens that are held out, [m]."""
        return self.held_out.tokens


def load_corpus(
    files: str,
    *,
    validation: str = "",
    field: str = "text",
    separator: str = "",
    label: str = "",
    tokenizer: str = "bytes",
    cache: str = "",
) -> Corpus:
    r"""Reads files and splits them into training and validation text.

    A text file is one document, or several if there is a `separator`; a record of a jsonl or parquet file is
    one. .gz and .zst are unpacked. Without `validation`, the side of a file depends on nothing but its name
    below its folder (or below the fixed part of its glob), so that a new file moves no other. Where this puts
    all files on one side, the last one is held out; of a single file, the last 5 %. Where there are records or
    separators, the documents are held out one by one, by file name and number. A document that is empty is left out
    and counted.

    Args:
      files: A file, a folder, a glob, or several of them separated by commas. A file is taken as it is. Of a
        folder (with its subfolders, without hidden names) or a glob, records and those files are taken that are text:
        not empty and without zero bytes. "" is the text that comes with Python: its standard library's
        sources without the tests.
      validation: Files to hold out, in the same way; "" holds out some of `files`.
      field: Which field of a record is the text.
      separator: Between the documents of a text file, with escapes such as \n.
      label: Which field of a record is its class.
      tokenizer: See `load_tokenizer`.
      cache: See `build_corpus`.

    Raises:
      DataError: Nothing there, nothing in it, not readable, or not what the tokenizer takes.
    """
    source = Files(files, validation, field, separator, label, characters=tokenizer != "bytes")
    return build_corpus(source, tokenizer, cache)


def build_corpus(source: Source, tokenizer: str = "bytes", cache: str = "") -> Corpus:
    """The tokens of all documents of a source.

    Args:
      source: The documents.
      tokenizer: See `load_tokenizer`.
      cache: The folder where tokens are kept by digest, to be mapped into memory. "" is ~/.cache/sparsejax; but then
        bytes that fit in memory are not kept there.

    Raises:
      DataError: What the tokenizer does not take, or a cache that cannot be written.
    """
    folder = Path(cache).expanduser() if cache else default_cache()
    training = (document for side, document in source.read() if side == TRAIN)
    coder = load_tokenizer(tokenizer, training, source.digest, folder)
    plain = tokenizer == "bytes"
    digest = source.digest if plain else hashlib.sha256(f"{source.digest} {coder.digest}".encode()).hexdigest()[:16]
    if plain and not cache and source.bytes <= FITS:
        sides = _encode(source, coder, [io.BytesIO(), io.BytesIO()])
    else:
        place = folder / f"{tokenizer if tokenizer in ('bytes', 'chars') else 'tokens'}-{digest}"
        if not (place / "counts.json").exists():
            _keep(source, coder, place)
        sides = _open(place)
    return Corpus(*sides, digest, source.train_files, source.validation_files, coder)


def default_cache() -> Path:
    """~/.cache/sparsejax, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsejax"


def _encode(source: Source, tokenizer: Tokenizer, files: list[Any]) -> tuple[Side, Side]:
    """Both sides, their tokens written to two files as they come; of files in memory they are taken out again."""
    writers = [_Writer(file, tokenizer) for file in files]
    for side, document in source.read():
        try:
            writers[side].add(document)
        except DataError as error:
            raise DataError(f"data.files: {document.name}: {error}") from error
    return tuple(writer.side() for writer in writers)


class _Writer:
    """Writes the tokens of documents one after the other, and keeps count."""

    def __init__(self, file: Any, tokenizer: Tokenizer):
        self._file, self._tokenizer = file, tokenizer
        self._dtype = np.min_scalar_type(tokenizer.size - 1)
        self._bounds, self._labels, self._size = array.array("q"), array.array("i"), 0
        self._counts = {"read": 0, "empty": 0, "bytes": 0, "characters": 0}

    def add(self, document: Document) -> None:
        self._counts["read"] += 1
        # Where a byte is a token, a document may be larger than the memory.
        step = PART if self._tokenizer.spelled else max(1, len(document.text))
        start = self._size
        for place in range(0, len(document.text), step):
            part = bytes(document.text[place : place + step])
            tokens = self._tokenizer.encode(part)
            if start == self._size and self._bounds and len(tokens):
                self._separate()
                start = self._size
            self._write(tokens)
            self._count(part)
        if start == self._size:
            self._counts["empty"] += 1
            return
        self._bounds.extend((start, self._size))
        self._labels.append(document.label)

    def _separate(self) -> None:
        if self._tokenizer.separator is not None:
            self._write(np.array([self._tokenizer.separator]))
            if self._tokenizer.spelled:
                self._count(b" ")

    def _count(self, text: bytes) -> None:
        self._counts["bytes"] += len(text)
        self._counts["characters"] += np.count_nonzero(np.frombuffer(text, np.uint8) & 0xC0 != 0x80)

    def side(self) -> Side:
        self._file.flush()
        memory = self._file.getvalue() if isinstance(self._file, io.BytesIO) else b""
        documents = np.array(self._bounds, np.int64).reshape(-1, 2)
        return Side(
            np.frombuffer(memory, self._dtype),
            documents,
            np.array(self._labels, np.int32),
            **{name: int(count) for name, count in self._counts.items()},
        )

    def _write(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._size += len(tokens)


def _keep(source: Source, tokenizer: Tokenizer, place: Path) -> None:
    """Makes an entry of the cache; a reader sees all of it or nothing."""
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"data.cache: cannot write {part}: {error.strerror}") from error
    try:
        with (part / "train").open("wb") as train, (part / "validation").open("wb") as validation:
            sides = _encode(source, tokenizer, [train, validation])
        counts = {"format": FORMAT, "dtype": np.min_scalar_type(tokenizer.size - 1).name, "sides": {}}
        for name, side in zip(("train", "validation"), sides, strict=True):
            np.save(part / f"{name}.documents.npy", side.documents)
            np.save(part / f"{name}.labels.npy", side.labels)
            numbers = ("read", "empty", "bytes", "characters")
            counts["sides"][name] = {number: getattr(side, number) for number in numbers}
        (part / "counts.json").write_text(json.dumps(counts, indent=2))
        part.rename(place)
    except OSError as error:
        if not (place / "counts.json").exists():  # another run may have been faster
            raise DataError(f"data.cache: cannot write {place}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(place: Path) -> tuple[Side, Side]:
    try:
        counts = json.loads((place / "counts.json").read_text())
        if counts["format"] != FORMAT:
            raise ValueError(f"format {counts['format']}, not {FORMAT}")
        return tuple(
            _open_side(place / name, np.dtype(counts["dtype"]), numbers) for name, numbers in counts["sides"].items()
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.cache: {place} is damaged, delete it: {error}") from error


def _open_side(file: Path, dtype: np.dtype, counts: dict[str, int]) -> Side:
    tokens = np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
    documents, labels = (np.load(file.with_name(f"{file.name}.{name}.npy")) for name in ("documents", "labels"))
    if len(tokens) != documents.max(initial=0):
        raise ValueError(f"{file.name} has {len(tokens)} tokens, not {documents.max(initial=0)}")
    return Side(tokens, documents, labels, **counts)
