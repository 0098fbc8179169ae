"""Corpora: which bytes are trained on and which are held out."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

SEPARATOR = b"\0"  # between documents, so that a model sees where a file starts
HELD_OUT = 20  # one file in so many is validation; of a single file, the last one-in-so-many of its bytes
HELD_OUT_REMAINDER = 13  # any would do; this one holds out 5 % of Python's own bytes, and no odd ones

# What lies in the standard library's folder but is a test, an installed package, or about one machine only.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "sitecustomize.py"}
NOT_LIBRARY_PREFIXES = ("config-", "_sysconfigdata")

Documents = list[tuple[str, bytes]]  # name, text


class DataError(ValueError):
    """One line on what is wrong with the data, naming the config key and the place."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text as bytes, split by file, the documents of a side joined by a zero byte.

    Attributes:
      train: uint8 [n], read-only.
      validation: uint8 [m], read-only.
      digest: 16 hex digits that change with any file's name, bytes or side.
      train_files: Number of documents in `train`.
      validation_files: Number of documents in `validation`. A single file, cut in two, counts on both sides.

    """

    train: np.ndarray
    validation: np.ndarray
    digest: str
    train_files: int
    validation_files: int


def load_corpus(files: str) -> Corpus:
    """Reads a corpus and splits it into training and validation text.

    The side of a file depends on nothing but its name below its folder (or below the fixed part of its
    glob), so that a new file moves no other. Where this puts all files on one side, the last one is held
    out; of a single file, the last 5 %.

    Args:
      files: A file, a folder, a glob, or several of them separated by commas. A file is taken as it is. Of a
        folder (with its subfolders, without hidden names) or a glob, the files that are text are taken: not
        empty and without zero bytes. "" is the text that comes with Python: its standard library's sources
        without the tests.

    Raises:
      DataError: Nothing there, nothing in it, or not readable.

    """
    train, validation = _split(_named(files) if files.strip() else _standard_library())
    digest = _digest(train, validation)
    return Corpus(_joined(train), _joined(validation), digest, len(train), len(validation))


def _standard_library() -> Documents:
    folder = Path(sysconfig.get_path("stdlib"))
    found = _walk(folder, lambda name: name in NOT_LIBRARY or name.startswith(NOT_LIBRARY_PREFIXES))
    sources = [(path.relative_to(folder).as_posix(), _read(path)) for path in found if path.suffix == ".py"]
    if not sources:
        raise DataError(f"data.files: is empty, and Python's own sources are not in {folder}")
    return [(name, text) for name, text in sources if text]


def _named(files: str) -> Documents:
    documents = {}  # by resolved path: a file that is named twice must not fall on both sides
    for item in (Path(name.strip()).expanduser() for name in files.split(",") if name.strip()):
        root, found = _find(item)
        for path in (path for path in found if path.resolve() not in documents):
            text = _read(path)
            if path == item and not text:
                raise DataError(f"data.files: {path} is empty")
            if path == item or (text and SEPARATOR not in text):
                documents[path.resolve()] = path.relative_to(root).as_posix(), text
    if not documents:
        raise DataError(f"data.files: no text in {files}: only empty files and files with zero bytes")
    return list(documents.values())


def _find(item: Path) -> tuple[Path, list[Path]]:
    """What one item of `data.files` stands for: the folder that names are relative to, and its files."""
    if item.is_file():
        return item.parent, [item]
    if item.is_dir():
        root, found = item, _walk(item, lambda name: name.startswith("."))
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), item.parts))
        if root == item:
            raise DataError(f"data.files: no such file or folder: {item}")
        matches = map(Path, glob.glob(str(item), recursive=True))
        found = sorted(filter(Path.is_file, matches), key=Path.as_posix)
    if not found:
        raise DataError(f"data.files: no file {'in' if root == item else 'matches'} {item}")
    return root, found


def _walk(folder: Path, skip: Callable[[str], bool]) -> list[Path]:
    """The files below `folder`, sorted by relative name, without the files and folders that `skip` names."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not skip(name)]
        found += [Path(parent, name) for name in names if not skip(name)]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(folder).as_posix())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data.files: cannot read {path}: {error.strerror}") from error


def _split(documents: Documents) -> tuple[Documents, Documents]:
    if len(documents) == 1:
        [(name, text)] = documents
        cut = len(text) - max(1, len(text) // HELD_OUT)
        return [(name, text[:cut])], [(name, text[cut:])]
    held = [_is_held_out(name) for name, _ in documents]
    if all(held) or not any(held):
        held = [False] * (len(documents) - 1) + [True]
    train = [document for document, out in zip(documents, held, strict=True) if not out]
    return train, [document for document, out in zip(documents, held, strict=True) if out]


def _is_held_out(name: str) -> bool:
    number = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
    return number % HELD_OUT == HELD_OUT_REMAINDER


def _joined(documents: Documents) -> np.ndarray:
    return np.frombuffer(SEPARATOR.join(text for _, text in documents), np.uint8)


def _digest(*sides: Documents) -> str:
    digest = hashlib.sha256()
    for side in sides:
        digest.update(b"%d\n" % len(side))
        for name, text in side:
            digest.update(b"%b\0%d\0" % (os.fsencode(name), len(text)))
            digest.update(text)
    return digest.hexdigest()[:16]
