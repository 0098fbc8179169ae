"""Documents from files, and their split into training and validation text."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import glob
import hashlib
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from sparsejax.data import saved
from sparsejax.data.errors import DataError
from sparsejax.data.formats import AS_BYTES, Document, check_utf8, read_records, read_text
from sparsejax.data.kinds import BYTES, RECORDS, TEXT, Kind, detect, read_chunks
from sparsejax.paths import local_path

HELD_OUT = 20  # one file in 20 is validation text; of a single file, the last 1/20 of its bytes
SPLITS = "train", "validation"  # of a data set with splits
HELD_OUT_REMAINDER = 13  # arbitrary; it holds out a typical 5 % of the standard library
TRAIN, VALIDATION = 0, 1

# Entries of the standard library's folder that are tests, installed packages, or specific to a machine.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "sitecustomize.py"}
NOT_LIBRARY_PREFIXES = ("config-", "_sysconfigdata")


Skipped = dict[str, list[str]]  # paths by the reason for which they are skipped


@dataclasses.dataclass(frozen=True)
class File:
    """The bytes from `start` to `stop` of a file; `name` is its path relative to the folder of `data.files`."""

    name: str
    path: Path
    kind: Kind
    start: int = 0
    stop: int | None = None

    @property
    def has_records(self) -> bool:
        """Whether it consists of records, one of whose fields is the text."""
        return self.kind.format in RECORDS


class Files:
    """The documents of files; `load_corpus` describes the arguments and the split.

    Attributes:
      train_files: Number of files that hold training text.
      validation_files: Number of files that hold validation text; a file that is split counts twice.
      bytes: Total size of the files on disk.
      digest: 16 hex digits that change with the name, content or side of any file, and with the fields that are read.
      record: Numbers of files by format, and of skipped ones by reason.
      notes: One line about formats and one about skipped files, if there is something to say.
    """

    def __init__(
        self,
        files: str,
        validation: str = "",
        field: str = "text",
        separator: str = "",
        label: str = "",
        read_as: str = "auto",
        characters: bool = False,  # split a file between UTF-8 characters only
        split: bool = True,  # hold out a part of `files` if there is no `validation`; else all of it is held out
        stream: bool = False,  # all of `files` is training text, of which only the start of every file is inspected
        splits: tuple[str, str] = SPLITS,  # those to read of a data set with splits, see `saved`
    ):
        self._field, self._label, self._separator, self._read_as = field, label, _unescape(separator), read_as
        skipped: Skipped = {}
        train_split, validation_split = zip(("data.train_split", "data.validation_split"), splits, strict=True)
        listed = functools.partial(_list_files, read_as=read_as, skipped=skipped)
        if not files.strip():
            train = _list_standard_library()
        else:
            train = listed(files, "data.files", train_split if split else validation_split, peek=stream)
        if not validation.strip() and split and not stream:
            validation = _find_validation(files, splits[VALIDATION])
        held_out = listed(validation, "data.validation", validation_split) if validation.strip() else []
        # Files of several documents are split by document, files of one document each by file.
        self._by_document = (
            split and not stream and not held_out and (bool(separator) or any(file.has_records for file in train))
        )
        if not split:
            self._sides = [], train + held_out
        elif held_out or self._by_document or stream:
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
        self.digest = self._digest(whole=not stream)
        kinds = Counter(" ".join(filter(None, file.kind[:2])) for file in train + held_out)
        self.record = {"read": dict(kinds), "skipped": {reason: len(paths) for reason, paths in skipped.items()}}
        self.notes = _describe(kinds, skipped)

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
        if file.has_records:
            return read_records(file.path, file.name, file.kind, self._field, self._label)
        if self._label:
            raise DataError("data.label", f"{file.path} is {file.kind.format} and has no labels; use JSON or parquet")
        return read_text(file.path, file.name, file.kind, self._separator, file.start, file.stop)

    @property
    def files(self) -> list[File]:
        """The files of training text."""
        return self._sides[TRAIN]

    @property
    def paths(self) -> set[Path]:
        """The files of both sides without symbolic links."""
        return {file.path.resolve() for side in self._sides for file in side}

    def open_chunks(self, file: File) -> Iterator[Iterable[bytes]]:
        """Iterates over the documents of a file in chunks; a file that is one document need not fit in memory."""
        if file.has_records or self._separator:
            yield from ([bytes(document.text)] for document in self._open(file))
        else:
            yield _checked(file)

    def _digest(self, whole: bool) -> str:
        digest = hashlib.sha256()
        for side in self._sides:
            digest.update(b"%d\n" % len(side))
            for file in side:
                _add_file(digest, file, whole)
        if self._separator or any(file.has_records for side in self._sides for file in side):
            digest.update(repr((self._by_document, self._field, self._label, self._separator)).encode())
        if self._read_as != "auto":
            digest.update(self._read_as.encode())
        return digest.hexdigest()[:16]


def _describe(kinds: Counter[str], skipped: Skipped) -> list[str]:
    notes = []
    if len(kinds) > 1:
        notes.append(f"files: {', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())}")
    if count := sum(map(len, skipped.values())):
        reasons = (
            f"{len(paths):,} {reason} ({paths[0]}{', ...' * (len(paths) > 1)})" for reason, paths in skipped.items()
        )
        notes.append(f"skipped {count:,} of {count + kinds.total():,} files: {', '.join(reasons)}")
    return notes


def _checked(file: File) -> Iterator[bytes]:
    """The chunks of a file, each a valid part of a text."""
    start = file.start
    for chunk in read_chunks(file.path, file.start, file.stop, file.kind.compression):
        if file.kind.format != BYTES:
            check_utf8(chunk, str(file.path), start, cut=True)
        start += len(chunk)
        yield chunk


def _add_file(digest: hashlib._Hash, file: File, whole: bool) -> None:
    # Compressed files and records are hashed as stored, without unpacking them.
    start, stop = (0, None) if file.kind.compression or file.has_records else (file.start, file.stop)
    size = (file.path.stat().st_size if stop is None else stop) - start
    digest.update(b"%b\0%d\0" % (os.fsencode(file.name), size))
    for chunk in read_chunks(file.path, start, start + size) if whole else ():
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
    paths = _walk(folder, lambda name: name in NOT_LIBRARY or name.startswith(NOT_LIBRARY_PREFIXES), {})
    sources = [path for path in paths if path.suffix == ".py" and path.stat().st_size]
    if not sources:
        raise DataError("data.files", f"it is empty, and the sources of the standard library are not in {folder}")
    return [File(path.relative_to(folder).as_posix(), path, Kind(TEXT)) for path in sources]


def _split_list(files: str, key: str) -> list[str]:
    """Splits a list of paths at commas, except inside double quotes; the path of an existing file is one path."""
    if files.strip() and local_path(files.strip(), key).exists():
        return [files.strip()]
    matches = re.finditer(r'\s*(?:"([^"]*)"|([^,]*))\s*(?:,|$)', files)
    return [path for match in matches if (path := match[1] or (match[2] or "").strip())]


def _find_validation(files: str, split: str) -> str:
    """Lists the folders in `files` that have a validation split, in the form of `files`."""
    folders = (local_path(name, "data.files") for name in _split_list(files, "data.files"))
    return ",".join(
        f'"{folder}"'
        for folder in folders
        if saved.has_splits(folder) and (split != SPLITS[VALIDATION] or split in saved.list_splits(folder))
    )


def _list_files(
    files: str, key: str, split: tuple[str, str], read_as: str, skipped: Skipped, peek: bool = False
) -> list[File]:
    """Lists the files to read, and adds those that folders and globs hold besides to `skipped`.

    Args:
      files: See `load_corpus`.
      key: Configuration key of `files`.
      split: Configuration key and name of the split to read of a data set with splits.
      read_as: See `load_corpus`.
      skipped: Is extended.
      peek: Whether to inspect only the start of every file.
    """
    listed: dict[Path, File] = {}  # by resolved path: a file that is named twice must not be on both sides
    for item in (local_path(name, key) for name in _split_list(files, key)):
        if saved.has_splits(item):
            item = saved.find_split(item, split[1], split[0])
        root, paths = _expand(item, key, skipped)
        real = {path.resolve() for path in paths if not path.is_symlink()}
        for path in paths:
            kind, reason = _inspect(path, key, read_as, is_named=path == item, peek=peek)
            target = path.resolve()
            if not reason and (target in listed or (path.is_symlink() and target in real)):
                reason = "repeated"
            if reason:
                skipped.setdefault(reason, []).append(str(path))
            else:
                listed[target] = File(path.relative_to(root).as_posix(), path, kind, start=kind.start)
    if not listed:
        raise DataError(key, f"no text in {files}: {'; '.join(_describe(Counter(), skipped))}")
    return list(listed.values())


def _inspect(path: Path, key: str, read_as: str, is_named: bool, peek: bool) -> tuple[Kind, str]:
    """Returns the kind of a file, and the reason to skip it if it is in a folder and holds no text."""
    mode = path.stat().st_mode if path.exists() else 0
    if not stat.S_ISREG(mode):
        reason = "folder" if path.is_dir() else "broken link" if path.is_symlink() else "special"
        return Kind(""), reason
    if not path.stat().st_size:
        if is_named:
            raise DataError(key, f"{path} is empty")
        return Kind(""), "empty"
    kind = detect(path, read_as)
    if kind.format == TEXT and not (is_named or peek):
        kind, empty = _look_for_zeros(path, kind)
        if empty:
            return kind, "empty"
    if kind.format:
        return kind, ""
    if kind.binary and not is_named:
        return kind, "binary"
    raise DataError(key, f"{path} is {kind.problem}; {kind.remedy or AS_BYTES}")


def _look_for_zeros(path: Path, kind: Kind) -> tuple[Kind, bool]:
    """Returns the kind of a text, which is binary if it has a zero byte, and whether the text is empty."""
    empty = True
    for chunk in read_chunks(path, kind.start, None, kind.compression):
        if b"\0" in chunk:
            return Kind("", binary=True), False
        empty = False
    return kind, empty


def _expand(item: Path, key: str, skipped: Skipped) -> tuple[Path, list[Path]]:
    """Expands a file, folder or glob to the folder that names are relative to, and its files."""
    if item.is_file():
        return item.parent, [item]
    if shards := saved.list_shards(item, key):
        root, paths = item, shards
    elif item.is_dir():
        root, paths = item, _walk(item, lambda name: name.startswith("."), skipped)
    elif item.exists():
        raise DataError(key, f"{item} is neither a file nor a folder")
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), item.parts))
        if root == item:
            raise DataError(key, f"no such file or folder: {item}")
        paths = sorted(map(Path, glob.glob(str(item), recursive=True)), key=Path.as_posix)
        if "**" in item.parts:  # which matches the folders whose files it matches
            paths = [path for path in paths if not path.is_dir()]
    if not paths:
        raise DataError(key, f"no file {'in' if root == item else 'matches'} {item}")
    return root, paths


def _walk(folder: Path, hide: Callable[[str], bool], skipped: Skipped) -> list[Path]:
    """Paths below `folder` that are no folders, sorted by relative name; links to folders are followed.

    Files and folders whose names `hide` matches, and folders that are read already, are added to `skipped`.
    """
    paths: list[Path] = []
    pending, seen = [folder], set[str]()
    while pending:  # links come after real folders, whose names decide on the split
        for parent, folders, names in os.walk(pending.pop(0), onerror=_raise):
            if (real := os.path.realpath(parent)) in seen:
                skipped.setdefault("repeated", []).append(parent)
                folders.clear()
                continue
            seen.add(real)
            if hidden := sorted(filter(hide, folders + names)):
                skipped.setdefault("hidden", []).extend(os.path.join(parent, name) for name in hidden)
            links = {name for name in folders if os.path.islink(os.path.join(parent, name)) and not hide(name)}
            pending += [Path(parent, name) for name in sorted(links)]
            folders[:] = sorted(name for name in folders if name not in links and not hide(name))
            paths += [Path(parent, name) for name in names if not hide(name)]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise DataError("data.files", f"{error.filename}: {error.strerror}")


def _split(files: list[File], characters: bool) -> tuple[list[File], list[File]]:
    if len(files) == 1:
        [file] = files
        compression = file.kind.compression
        stop = sum(map(len, read_chunks(file.path, 0, None, compression))) if compression else file.path.stat().st_size
        cut = max(file.start, stop - max(1, (stop - file.start) // HELD_OUT))
        if characters:  # a continuation byte of UTF-8 starts with the bits 10
            after = b"".join(read_chunks(file.path, cut, cut + 4, compression))
            cut += next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)
        return [dataclasses.replace(file, stop=cut)], [dataclasses.replace(file, start=cut, stop=stop)]
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
