"""Documents from files of text and of records."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.kinds import ARROW_STREAM, BYTES, COLUMNS, LINES, PARQUET, Kind, import_package, read_chunks

LARGE = 1 << 26  # bytes; a larger document is mapped into memory
CHECKED = 1 << 22  # bytes of text that are checked at once
ROWS = 1024  # of a column that become Python objects at once
LISTED = 20  # fields in a message
AS_TEXT = "data.read_as='text' reads the file as text"
AS_BYTES = "data.read_as='bytes' reads any bytes"


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


def read_text(
    path: Path, name: str, kind: Kind, separator: bytes = b"", start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """Reads a file of text or bytes, or a part of it, as one document or as one per separator.

    Args:
      path: The file.
      name: Name of the file in `Document.name`.
      kind: Kind of the file.
      separator: Separator of the documents; b"" if the file is one document.
      start: First byte of the decompressed text.
      stop: End of the decompressed text; None for that of the file.

    Raises:
      DataError: The file cannot be read, its compressed data are damaged, or its text is not UTF-8.
    """
    chunks = read_chunks(path, start, stop, kind.compression)
    if separator:
        texts: Iterable[bytes | np.ndarray] = split(chunks, separator)
    else:
        size = 0 if kind.compression else (path.stat().st_size if stop is None else stop) - start
        texts = [np.memmap(path, np.uint8, "r", start, (size,)) if size > LARGE else b"".join(chunks)]
    for number, text in enumerate(texts):
        if kind.format != BYTES:
            check_utf8(text, str(path), start, cut=start > kind.start or stop is not None)
        start += len(text) + len(separator)
        yield Document(f"{name}: document {number}" if separator else name, text)


def check_utf8(
    text: bytes | np.ndarray, location: str, start: int = 0, *, cut: bool = False, argument: str = "data.files"
) -> None:
    """Checks that a text is UTF-8 without zeros.

    Args:
      text: The text.
      location: File, and record if there are any.
      start: Offset of the text in the file.
      cut: Whether the text is a part of a longer one, which may start and end within a character.
      argument: The configuration key of the text, for errors.

    Raises:
      DataError: It is not.
    """
    head = bytes(text[:3]) if cut else b""
    offset = len(head) - len(head.lstrip(bytes(range(0x80, 0xC0))))
    while offset < len(text):
        part = bytes(text[offset : offset + CHECKED])
        last = offset + len(part) == len(text)
        try:
            used = len(part) if part.isascii() else codecs.utf_8_decode(part, "strict", last and not cut)[1]
        except UnicodeDecodeError as error:
            remedy = "convert the text, for instance with iconv"
            if argument == "data.files":
                remedy += f"; {AS_BYTES}"
            problem = f"{location}: byte {start + offset + error.start:,} is not UTF-8; {remedy}"
            raise DataError(argument, problem) from None
        if b"\0" in part:
            byte = start + offset + part.index(0)
            raise DataError(argument, f"{location}: binary, byte {byte:,} is zero; {AS_BYTES}")
        if last:
            return
        offset += used


def read_records(path: Path, name: str, kind: Kind, field: str, label: str = "") -> Iterator[Document]:
    """Reads the records of a file as documents.

    Args:
      path: The file.
      name: Name of the file in `Document.name`.
      kind: Kind of the file.
      field: Field of the text; "outer.inner" in a nested record of JSON.
      label: Field of the class, a non-negative integer; "" if there is none.

    Raises:
      DataError: A record is malformed or lacks a field; the message names the file and line.
    """
    read = _read_columns if kind.format in COLUMNS else _read_lines if kind.format == LINES else _read_json
    for location, text, number in read(path, kind, field, label):
        problem = None
        if not isinstance(text, str | bytes | None):
            problem = f"field {field!r} is {type(text).__name__}, not text"
        elif label and (type(number) is not int or not 0 <= number < 1 << 31):
            problem = f"field {label!r} is {_shorten(number)}, not a non-negative integer of 32 bits"
        elif isinstance(text, str):
            try:
                text = text.encode()
            except UnicodeEncodeError as error:
                problem = f"field {field!r} has half of a surrogate pair at character {error.start}"
        elif text is not None:
            check_utf8(text, f"{path}: {location}: field {field!r}")
        if problem:
            raise DataError("data.files", f"{path}: {location}: {problem}")
        yield Document(f"{name}: {location}", text or b"", number if label else -1)


def split(chunks: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """Texts between separators, in linear time; the last one only if it is not empty."""
    parts: list[bytes] = []  # of the text in progress
    tail = b""  # its end, in which a separator may start
    for chunk in chunks:
        first, *others = (tail + chunk).split(separator)
        if others:
            yield b"".join([*parts, first])
            yield from others[:-1]
            parts, first = [], others[-1]
        cut = max(0, len(first) - len(separator) + 1)
        parts.append(first[:cut])
        tail = first[cut:]
    last = b"".join([*parts, tail])
    if last:
        yield last


Record = tuple[str, Any, Any]  # location in the file, text, label


def _read_lines(path: Path, kind: Kind, field: str, label: str) -> Iterator[Record]:
    lines = split(read_chunks(path, kind.start, None, kind.compression), b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():  # an empty line is not a record
            location = f"line {number}"
            yield _pick_fields(_parse(line, path, location), field, label, path, location)


def _read_json(path: Path, kind: Kind, field: str, label: str) -> Iterator[Record]:
    """Reads an array of records, or one record, which is parsed as a whole."""
    value = _parse(b"".join(read_chunks(path, kind.start, None, kind.compression)), path, "")
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield _pick_fields(record, field, label, path, f"record {number}")


def _parse(data: bytes, path: Path, location: str) -> Any:
    where = f"{path}: {location}" if location else str(path)
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise DataError("data.files", f"{where}: byte {error.start:,} is not UTF-8") from None
    except RecursionError:
        raise DataError("data.files", f"{where} is nested too deeply") from None
    except ValueError as error:
        raise DataError("data.files", f"{where} is not valid JSON: {error}; {AS_TEXT}") from error


def _pick_fields(record: Any, field: str, label: str, path: Path, location: str) -> Record:
    text = _pick(record, field, "data.field", path, location)
    return location, text, _pick(record, label, "data.label", path, location) if label else None


def _pick(record: Any, field: str, argument: str, path: Path, location: str) -> Any:
    for key in field.split("."):
        if not isinstance(record, dict) or key not in record:
            known = f"its fields are {_list(record)}" if isinstance(record, dict) else "it is no object"
            raise DataError(argument, f"{path}: {location} has no {field!r}: {known}; {AS_TEXT}")
        record = record[key]
    return record


def _read_columns(path: Path, kind: Kind, field: str, label: str) -> Iterator[Record]:
    pyarrow = import_package("pyarrow", "data.files", f"{path} is {kind.format}")
    arguments = {field: "data.field"} | ({label: "data.label"} if label else {})
    number = 0
    try:
        for batch in _read_batches(pyarrow, path, kind, arguments):
            for start in range(0, batch.num_rows, ROWS):
                part = batch.slice(start, ROWS)
                columns = [_to_list(pyarrow, part.column(name)) for name in arguments]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield f"line {number}", values[0], values[-1] if label else None
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        after = f" after line {number}" if number else ""
        problem = " ".join(str(error).split()) or type(error).__name__
        raise DataError("data.files", f"{path}: the {kind.format} data are damaged{after}: {problem}") from error


def _read_batches(pyarrow: Any, path: Path, kind: Kind, arguments: dict[str, str]) -> Iterator[Any]:
    if kind.format == PARQUET:
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            _require_columns(path, file.schema_arrow.names, arguments)
            yield from file.iter_batches(ROWS, columns=list(arguments))
        return
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as source:
        reader = ipc.open_stream(source) if kind.format == ARROW_STREAM else ipc.open_file(source)
        _require_columns(path, reader.schema.names, arguments)
        if kind.format == ARROW_STREAM:
            yield from reader
        else:
            yield from map(reader.get_batch, range(reader.num_record_batches))


def _require_columns(path: Path, names: list[str], arguments: dict[str, str]) -> None:
    for name, argument in arguments.items():
        if name not in names:
            raise DataError(argument, f"{path} has no {name!r}: its fields are {_list(names)}")


def _to_list(pyarrow: Any, column: Any) -> list[Any]:
    """Values of a column; those of a text are bytes, because a damaged file can hold any."""
    types = pyarrow.types
    column.validate()
    if types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    if types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    elif types.is_large_string(column.type) or types.is_string_view(column.type):
        column = column.cast(pyarrow.large_binary())
    column.validate(full=True)
    return column.to_pylist()


def _list(names: Iterable[object]) -> str:
    """The first of many names."""
    shown = [
        _shorten(name) if isinstance(name, str) and not name.isprintable() else str(name)[:80]
        for name in islice(names, LISTED + 1)
    ]
    return ", ".join(shown[:LISTED]) + (", ..." if len(shown) > LISTED else "")


def _shorten(value: object) -> str:
    text = f"{value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 1000 else ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
