"""Documents from files, and their split into training and validation text."""

from __future__ import annotations

import codecs
import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

from sparsejax.data.errors import DataError
from sparsejax.data.formats import (
    COMPRESSED,
    Document,
    holds_records,
    read_chunks,
    read_raw,
    read_records,
    read_text,
)

HELD_OUT = 20  # one file in 20 is validation text; of a single file, the last 1/20 of its bytes
HELD_OUT_REMAINDER = 13  # arbitrary; it holds out a typical 5 % of the standard library
TRAIN, VALIDATION = 0, 1

# Entries of the standard library's folder that are tests, installed packages, or specific to a machine.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "sitecustomize.py"}
NOT_LIBRARY_PREFIXES = ("config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True)
class File:
    """The bytes from `start` to `stop` of a file; `name` is its path relative to the folder of `data.files`."""

    name: str
    path: Path
    start: int = 0
    stop: int | None = None


class Files:
    """The documents of files; `load_corpus` describes the arguments and the split.

    Attributes:
      train_files: Number of files that hold training text.
      validation_files: Number of files that hold validation text; a file that is split counts twice.
      bytes: Total size of the files on disk.
      digest: 16 hex digits that change with the name, content or side of any file, and with the fields that are read.
    """

    def __init__(
        self,
        files: str,
        validation: str = "",
        field: str = "text",
        separator: str = "",
        label: str = "",
        characters: bool = False,  # split a file between UTF-8 characters only
    ):
        self._field, self._label, self._separator = field, label, _unescape(separator)
        train = _list_files(files, "data.files") if files.strip() else _list_standard_library()
        held_out = _list_files(validation, "data.validation") if validation.strip() else []
        # Files of several documents are split by document, files of one document each by file.
        self._by_document = not held_out and (bool(separator) or any(holds_records(file.path) for file in train))
        if held_out or self._by_document:
            self._sides = train, held_out
            both = {file.path.resolve() for file in train} & {file.path.resolve() for file in held_out}
            if both:
                raise DataError("data.validation", f"{min(both)} is training text too, see data.files")
        else:
            self._sides = _split(train, characters)
        self.train_files, self.validation_files = (len(files) for files in self._sides)
        if self._by_document:
            self.validation_files = self.train_files
        self.bytes = sum(file.path.stat().st_size for side in self._sides for file in side)
        self.digest = self._digest()

    def read(self) -> Iterator[tuple[int, Document]]:
        """Iterates over (side, document); training documents come first if whole files are held out."""
        documents = (
            (side, document)
            for side, files in enumerate(self._sides)
            for file in files
            for document in self._open(file)
        )
        return _hold_out(documents) if self._by_document else documents

    def _open(self, file: File) -> Iterator[Document]:
        if holds_records(file.path):
            return read_records(file.path, file.name, self._field, self._label)
        if self._label:
            raise DataError("data.label", f"{file.path} is text and has no labels; use jsonl or parquet")
        return read_text(file.path, file.name, self._separator, file.start, file.stop)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for side in self._sides:
            digest.update(b"%d\n" % len(side))
            for file in side:
                _add_file(digest, file)
        if self._separator or any(holds_records(file.path) for side in self._sides for file in side):
            digest.update(repr((self._by_document, self._field, self._label, self._separator)).encode())
        return digest.hexdigest()[:16]


def _add_file(digest: hashlib._Hash, file: File) -> None:
    # Compressed files and records are hashed as stored, without unpacking them.
    packed = file.path.suffix in COMPRESSED or holds_records(file.path)
    start, stop = (0, None) if packed else (file.start, file.stop)
    size = (file.path.stat().st_size if stop is None else stop) - start
    digest.update(b"%b\0%d\0" % (os.fsencode(file.name), size))
    for chunk in read_raw(file.path, start, size):
        digest.update(chunk)


def _hold_out(documents: Iterator[tuple[int, Document]]) -> Iterator[tuple[int, Document]]:
    """Moves documents to validation by a hash of their names; moves the last one if the hash selects none."""
    held, last = False, None  # the last training document is delayed until it is known whether one is held out
    for _, document in documents:
        if _is_held_out(document.name):
            held = True
            yield VALIDATION, document
            continue
        if last is not None:
            yield TRAIN, last
        last = document
    if last is not None:
        yield (TRAIN if held else VALIDATION), last


def _unescape(separator: str) -> bytes:
    try:
        return codecs.escape_decode(separator.encode())[0]
    except ValueError as error:
        raise DataError("data.separator", f"{separator!r} is not a valid escape sequence") from error


def _list_standard_library() -> list[File]:
    folder = Path(sysconfig.get_path("stdlib"))
    paths = _walk(folder, lambda name: name in NOT_LIBRARY or name.startswith(NOT_LIBRARY_PREFIXES))
    sources = [File(path.relative_to(folder).as_posix(), path) for path in paths if path.suffix == ".py"]
    if not sources:
        raise DataError("data.files", f"it is empty, and the sources of the standard library are not in {folder}")
    return [file for file in sources if file.path.stat().st_size]


def _list_files(files: str, key: str) -> list[File]:
    listed = {}  # by resolved path: a file that is named twice must not be on both sides
    for item in (Path(name.strip()).expanduser() for name in files.split(",") if name.strip()):
        root, paths = _expand(item, key)
        for path in (path for path in paths if path.resolve() not in listed):
            if path == item and not path.stat().st_size:
                raise DataError(key, f"{path} is empty")
            if path == item or holds_records(path) or _is_text(path):
                listed[path.resolve()] = File(path.relative_to(root).as_posix(), path)
    if not listed:
        raise DataError(key, f"no text in {files}: all files are empty or contain zero bytes")
    return list(listed.values())


def _is_text(path: Path) -> bool:
    """Whether a file is not empty and contains no zero bytes."""
    empty = True
    for chunk in read_chunks(path):
        if b"\0" in chunk:
            return False
        empty = empty and not chunk
    return not empty


def _expand(item: Path, key: str) -> tuple[Path, list[Path]]:
    """Expands a file, folder or glob to the folder that names are relative to, and its files."""
    if item.is_file():
        return item.parent, [item]
    if item.is_dir():
        root, paths = item, _walk(item, lambda name: name.startswith("."))
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), item.parts))
        if root == item:
            raise DataError(key, f"no such file or folder: {item}")
        matches = map(Path, glob.glob(str(item), recursive=True))
        paths = sorted(filter(Path.is_file, matches), key=Path.as_posix)
    if not paths:
        raise DataError(key, f"no file {'in' if root == item else 'matches'} {item}")
    return root, paths


