"""Documents from files: which of them there are, and which are held out."""

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

HELD_OUT = 20  # one file in so many is validation; of a single file, the last one-in-so-many of its bytes
HELD_OUT_REMAINDER = 13  # any would do; this one holds out 5 % of Python's own bytes, and no odd ones
TRAIN, VALIDATION = 0, 1

# What lies in the standard library's folder but is a test, an installed package, or about one machine only.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "sitecustomize.py"}
NOT_LIBRARY_PREFIXES = ("config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True)
class File:
    """A file, or the part of its bytes from `start` to `stop`, with its name below the folder it was found in."""

    name: str
    path: Path
    start: int = 0
    stop: int | None = None


class Files:
    """The documents of files; see `load_corpus` for the rules.

    Attributes:
      train_files: How many files the training text comes from.
      validation_files: The same of the validation text; a file that is split counts on both sides.
      bytes: Of all files as they lie on the disk.
      digest: 16 hex digits that change with any file's name, bytes or side, and with what is read of them.
    """

    def __init__(
        self,
        files: str,
        validation: str = "",
        field: str = "text",
        separator: str = "",
        label: str = "",
        characters: bool = False,  # not to cut a file in two within a character of UTF-8
    ):
        self._field, self._label, self._separator = field, label, _unescape(separator)
        found = _named(files, "data.files") if files.strip() else _standard_library()
        held_out = _named(validation, "data.validation") if validation.strip() else []
        # Records are held out one by one, so are documents of a text file; files of one document each as a whole.
        self._by_document = not held_out and (bool(separator) or any(holds_records(file.path) for file in found))
        if held_out or self._by_document:
            self._sides = found, held_out
            same = {file.path.resolve() for file in found} & {file.path.resolve() for file in held_out}
            if same:
                raise DataError(f"data.validation: {min(same)} is trained on too, by data.files")
        else:
            self._sides = _split(found, characters)
        self.train_files, self.validation_files = (len(files) for files in self._sides)
        if self._by_document:
            self.validation_files = self.train_files
        self.bytes = sum(file.path.stat().st_size for side in self._sides for file in side)
        self.digest = self._digest()

    def read(self) -> Iterator[tuple[int, Document]]:
        """Every document, with the side it is on: those to train on first, if whole files are held out."""
        documents = (
            (side, one) for side, files in enumerate(self._sides) for file in files for one in self._open(file)
        )
        return _hold_out(documents) if self._by_document else documents

    def _open(self, file: File) -> Iterator[Document]:
        if holds_records(file.path):
            return read_records(file.path, file.name, self._field, self._label)
        if self._label:
            raise DataError(f"data.label: {file.path} is text and has no classes; jsonl and parquet have")
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
    # Compressed files and records count as they lie on the disk, which spares unpacking them.
    packed = file.path.suffix in COMPRESSED or holds_records(file.path)
    start, stop = (0, None) if packed else (file.start, file.stop)
    size = (file.path.stat().st_size if stop is None else stop) - start
    digest.update(b"%b\0%d\0" % (os.fsencode(file.name), size))
    for chunk in read_raw(file.path, start, size):
        digest.update(chunk)


def _hold_out(documents: Iterator[tuple[int, Document]]) -> Iterator[tuple[int, Document]]:
    """Moves documents to validation by a hash of their names; the last one, if that moves none."""
    held, last = False, None
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
        raise DataError(f"data.separator: {separator!r}: {error}") from error


def _standard_library() -> list[File]:
    folder = Path(sysconfig.get_path("stdlib"))
    found = _walk(folder, lambda name: name in NOT_LIBRARY or name.startswith(NOT_LIBRARY_PREFIXES))
    sources = [File(path.relative_to(folder).as_posix(), path) for path in found if path.suffix == ".py"]
    if not sources:
        raise DataError(f"data.files: is empty, and Python's own sources are not in {folder}")
    return [file for file in sources if file.path.stat().st_size]


def _named(files: str, key: str) -> list[File]:
    found = {}  # by resolved path: a file that is named twice must not fall on both sides
    for item in (Path(name.strip()).expanduser() for name in files.split(",") if name.strip()):
        root, paths = _find(item, key)
        for path in (path for path in paths if path.resolve() not in found):
            if path == item and not path.stat().st_size:
                raise DataError(f"{key}: {path} is empty")
            if path == item or holds_records(path) or _is_text(path):
                found[path.resolve()] = File(path.relative_to(root).as_posix(), path)
    if not found:
        raise DataError(f"{key}: no text in {files}: only empty files and files with zero bytes")
    return list(found.values())


def _is_text(path: Path) -> bool:
    """Whether a file is not empty and has no zero bytes."""
    empty = True
    for chunk in read_chunks(path):
        if b"\0" in chunk:
            return False
        empty = empty and not chunk
    return not empty


def _find(item: Path, key: str) -> tuple[Path, list[Path]]:
    """What one item stands for: the folder that names are relative to, and its files."""
    if item.is_file():
        return item.parent, [item]
    if item.is_dir():
        root, found = item, _walk(item, lambda name: name.startswith("."))
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), item.parts))
        if root == item:
            raise DataError(f"{key}: no such file or folder: {item}")
        matches = map(Path, glob.glob(str(item), recursive=True))
        found = sorted(filter(Path.is_file, matches), key=Path.as_posix)
    if not found:
        raise DataError(f"{key}: no file {'in' if root == item else 'matches'} {item}")
    return root, found


def _walk(folder: Path, skip: Callable[[str], bool]) -> list[Path]:
    """The files below `folder`, sorted by relative name, without the files and folders that `skip` names."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not skip(name)]
        found += [Path(parent, name) for name in names if not skip(name)]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(folder).as_posix())


def _split(files: list[File], characters: bool) -> tuple[list[File], list[File]]:
    if len(files) == 1:
        [file] = files
        packed = file.path.suffix in COMPRESSED
        size = sum(map(len, read_chunks(file.path))) if packed else file.path.stat().st_size
        cut = size - max(1, size // HELD_OUT)
        if characters:  # a byte that continues a character of UTF-8 starts with the bits 10
            after = b"".join(read_chunks(file.path, cut, cut + 4))
            cut += next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)
        return [dataclasses.replace(file, stop=cut)], [dataclasses.replace(file, start=cut, stop=size)]
    held = [_is_held_out(file.name) for file in files]
    if all(held) or not any(held):
        held = [False] * (len(files) - 1) + [True]
    train = [file for file, out in zip(files, held, strict=True) if not out]
    return train, [file for file, out in zip(files, held, strict=True) if out]


def _is_held_out(name: str) -> bool:
    number = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
    return number % HELD_OUT == HELD_OUT_REMAINDER
