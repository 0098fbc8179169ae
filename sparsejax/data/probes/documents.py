"""Byte-level classification and comparison of documents from local files."""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.formats import check_utf8
from sparsejax.data.kinds import TEXT, detect, read_chunks
from sparsejax.data.probes.example import Example, Probe, final_example, pick, require
from sparsejax.errors import InputError

PADDING, SEPARATOR = 256, 257  # tokens after the bytes


@dataclass(frozen=True)
class TextClassification(Probe):
    """The class of a document, predicted at its last byte.

    Byte-level text classification of Long Range Arena (arXiv:2011.04006), section 2.2.2, which uses the IMDb reviews:
    files=aclImdb/train, validation_files=aclImdb/test. A folder has one subfolder per class, with one document per
    file, in UTF-8 and perhaps compressed; hidden files are ignored. Documents are truncated to `length` bytes.

    Published results (4,096 bytes, 2 classes): Transformer 64.3 %, BigBird 64.0 %, local attention 53.0 %; S4 86.8 %
    (arXiv:2111.00396).
    """

    files: str = ""  # folder of training documents
    validation_files: str = ""  # folder of validation documents
    classes: tuple[str, ...] = ("neg", "pos")  # subfolders, in the order of the class numbers
    length: int = 4096  # bytes per document

    def __post_init__(self):
        require(self, length=1)
        if not 2 <= len(self.classes) <= 256 or len(set(self.classes)) < len(self.classes):
            raise InputError("classes", f"{', '.join(self.classes)}: expected 2 to 256 distinct names")

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
        kind = detect(path, "text")
        if kind.format != TEXT:
            problem = f"{path} is {kind.problem or kind.format}; {kind.remedy or 'give documents of text'}"
            raise DataError(f"data.probe.{key}", problem)
        text = b"".join(read_chunks(path, kind.start, kind.start + self.length, kind.compression))
        if not text:
            raise DataError(f"data.probe.{key}", f"{path} is empty")
        check_utf8(text, str(path), cut=len(text) == self.length, argument=f"data.probe.{key}")
        return final_example(np.frombuffer(text, np.uint8), label, self.length, PADDING)


@functools.cache
def _list_documents(key: str, folder: str, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Files and their classes, by class and name."""
    known = ", ".join(classes)
    if not folder:
        raise DataError(f"data.probe.{key}", f"missing; give a folder with the subfolders {known}")
    documents = []
    for label, name in enumerate(classes):
        subfolder = Path(folder).expanduser() / name
        if not subfolder.is_dir():
            raise DataError(f"data.probe.{key}", f"no folder {subfolder}; give a folder with the subfolders {known}")
        paths = sorted(path for path in subfolder.iterdir() if not path.name.startswith("."))
        if not paths:
            raise DataError(f"data.probe.{key}", f"no file in {subfolder}")
        if others := [path for path in paths if not path.is_file()]:
            raise DataError(f"data.probe.{key}", f"{others[0]} is not a file; a class has one document per file")
        documents += [(path, label) for path in paths]
    return documents


@dataclass(frozen=True)
class TextRetrieval(Probe):
    """Whether two documents are related (1) or not (0), predicted at the last byte of their concatenation.

    Byte-level document retrieval of Long Range Arena (arXiv:2011.04006), section 2.2.3, which uses pairs of papers
    that cite one another. Files are tab-separated tables whose first column is the label (0, 1, 0.0 or 1.0) and whose
    last two columns are the texts. LRA encodes the documents separately and classifies both encodings; here one
    sequence holds both documents and a separator, so any model can be evaluated. Each text is truncated to
    (length - 1) // 2 bytes.

    Published results (2 x 4,000 bytes): Transformer 57.5 %, BigBird 59.3 %, local attention 53.4 %; S4 90.9 %
    (arXiv:2111.00396).
    """

    files: str = ""  # table of training pairs
    validation_files: str = ""  # table of validation pairs
    length: int = 8001  # bytes per pair: both texts and the separator

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
            location = f"{path}: line {number + 1}"
            label, *texts = _split_line(f"data.probe.{key}", location, file.readline())
        for text in texts:
            check_utf8(text, location, argument=f"data.probe.{key}")
        half = (self.length - 1) // 2
        first, second = (np.frombuffer(text[:half], np.uint8) for text in texts)
        return final_example(np.concatenate([first, [SEPARATOR], second]), label, self.length, PADDING)


@functools.cache
def _find_lines(key: str, path: str) -> np.ndarray:
    """Offset of each line of a file, and of its end: int64 [lines + 1]."""
    if not path:
        raise DataError(f"data.probe.{key}", "missing; give a tab-separated table of label, text and text")
    try:
        with Path(path).expanduser().open("rb") as file:
            starts = np.fromiter(itertools.accumulate(map(len, file), initial=0), np.int64)
    except OSError as error:
        raise DataError(f"data.probe.{key}", f"{path}: {error.strerror}") from error
    if len(starts) == 1:
        raise DataError(f"data.probe.{key}", f"{path} is empty")
    return starts


def _split_line(argument: str, location: str, line: bytes) -> tuple[int, bytes, bytes]:
    label, *columns = line.rstrip(b"\r\n").split(b"\t")
    if len(columns) < 2 or label not in (b"0", b"1", b"0.0", b"1.0") or not (columns[-2] and columns[-1]):
        raise DataError(argument, f"{location}: expected a label 0 or 1 and two texts, separated by tabs")
    return int(float(label)), columns[-2], columns[-1]