def _walk(folder: Path, skip: Callable[[str], bool]) -> list[Path]:
    """Files below `folder`, sorted by relative name, without the files and folders whose names `skip` matches."""
    paths: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not skip(name)]
        paths += [Path(parent, name) for name in names if not skip(name)]
    return sorted(filter(Path.is_file, paths), key=lambda path: path.relative_to(folder).as_posix())


def _split(files: list[File], characters: bool) -> tuple[list[File], list[File]]:
    if len(files) == 1:
        [file] = files
        packed = file.path.suffix in COMPRESSED
        size = sum(map(len, read_chunks(file.path))) if packed else file.path.stat().st_size
        cut = size - max(1, size // HELD_OUT)
        if characters:  # a continuation byte of UTF-8 starts with the bits 10
            after = b"".join(read_chunks(file.path, cut, cut + 4))
            cut += next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)
        return [dataclasses.replace(file, stop=cut)], [dataclasses.replace(file, start=cut, stop=size)]
    held = [_is_held_out(file.name) for file in files]
    if all(held) or not any(held):
        held = [False] * (len(files) - 1) + [True]
    train = [file for file, out in zip(files, held, strict=True) if not out]
    return train, [file for file, out in zip(files, held, strict=True) if out]


def _is_held_out(name: str) -> bool:
    return hash_name(name) % HELD_OUT == HELD_OUT_REMAINDER


def hash_name(name: str) -> int:
    """Hashes the name of a document; `HELD_OUT` and `HELD_OUT_REMAINDER` say which hashes are held out."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
