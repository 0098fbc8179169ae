"""Files of text, jsonl and parquet, plain or compressed, as documents."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.errors import DataError

CHUNK = 1 << 20  # bytes that are read at once
LARGE = 1 << 26  # bytes; a larger document is not read at once
COMPRESSED = (".gz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".parquet")


class Document(NamedTuple):
    """A text with the name of its place, and its class if it has one; the text of a large file is mapped, uint8 [n]."""

    name: str
    text: bytes | np.ndarray
    label: int = -1


def holds_records(path: Path) -> bool:
    """Whether a file is a list of records, jsonl or parquet, of which a field is the text."""
    return _kind(path) in RECORDS


def read_chunks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from `start` to `stop`, of a file whose name ends in .gz or .zst those that it unpacks to.

    Raises:
      DataError: not readable; compressed data that ends too early or is damaged.
    """
    try:
        if path.suffix in COMPRESSED:
            yield from _cut(_decompress(path), start, stop)
        else:
            yield from read_raw(path, start, (path.stat().st_size if stop is None else stop) - start)
    except EOFError:
        raise DataError(f"data.files: {path} ends too early: a truncated {path.suffix} file") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"data.files: {path} is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"data.files: cannot read {path}: {error.strerror}") from error


def read_raw(path: Path, start: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file from `start` on, as they lie on the disk.

    Raises:
      DataError: not readable.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            while size > 0 and (chunk := file.read(min(CHUNK, size))):
                size -= len(chunk)
                yield chunk
    except OSError as error:
        raise DataError(f"data.files: cannot read {path}: {error.strerror}") from error


def read_text(path: Path, name: str, separator: bytes, start: int = 0, stop: int | None = None) -> Iterator[Document]:
    """The documents of a text file, or of its bytes from `start` to `stop`: all of it, or the parts between separators.

    Raises:
      DataError: as of `read_chunks`.
    """
    chunks = read_chunks(path, start, stop)
    if not separator:
        size = (path.stat().st_size if stop is None else stop) - start
        mapped = path.suffix not in COMPRESSED and size > LARGE
        text = np.memmap(path, np.uint8, "r", start, (size,)) if mapped else b"".join(chunks)
        yield Document(name, text)
        return
    number, rest = 0, b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator)
        for text in whole:
            yield Document(f"{name}: document {number}", text)
            number += 1
    if rest:  # the last separator may end the file
        yield Document(f"{name}: document {number}", rest)


def read_records(path: Path, name: str, field: str, label: str = "") -> Iterator[Document]:
    """The documents of a jsonl or parquet file.

    Args:
      path: The file.
      name: What to call it.
      field: Which field of a record is the text; in a nested record of jsonl "outer.inner".
      label: Which field is the class, an integer of at least 0; "" if there is none.

    Raises:
      DataError: A record that is none, or has no such field; names the file and the line.
    """
    rows = _read_parquet(path, field, label) if _kind(path) == ".parquet" else _read_json(path, field, label)
    for line, text, number in rows:
        where = f"data.files: {path}: line {line}"
        if not isinstance(text, str | bytes | None):
            raise DataError(f"{where}: field {field!r} is {type(text).__name__}, not text")
        if label and (type(number) is not int or number < 0):
            raise DataError(f"{where}: field {label!r} is {number!r}, not a class from 0")
        text = text.encode(errors="surrogatepass") if isinstance(text, str) else text or b""
        yield Document(f"{name}: line {line}", text, number if label else -1)


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def _cut(chunks: Iterator[bytes], start: int, stop: int | None) -> Iterator[bytes]:
    at = 0
    for chunk in chunks:
        part = chunk[max(0, start - at) : None if stop is None else max(0, stop - at)]
        at += len(chunk)
        if part:
            yield part


def _decompress(path: Path) -> Iterator[bytes]:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while chunk := file.read(CHUNK):
                yield chunk
        return
    zstandard = require("zstandard", f"{path} is compressed with zstd")
    with path.open("rb") as file:
        frame = zstandard.ZstdDecompressor().decompressobj()
        data = file.read(CHUNK)
        while data:
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DataError(f"data.files: {path} is damaged: {error}") from error
            data = frame.unused_data or file.read(CHUNK)
            if frame.eof and data:  # a file may hold several frames
                frame = zstandard.ZstdDecompressor().decompressobj()
        if not frame.eof:
            raise EOFError


def _read_json(path: Path, field: str, label: str) -> Iterator[tuple[int, Any, Any]]:
    for line, row in enumerate(_lines(path), 1):
        if row.strip():  # an empty line is no record
            try:
                record = json.loads(row)
            except ValueError as error:
                raise DataError(f"data.files: {path}: line {line} is not JSON: {error}") from error
            yield line, _pick(record, field, path, line), _pick(record, label, path, line) if label else None


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for chunk in read_chunks(path):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    yield rest


def _pick(record: Any, field: str, path: Path, line: int) -> Any:
    for key in field.split("."):
        if not isinstance(record, dict) or key not in record:
            known = f"its fields are {', '.join(map(str, record))}" if isinstance(record, dict) else "is no object"
            raise DataError(f"data.field: {path}: line {line} has no {field!r}: {known}")
        record = record[key]
    return record


def _read_parquet(path: Path, field: str, label: str) -> Iterator[tuple[int, Any, Any]]:
    require("pyarrow", f"{path} is parquet")
    import pyarrow
    from pyarrow import parquet

    if path.suffix in COMPRESSED:
        raise DataError(f"data.files: {path}: parquet compresses by itself; unpack it first")
    names = [name for name in (field, label) if name]
    try:
        with parquet.ParquetFile(path) as file:
            for name in names:
                if name not in file.schema_arrow.names:
                    raise DataError(f"data.field: {path} has no {name!r}: {', '.join(file.schema_arrow.names)}")
            line = 0
            for batch in file.iter_batches(1024, columns=names):
                columns = [batch.column(name).to_pylist() for name in names]
                for row in zip(*columns, strict=True):
                    line += 1
                    yield line, row[0], row[-1] if label else None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data.files: {path} cannot be read as parquet: {error}") from error


def require(package: str, reason: str) -> Any:
    """An optional package.

    Raises:
      DataError: it is not installed.
    """
    try:
        return __import__(package)
    except ImportError:
        raise DataError(f"{reason}, and {package} is not installed: pip install 'sparsejax[text]'") from None
