"""Corpora: tokenized documents, split into training and validation text, and their cache."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.files import TRAIN, Files
from sparsejax.data.formats import Document
from sparsejax.data.tokenizers import PART, Tokenizer, load_tokenizer

FITS = 1 << 28  # bytes; a smaller text is kept in memory instead of the cache
FORMAT = 1  # version of the cache's files


class Source(Protocol):
    """Documents to tokenize.

    Attributes:
      train_files: Number of files or examples of training text.
      validation_files: Number of files or examples of validation text.
      bytes: Approximate size.
      digest: 16 hex digits that change with any document or its side.
    """

    train_files: int
    validation_files: int
    bytes: int
    digest: str

    def read(self) -> Iterator[tuple[int, Document]]:
        """Iterates over (side, document), where side is TRAIN or VALIDATION."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """The training or validation text: tokens of all documents, separated by the tokenizer's separator.

    Attributes:
      tokens: uint8, uint16 or uint32 [n], read-only.
      documents: Start and stop of each document in `tokens`, without separators: int64 [d, 2].
      labels: Class of each document, or -1: int32 [d].
      read: Number of documents read.
      empty: Number of documents dropped because they are empty.
      bytes: Size of the text, including separators that are characters themselves.
      characters: Number of UTF-8 characters of the text, including such separators.
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
    """A tokenized text.

    Attributes:
      training: The training text.
      held_out: The validation text.
      digest: 16 hex digits that change with the name, content or side of any file, and with the tokenizer.
      train_files: Number of files in `training`.
      validation_files: Number of files in `held_out`; a file that is split counts twice.
      tokenizer: The tokenizer.
    """

    training: Side
    held_out: Side
    digest: str
    train_files: int
    validation_files: int
    tokenizer: Tokenizer

    @property
    def train(self) -> np.ndarray:
        """Training tokens [n]."""
        return self.training.tokens

    @property
    def validation(self) -> np.ndarray:
        """Validation tokens [m]."""
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
    r"""Reads files, splits them into training and validation text, and tokenizes them.

    A text file is one document, or several if there is a `separator`; a record of a jsonl or parquet file is one
    document. Files that end in .gz or .zst are decompressed. Empty documents are dropped and counted.

    Without `validation`, the side of a file is a hash of its name relative to its folder (or to the fixed part of its
    glob), so a new file does not move the others. If the hash puts all files on one side, the last file is held out;
    of a single file, the last 5 %. Records and separated documents are split one by one, by file name and number.

    Args:
      files: A file, a folder, a glob, or several of them separated by commas. A file that is named is always read.
        From a folder (recursively, without hidden names) or a glob, records and text files are read: files that are
        not empty and contain no zero bytes. "" stands for the sources of Python's standard library without its tests.
      validation: Validation files, in the same form; "" holds out a part of `files`.
      field: Field of a record that holds the text.
      separator: Separator of the documents of a text file, with escapes such as \n.
      label: Field of a record that holds the class.
      tokenizer: See `load_tokenizer`.
      cache: See `build_corpus`.

    Raises:
      DataError: A file does not exist, cannot be read, has no text, or has text that the tokenizer does not accept.
    """
    source = Files(files, validation, field, separator, label, characters=tokenizer != "bytes")
    return build_corpus(source, tokenizer, cache)


def build_corpus(source: Source, tokenizer: str = "bytes", cache: str = "") -> Corpus:
    """Tokenizes the documents of a source.

    Args:
      source: The documents.
      tokenizer: See `load_tokenizer`.
      cache: Folder in which tokens are stored by digest, to be mapped into memory. "" stands for ~/.cache/sparsejax,
        except that a byte corpus that fits in memory is not stored.

    Raises:
      DataError: The tokenizer does not accept the text, or the cache cannot be written.
    """
    folder = Path(cache).expanduser() if cache else default_cache()
    training = (document for side, document in source.read() if side == TRAIN)
    coder = load_tokenizer(tokenizer, training, source.digest, folder)
    plain = tokenizer == "bytes"
    digest = source.digest if plain else hashlib.sha256(f"{source.digest} {coder.digest}".encode()).hexdigest()[:16]
    if plain and not cache and source.bytes <= FITS:
        sides = _encode(source, coder, [io.BytesIO(), io.BytesIO()])
    else:
        entry = folder / f"{tokenizer if tokenizer in ('bytes', 'chars') else 'tokens'}-{digest}"
        if not (entry / "counts.json").exists():
            _store(source, coder, entry)
        sides = _open(entry)
    return Corpus(*sides, digest, source.train_files, source.validation_files, coder)


