"""Documents from the user's files, byte by byte, to be classified or compared."""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.probes.example import Example, Probe, ask_at_end, pick, require

PADDING, SEPARATOR = 256, 257  # behind the bytes


@dataclass(frozen=True)
class TextClassification(Probe):
    """Of which class is a document? Bytes, up to `length` of them; the class is asked for at the last one.

    Byte-level text classification of Long Range Arena (arXiv:2011.04006), section 2.2.2, which takes the IMDb reviews:
    files=aclImdb/train, validation_files=aclImdb/test. A folder has one folder for each class, with a document in each
    file (hidden ones do not count). What is behind the first `length` bytes of a document is cut off.

    Outcome (4,096 bytes, 2 classes): Transformer 64.3 %, BigBird 64.0 %, local attention 53.0 %; S4 86.8 %
    (arXiv:2111.00396).
    """

    files: str = ""  # a folder of folders
    validation_files: str = ""  # another
    classes: tuple[str, ...] = ("neg", "pos")  # the folders' names, from class 0 on
    length: int = 4096

    def __post_init__(self):
        require(self, length=1)
        if not 2 <= len(self.classes) <= 256 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be 2 to 256 different names, got {', '.join(self.classes)}")

    @property
    def vocab(self) -> int:
        return PADDING + 1

    @property
    def held_out(self) -> int:
        return len(_list_documents("validation_files", self.validation_files, self.classes))

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        key = "validation_files" if validation else "files"
        documents = _list_documents(key, getattr(self, key), self.classes)
        number = index % len(documents) if validation else pick(len(documents), seed, index)
        path, label = documents[number]
        text = path.read_bytes()[: self.length]
        if not text:
            raise DataError(f"data.probe.{key}: {path} is empty")
        return ask_at_end(np.frombuffer(text, np.uint8), label, self.length, PADDING)


@functools.cache
def _list_documents(key: str, folder: str, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The files of each class, sorted by name, with the class."""
    documents = []
    for label, name in enumerate(classes):
        place = Path(folder).expanduser() / name
        if not folder or not place.is_dir():
            raise DataError(f"data.probe.{key}: needs a folder with folders {', '.join(classes)}; no folder {place}")
        paths = sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith("."))
        if not paths:
            raise DataError(f"data.probe.{key}: no file in {place}")
        documents += [(path, label) for path in paths]
    return documents


@dataclass(frozen=True)
class TextRetrieval(Probe):
    """Do two documents belong together (1) or not (0)? Bytes of both, a mark between them.

    Byte-level document retrieval of Long Range Arena (arXiv:2011.04006), section 2.2.3, which takes pairs of papers
    that cite one another. Files are tables with tabs: a line has the label first (0 or 1, or as 0.0 and 1.0) and the
    two texts last, whatever is between them. There each document is encoded for itself and the classifier sees both
    codes; here one sequence holds both, so that any model can be asked. Each text is cut to (length - 1) // 2 bytes.

    Outcome (2 x 4,000 bytes): Transformer 57.5 %, BigBird 59.3 %, local attention 53.4 %; S4 90.9 % (arXiv:2111.00396).
    """

    files: str = ""  # a table
    validation_files: str = ""  # another
    length: int = 8001  # of both texts and the mark

    def __post_init__(self):
        require(self, length=3)

    @property
    def vocab(self) -> int:
        return SEPARATOR + 1

    @property
    def held_out(self) -> int:
        return len(_find_lines("validation_files", self.validation_files)) - 1

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        key = "validation_files" if validation else "files"
        path = getattr(self, key)
        ends = _find_lines(key, path)
        number = index % (len(ends) - 1) if validation else pick(len(ends) - 1, seed, index)
        with Path(path).expanduser().open("rb") as file:
            file.seek(ends[number])
            label, first, second = _split_line(f"data.probe.{key}: {path}: line {number + 1}", file.readline())
        half = (self.length - 1) // 2
        first, second = (np.frombuffer(text[:half], np.uint8) for text in (first, second))
        return ask_at_end(np.concatenate([first, [SEPARATOR], second]), label, self.length, PADDING)


@functools.cache
def _find_lines(key: str, path: str) -> np.ndarray:
    """Where each line of a file starts, and the last ends: int64 [lines + 1]."""
    if not path:
        raise DataError(f"data.probe.{key}: needs a table: label, tab, text, tab, text")
    try:
        with Path(path).expanduser().open("rb") as file:
            starts = np.fromiter(itertools.accumulate(map(len, file), initial=0), np.int64)
    except OSError as error:
        raise DataError(f"data.probe.{key}: cannot read {path}: {error.strerror}") from error
    if len(starts) == 1:
        raise DataError(f"data.probe.{key}: {path} is empty")
    return starts


def _split_line(place: str, line: bytes) -> tuple[int, bytes, bytes]:
    label, *others = line.rstrip(b"\r\n").split(b"\t")
    if len(others) < 2 or label not in (b"0", b"1", b"0.0", b"1.0") or not (others[-2] and others[-1]):
        raise DataError(f"{place}: expected a label 0 or 1, a tab, and two texts with a tab between them")
    return int(float(label)), others[-2], others[-1]
