"""Corpora: tokenized documents, split into training and validation text, and their cache."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.files import TRAIN, Files
from sparsejax.data.formats import Document
from sparsejax.data.tokenizers import PART, Tokenizer, count_restored, load_tokenizer
from sparsejax.paths import default_cache, local_path
from sparsejax.workdir import read_json, write_json

FITS = 1 << 28  # bytes; a smaller text is kept in memory instead of the cache
FORMAT = 3  # version of the cache's files
MEASURED = 16  # one in 16 bytes of training text is decoded again, and all validation text
PARTIAL = ".part"  # suffix of an entry that is being written
COUNTS = ("read", "empty", "bytes", "characters", "restored", "restored_characters", "repeated")  # of a side


class Source(Protocol):
    """Documents to tokenize.

    Attributes:
      train_files: Number of files or examples of training text.
      validation_files: Number of files or examples of validation text.
      bytes: Approximate size.
      digest: 16 hex digits that change with any document or its side.
      record: Numbers of files that are read and skipped, for the record.
      notes: Lines to print about them.
    """

    train_files: int
    validation_files: int
    bytes: int
    digest: str
    record: dict[str, Any]
    notes: list[str]

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
      restored: Fraction of the bytes that decoding the tokens gives back, estimated for training text.
      restored_characters: Fraction of the characters.
      repeated: Number of documents of validation text that are documents of training text, too.
    """

    tokens: np.ndarray
    documents: np.ndarray
    labels: np.ndarray
    read: int
    empty: int
    bytes: int
    characters: int
    restored: float
    restored_characters: float
    repeated: int


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
      files: Numbers of files that are read and skipped.
      notes: Lines to print about them.
    """

    training: Side
    held_out: Side
    digest: str
    train_files: int
    validation_files: int
    tokenizer: Tokenizer
    files: dict[str, Any]
    notes: list[str]

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
    read_as: str = "auto",
    tokenizer: str = "bytes",
    cache: str = "",
    recorded: bytes | None = None,
    split: bool = True,
) -> Corpus:
    r"""Reads files, splits them into training and validation text, and tokenizes them.

    The kind of a file is known by its content. A text file is UTF-8, and is one document, or several if there is a
    `separator`; its byte order mark is dropped. A record of JSON lines, a JSON array, parquet or Arrow is one document.
    Files that are compressed with gzip, bzip2, xz or zstd are decompressed; parquet and Arrow, which are compressed
    inside, are not. Other files that are named are errors. Empty documents are dropped and counted.

    Without `validation`, the side of a file is a hash of its name relative to its folder (or to the fixed part of its
    glob), so a new file does not move the others. If the hash puts all files on one side, the last file is held out;
    of a single file, the last 5 %. Records and separated documents are split one by one, by file name and number.

    Args:
      files: A file, a folder, a glob, or several of them separated by commas. A file that is named is always read.
        From a folder (recursively, also through links) or a glob, files that are hidden, empty, binary (archives,
        images, and whatever has a zero byte) or repeated are skipped and counted. "" stands for the sources of
        Python's standard library without its tests.
      validation: Validation files, in the same form; "" holds out a part of `files`.
      field: Field of a record that holds the text.
      separator: Separator of the documents of a text file, with escapes such as \n.
      label: Field of a record that holds the class.
      read_as: "text" reads records as text, such as the JSON among source code; "bytes" reads every file as it is
        stored, whatever it holds.
      tokenizer: See `load_tokenizer`.
      cache: See `build_corpus`.
      recorded: See `load_tokenizer`.
      split: Whether there is training text; otherwise all of `files` is validation text.

    Raises:
      DataError: A file does not exist, cannot be read, has no text, or has text that the tokenizer does not accept.
    """
    source = Files(files, validation, field, separator, label, read_as, characters=tokenizer != "bytes", split=split)
    return build_corpus(source, tokenizer, cache, recorded)


def build_tokenizer(
    sources: Sequence[Source], name: str = "bytes", cache: str = "", recorded: bytes | None = None
) -> Tokenizer:
    """Loads a tokenizer, or trains it on the training text of all sources; see `load_tokenizer`."""
    training = (document for source in sources for side, document in source.read() if side == TRAIN)
    digest = "".join(source.digest for source in sources)
    if len(sources) > 1:
        digest = hashlib.sha256(digest.encode()).hexdigest()[:16]
    return load_tokenizer(name, training, digest, _cache_folder(cache), recorded)


def build_corpus(
    source: Source,
    tokenizer: str = "bytes",
    cache: str = "",
    recorded: bytes | None = None,
    coder: Tokenizer | None = None,
) -> Corpus:
    """Tokenizes the documents of a source.

    Args:
      source: The documents.
      tokenizer: See `load_tokenizer`.
      cache: Folder in which tokens are stored by digest, to be mapped into memory. "" stands for ~/.cache/sparsejax,
        except that a byte corpus that fits in memory is not stored.
      recorded: See `load_tokenizer`.
      coder: The tokenizer that `tokenizer` names; by default it is loaded, or trained on the source.

    Raises:
      DataError: The tokenizer does not accept the text or gives none of it back, or the cache cannot be written.
    """
    folder = _cache_folder(cache)
    coder = build_tokenizer([source], tokenizer, cache, recorded) if coder is None else coder
    plain = tokenizer == "bytes"
    digest = source.digest if plain else hashlib.sha256(f"{source.digest} {coder.digest}".encode()).hexdigest()[:16]
    if plain and not cache and source.bytes <= FITS:
        sides = _encode(source, coder, [io.BytesIO(), io.BytesIO()])
    else:
        entry = folder / f"{tokenizer if tokenizer in ('bytes', 'chars') else 'tokens'}-{digest}-v{FORMAT}"
        if not (entry / "counts.json").exists():
            _store(source, coder, entry)
        sides = _open(entry)
    for side, text in zip(sides, ("training", "validation"), strict=True):
        if side.bytes and not side.restored:
            raise DataError("data.tokenizer", f"{tokenizer} gives back none of the {text} text: all of it is unknown")
    files = source.train_files, source.validation_files
    return Corpus(*sides, digest, *files, coder, source.record, source.notes)


def _cache_folder(cache: str) -> Path:
    return local_path(cache, "data.cache") if cache else default_cache()


def _encode(source: Source, tokenizer: Tokenizer, files: Sequence[IO[bytes]]) -> tuple[Side, Side]:
    """Writes the tokens of both sides to `files` as they come; in-memory files are returned as arrays."""
    training, held_out = (
        _Writer(file, tokenizer, measured) for file, measured in zip(files, (MEASURED, 1), strict=True)
    )
    for side, document in source.read():
        try:
            (training if side == TRAIN else held_out).add(document)
        except DataError as error:
            raise DataError("data.files", f"{document.name}: {error}") from error
    return training.side(), held_out.side(training)


class _Writer:
    """Appends the tokens of documents to a file, counts them, and decodes one in `measured` bytes."""

    def __init__(self, file: IO[bytes], tokenizer: Tokenizer, measured: int):
        self._file, self._tokenizer, self._measured = file, tokenizer, measured
        self._dtype = np.min_scalar_type(tokenizer.size - 1)
        self._bounds, self._labels, self._size = array.array("q"), array.array("i"), 0
        self._counts = {"read": 0, "empty": 0, "bytes": 0, "characters": 0}
        self._digests = array.array("Q")
        self._decoded, self._restored = np.zeros((2, 2), np.int64)  # bytes and characters

    def add(self, document: Document) -> None:
        self._counts["read"] += 1
        # A document of bytes may be larger than the memory, so it is encoded in parts.
        step = PART if self._tokenizer.spelled else max(1, len(document.text))
        start, digest = self._size, hashlib.sha256()
        for offset in range(0, len(document.text), step):
            part = bytes(document.text[offset : offset + step])
            tokens = self._tokenizer.encode(part)
            if start == self._size and self._bounds and len(tokens):
                self._separate()
                start = self._size
            self._write(tokens)
            digest.update(part)
            self._measure(part, tokens)
            self._count(part)
        if start == self._size:
            self._counts["empty"] += 1
            return
        self._bounds.extend((start, self._size))
        self._labels.append(document.label)
        self._digests.append(int.from_bytes(digest.digest()[:8], "little"))

    def _measure(self, text: bytes, tokens: np.ndarray) -> None:
        """Decodes a text, unless enough of the texts so far has been decoded."""
        if self._decoded[0] * self._measured > self._counts["bytes"]:
            return
        restored = self._tokenizer.restore(tokens)
        if restored is not None:
            self._decoded += len(text), _count_characters(text)
            self._restored += count_restored(text, restored)

    def _separate(self) -> None:
        if self._tokenizer.separator is not None:
            self._write(np.array([self._tokenizer.separator]))
            if self._tokenizer.spelled:
                self._count(b" ")

    def _count(self, text: bytes) -> None:
        self._counts["bytes"] += len(text)
        self._counts["characters"] += _count_characters(text)

    def side(self, training: _Writer | None = None) -> Side:
        """The side that was written; documents that `training` holds as well are counted."""
        self._file.flush()
        memory = self._file.getvalue() if isinstance(self._file, io.BytesIO) else b""
        documents = np.array(self._bounds, np.int64).reshape(-1, 2)
        shares = np.divide(self._restored, self._decoded, out=np.ones(2), where=self._decoded > 0).tolist()
        repeated = 0 if training is None else int(np.isin(self._digests, training._digests).sum())
        return Side(
            np.frombuffer(memory, self._dtype),
            documents,
            np.array(self._labels, np.int32),
            **self._counts,
            restored=shares[0],
            restored_characters=shares[1],
            repeated=repeated,
        )

    def _write(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype(self._dtype, copy=False).data)
        self._size += len(tokens)


def _count_characters(text: bytes) -> int:
    if text.isascii():
        return len(text)
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) & 0xC0 != 0x80))


def _store(source: Source, tokenizer: Tokenizer, entry: Path) -> None:
    """Writes an entry of the cache in one step, or waits until another process has written it."""
    import filelock

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(entry.with_name(f"{entry.name}.lock")):
            for stale in entry.parent.glob(f"{entry.name}.*{PARTIAL}"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            if not (entry / "counts.json").exists():
                _write_entry(source, tokenizer, entry)
    except OSError as error:
        raise DataError("data.cache", f"cannot write {entry}: {error.strerror}") from error


def _write_entry(source: Source, tokenizer: Tokenizer, entry: Path) -> None:
    part = entry.with_name(f"{entry.name}.{os.getpid()}{PARTIAL}")
    try:
        part.mkdir()
        with (part / "train").open("wb") as train, (part / "validation").open("wb") as validation:
            sides = dict(zip(("train", "validation"), _encode(source, tokenizer, [train, validation]), strict=True))
        for name, side in sides.items():
            np.save(part / f"{name}.documents.npy", side.documents)
            np.save(part / f"{name}.labels.npy", side.labels)
        counts = {
            "format": FORMAT,
            "dtype": np.min_scalar_type(tokenizer.size - 1).name,
            "sides": {name: {count: getattr(side, count) for count in COUNTS} for name, side in sides.items()},
        }
        write_json(part / "counts.json", counts)
        part.rename(entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(entry: Path) -> tuple[Side, Side]:
    try:
        counts = read_json(entry / "counts.json", {"format": int, "dtype": str, "sides": {...: {...: float}}})
        if counts["format"] != FORMAT:
            raise ValueError(f"format {counts['format']} instead of {FORMAT}")
        dtype, sides = np.dtype(counts["dtype"]), counts["sides"]
        training, held_out = (_open_side(entry / name, dtype, sides[name]) for name in ("train", "validation"))
        return training, held_out
    except Exception as error:  # NumPy parses the headers of damaged arrays with the parser of Python
        raise DataError("data.cache", f"{entry} is damaged; delete it") from error


def _open_side(file: Path, dtype: np.dtype, counts: dict[str, Any]) -> Side:
    tokens = np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
    documents, labels = (np.load(file.with_name(f"{file.name}.{name}.npy")) for name in ("documents", "labels"))
    if len(tokens) != documents.max(initial=0):
        raise ValueError(f"{file.name} has {len(tokens)} tokens instead of {documents.max(initial=0)}")
    return Side(tokens, documents, labels, **counts)