def default_cache() -> Path:
    """Returns ~/.cache/sparsejax, or the folder sparsejax in XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsejax"


def _encode(source: Source, tokenizer: Tokenizer, files: Sequence[IO[bytes]]) -> tuple[Side, Side]:
    """Writes the tokens of both sides to `files` as they come; in-memory files are returned as arrays."""
    writers = [_Writer(file, tokenizer) for file in files]
    for side, document in source.read():
        try:
            writers[side].add(document)
        except DataError as error:
            raise DataError("data.files", f"{document.name}: {error}") from error
    training, held_out = (writer.side() for writer in writers)
    return training, held_out


class _Writer:
    """Appends the tokens of documents to a file, and counts them."""

    def __init__(self, file: IO[bytes], tokenizer: Tokenizer):
        self._file, self._tokenizer = file, tokenizer
        self._dtype = np.min_scalar_type(tokenizer.size - 1)
        self._bounds, self._labels, self._size = array.array("q"), array.array("i"), 0
        self._counts = {"read": 0, "empty": 0, "bytes": 0, "characters": 0}

    def add(self, document: Document) -> None:
        self._counts["read"] += 1
        # A document of bytes may be larger than the memory, so it is encoded in parts.
        step = PART if self._tokenizer.spelled else max(1, len(document.text))
        start = self._size
        for offset in range(0, len(document.text), step):
            part = bytes(document.text[offset : offset + step])
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
        self._counts["characters"] += int(np.count_nonzero(np.frombuffer(text, np.uint8) & 0xC0 != 0x80))

    def side(self) -> Side:
        self._file.flush()
        memory = self._file.getvalue() if isinstance(self._file, io.BytesIO) else b""
        documents = np.array(self._bounds, np.int64).reshape(-1, 2)
        return Side(np.frombuffer(memory, self._dtype), documents, np.array(self._labels, np.int32), **self._counts)

    def _write(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._size += len(tokens)


def _store(source: Source, tokenizer: Tokenizer, entry: Path) -> None:
    """Writes an entry of the cache in one step."""
    part = entry.with_name(f"{entry.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise DataError("data.cache", f"cannot write {part}: {error.strerror}") from error
    try:
        with (part / "train").open("wb") as train, (part / "validation").open("wb") as validation:
            sides = dict(zip(("train", "validation"), _encode(source, tokenizer, [train, validation]), strict=True))
        for name, side in sides.items():
            np.save(part / f"{name}.documents.npy", side.documents)
            np.save(part / f"{name}.labels.npy", side.labels)
        counted = ("read", "empty", "bytes", "characters")
        counts = {
            "format": FORMAT,
            "dtype": np.min_scalar_type(tokenizer.size - 1).name,
            "sides": {name: {count: getattr(side, count) for count in counted} for name, side in sides.items()},
        }
        (part / "counts.json").write_text(json.dumps(counts, indent=2))
        part.rename(entry)
    except OSError as error:
        if not (entry / "counts.json").exists():  # another process may have written the same entry first
            raise DataError("data.cache", f"cannot write {entry}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(entry: Path) -> tuple[Side, Side]:
    try:
        counts = json.loads((entry / "counts.json").read_text())
        if counts["format"] != FORMAT:
            raise ValueError(f"format {counts['format']} instead of {FORMAT}")
        dtype, sides = np.dtype(counts["dtype"]), counts["sides"]
        training, held_out = (_open_side(entry / name, dtype, sides[name]) for name in ("train", "validation"))
        return training, held_out
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError("data.cache", f"{entry} is damaged; delete it") from error


def _open_side(file: Path, dtype: np.dtype, counts: dict[str, int]) -> Side:
    tokens = np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
    documents, labels = (np.load(file.with_name(f"{file.name}.{name}.npy")) for name in ("documents", "labels"))
    if len(tokens) != documents.max(initial=0):
        raise ValueError(f"{file.name} has {len(tokens)} tokens instead of {documents.max(initial=0)}")
    return Side(tokens, documents, labels, **counts)
