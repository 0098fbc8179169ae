"""Documents from text, jsonl and parquet files, plain or compressed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.errors import DataError

CHUNK = 1 << 20  # bytes per read
LARGE = 1 << 26  # bytes; a larger document is mapped into memory
COMPRESSED = (".gz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".parquet")


class Document(NamedTuple):
    """A text.

    Attributes:
      name: File and line or number, for the split and for errors.
      text: The bytes; those of a large file are mapped into memory, uint8 [n].
      label: The class, or -1.
    """

    name: str
    text: bytes | np.ndarray
    label: int = -1


def holds_records(path: Path) -> bool:
    """Whether a file consists of records, one of whose fields is the text."""
    return _kind(path) in RECORDS


def read_chunks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Reads the bytes of a file from `start` to `stop`, after decompression if its name ends in .gz or .zst.

    Raises:
      DataError: The file cannot be read, or its compressed data are truncated or damaged.
    """
    try:
        if path.suffix in COMPRESSED:
            yield from _slice(_decompress(path), start, stop)
        else:
            yield from read_raw(path, start, (path.stat().st_size if stop is None else stop) - start)
    except EOFError:
        raise DataError("data.files", f"{path}: the {path.suffix} file is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError("data.files", f"{path}: the {path.suffix} file is damaged") from error
    except OSError as error:
        raise DataError("data.files", f"{path}: {error.strerror}") from error


def read_raw(path: Path, start: int, size: int) -> Iterator[bytes]:
    """Reads `size` bytes of a file from `start`, without decompression.

    Raises:
      DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            while size > 0 and (chunk := file.read(min(CHUNK, size))):
                size -= len(chunk)
                yield chunk
    except OSError as error:
        raise DataError("data.files", f"{path}: {error.strerror}") from error


def read_text(path: Path, name: str, separator: bytes, start: int = 0, stop: int | None = None) -> Iterator[Document]:
    """Reads a text file, or its bytes from `start` to `stop`, as one document or as one per separator.

    Raises:
      DataError: See `read_chunks`.
    """
    chunks = read_chunks(path, start, stop)
    if not separator:
        size = (path.stat().st_size if stop is None else stop) - start
        mapped = path.suffix not in COMPRESSED and size > LARGE
        text = np.memmap(path, np.uint8, "r", start, (size,)) if mapped else b"".join(chunks)
        yield Document(name, text)
        return
    for number, text in enumerate(_split(chunks, separator)):
        yield Document(f"{name}: document {number}", text)


def read_records(path: Path, name: str, field: str, label: str = "") -> Iterator[Document]:
    """Reads the records of a jsonl or parquet file as documents.

    Args:
      path: The file.
      name: Name of the file in `Document.name`.
      field: Field of the text; "outer.inner" in a nested jsonl record.
      label: Field of the class, a non-negative integer; "" if there is none.

    Raises:
      DataError: A record is malformed or lacks a field; the message names the file and line.
    """
    records = _read_parquet(path, field, label) if _kind(path) == ".parquet" else _read_json(path, field, label)
    for line, text, number in records:
        location = f"{path}: line {line}"
        if not isinstance(text, str | bytes | None):
            raise DataError("data.files", f"{location}: field {field!r} is {type(text).__name__}, not text")
        if label and (type(number) is not int or number < 0):
            raise DataError("data.files", f"{location}: field {label!r} is {number!r}, not a non-negative integer")
        text = text.encode(errors="surrogatepass") if isinstance(text, str) else text or b""
        yield Document(f"{name}: line {line}", text, number if label else -1)


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def _slice(chunks: Iterator[bytes], start: int, stop: int | None) -> Iterator[bytes]:
    offset = 0
    for chunk in chunks:
        part = chunk[max(0, start - offset) : None if stop is None else max(0, stop - offset)]
        offset += len(chunk)
        if part:
            yield part


def _split(chunks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """Texts between separators; the last one only if it is not empty."""
    tail = b""
    for chunk in chunks:
        *texts, tail = (tail + chunk).split(separator)
        yield from texts
    if tail:
        yield tail


def _decompress(path: Path) -> Iterator[bytes]:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while chunk := file.read(CHUNK):
                yield chunk
        return
    zstandard = import_package("zstandard", "data.files", f"{path} is compressed with zstd")
    with path.open("rb") as file:
        frame = zstandard.ZstdDecompressor().decompressobj()
        data = file.read(CHUNK)
        while data:
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DataError("data.files", f"{path}: the .zst file is damaged") from error
            data = frame.unused_data or file.read(CHUNK)
            if frame.eof and data:  # a file may hold several frames
                frame = zstandard.ZstdDecompressor().decompressobj()
        if not frame.eof:
            raise EOFError


def _read_json(path: Path, field: str, label: str) -> Iterator[tuple[int, Any, Any]]:
    for line, row in enumerate(_split(read_chunks(path), b"\n"), 1):
        if row.strip():  # an empty line is not a record
            try:
                record = json.loads(row)
            except ValueError as error:
                raise DataError("data.files", f"{path}: line {line} is not valid JSON") from error
            text = _pick(record, field, "data.field", path, line)
            yield line, text, _pick(record, label, "data.label", path, line) if label else None


def _pick(record: Any, field: str, argument: str, path: Path, line: int) -> Any:
    for key in field.split("."):
        if not isinstance(record, dict) or key not in record:
            known = f"its fields are {', '.join(map(str, record))}" if isinstance(record, dict) else "it is no object"
            raise DataError(argument, f"{path}: line {line} has no {field!r}: {known}")
        record = record[key]
    return record


def _read_parquet(path: Path, field: str, label: str) -> Iterator[tuple[int, Any, Any]]:
    pyarrow = import_package("pyarrow", "data.files", f"{path} is parquet")
    from pyarrow import parquet

    if path.suffix in COMPRESSED:
        raise DataError("data.files", f"{path}: decompress it first; parquet is compressed internally")
    arguments = {field: "data.field"} | ({label: "data.label"} if label else {})
    try:
        with parquet.ParquetFile(path) as file:
            for name, argument in arguments.items():
                if name not in file.schema_arrow.names:
                    known = ", ".join(file.schema_arrow.names)
                    raise DataError(argument, f"{path} has no {name!r}: its fields are {known}")
            line = 0
            for batch in file.iter_batches(1024, columns=list(arguments)):
                columns = [batch.column(name).to_pylist() for name in arguments]
                for record in zip(*columns, strict=True):
                    line += 1
                    yield line, record[0], record[-1] if label else None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("data.files", f"{path}: the parquet file is damaged") from error


def import_package(name: str, argument: str, reason: str) -> Any:
    """Imports an optional package.

    Raises:
      DataError: The package is not installed.
    """
    try:
        return __import__(name)
    except ImportError:
        raise DataError(argument, f"{reason}, which needs {name}; pip install 'sparsejax[text]'") from None
