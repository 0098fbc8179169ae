"""Kinds of files: what a file holds, known by its content; its name decides only where the content is ambiguous."""

from __future__ import annotations

import bz2
import codecs
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparsejax.data.errors import DataError

CHUNK = 1 << 20  # bytes per read
FEED = 1 << 14  # compressed bytes per call of a decompressor, which bounds the bytes that the call returns
HEAD = 1 << 16  # bytes of the content by which a file is known

READ_AS = ("auto", "text", "bytes")  # values of `data.read_as`
TEXT, BYTES, LINES, JSON = "text", "bytes", "JSON lines", "JSON"
PARQUET, ARROW, ARROW_STREAM = "parquet", "Arrow", "Arrow stream"
COLUMNS = (PARQUET, ARROW, ARROW_STREAM)
RECORDS = (LINES, JSON, *COLUMNS)

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jl")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lzma", ".bgz", ".dz")
JSON_OBJECT = re.compile(rb'\{\s*("(?:[^"\\]|\\.)*"\s*:|\}\s*$)')
JSON_ARRAY = re.compile(rb"\[\s*" + JSON_OBJECT.pattern)

MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)")
COLUMN_MAGIC = {b"PAR1": PARQUET, b"ARROW1\0\0": ARROW, b"\xff\xff\xff\xff": ARROW_STREAM}
# Encodings of text by their byte order marks; UTF-32 comes first, because a mark of UTF-16 is its prefix.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
UNPACK, EXTRACT = "unpack it", "extract its text"
UNREADABLE = {  # magic number -> name and remedy
    b"PK\x03\x04": ("a zip archive", UNPACK),
    b"PK\x05\x06": ("a zip archive", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": ("a rar archive", UNPACK),
    b"\x04\x22\x4d\x18": ("compressed with lz4", UNPACK),
    b"\x1f\x9d": ("compressed with compress", UNPACK),
    b"%PDF-": ("a PDF file", EXTRACT),
    b"{\\rtf": ("an RTF file", EXTRACT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Office file", EXTRACT),
    b"\x93NUMPY": ("a NumPy array", EXTRACT),
    b"SQLite format 3\0": ("an SQLite database", EXTRACT),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", EXTRACT),
    b"FEA1": ("a Feather file of version 1", "write it as parquet"),
    b"PARE": ("encrypted parquet", "decrypt it"),
    b"Obj\x01": ("an Avro file", "write it as parquet"),
    b"ORC": ("an ORC file", "write it as parquet"),
    b"\x80\x02": ("a pickle", EXTRACT),
    b"\x89PNG": ("a PNG image", ""),
    b"\xff\xd8\xff": ("a JPEG image", ""),
    b"GIF8": ("a GIF image", ""),
    b"\x7fELF": ("a program", ""),
}


class Kind(NamedTuple):
    """What a file holds.

    Attributes:
      format: "text", "bytes", or one of `RECORDS`; "" if the file cannot be read.
      compression: "gzip", "bzip2", "xz", "zstd", or "".
      start: Length of the byte order mark of UTF-8, which is not part of the text.
      problem: What the file is instead, if it cannot be read, such as "a zip archive".
      remedy: What to do about it.
      binary: Whether a file that cannot be read is no text in any encoding.
    """

    format: str
    compression: str = ""
    start: int = 0
    problem: str = ""
    remedy: str = ""
    binary: bool = False


def detect(path: Path, read_as: str = "auto") -> Kind:
    """Recognizes the kind of a file by its first bytes, decompressed if need be.

    A file whose first line is a JSON object is JSON lines, and a file that starts with an array of objects is JSON,
    whatever its name. A file whose name ends in .json or .jsonl holds records in any case.

    Args:
      path: The file.
      read_as: "text" reads records as text, "bytes" everything as it is stored.

    Raises:
      DataError: The file cannot be read, or its compressed data are damaged.
    """
    if read_as == "bytes":
        return Kind(BYTES)
    head = b"".join(islice(read_chunks(path, stop=HEAD), 1))
    compression = _compression(head)
    if compression:
        head = b"".join(read_chunks(path, 0, HEAD, compression))
        if inner := _compression(head) or next(
            (name for magic, name in COLUMN_MAGIC.items() if head.startswith(magic)), ""
        ):
            return Kind("", compression, problem=f"{inner} inside {compression}", remedy=UNPACK, binary=True)
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    known, problem, remedy, binary = _recognize(path, head[start:], read_as)
    return Kind(known, compression, start, problem, remedy, binary)


def _recognize(path: Path, head: bytes, read_as: str) -> tuple[str, str, str, bool]:
    """Format, problem, remedy, and whether the file is binary."""
    for magic, columns in COLUMN_MAGIC.items():
        if head.startswith(magic):
            return columns, "", "", False
    for magic, encoding in ENCODINGS.items():
        if head.startswith(magic):
            return "", f"{encoding} text", f"convert it: iconv -f {encoding} -t UTF-8", False
    for magic, (problem, remedy) in UNREADABLE.items():
        if head.startswith(magic):
            return "", problem, remedy, True
    if head[257:262] == b"ustar":
        return "", "a tar archive", UNPACK, True
    if b"\0" in head:
        return "", f"binary, byte {head.index(0):,} is zero", "", True
    return (TEXT if read_as == "text" else _recognize_json(path, head)), "", "", False


def _recognize_json(path: Path, head: bytes) -> str:
    stem = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    suffix = stem.suffix.lower()
    head = head.lstrip()
    if head.startswith(b"[") and (suffix in JSON_SUFFIXES or JSON_ARRAY.match(head)):
        return JSON
    line, newline, _ = head.partition(b"\n")
    if JSON_OBJECT.match(head) and (_is_object(line) or (not newline and len(head) > HEAD // 2)):
        return LINES
    if suffix == ".json" and newline:
        return JSON
    return LINES if suffix in JSON_SUFFIXES else TEXT


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _compression(head: bytes) -> str:
    if BZIP2.match(head):
        return "bzip2"
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")


def read_chunks(path: Path, start: int = 0, stop: int | None = None, compression: str = "") -> Iterator[bytes]:
    """Reads the bytes of a file from `start` to `stop`, which count decompressed bytes.

    Raises:
      DataError: The file cannot be read, or its compressed data are truncated or damaged.
    """
    try:
        if compression:
            yield from _slice(_decompress(path, compression), start, stop)
        else:
            yield from _read_raw(path, start, stop)
    except EOFError:
        raise DataError("data.files", f"{path}: the {compression} data are truncated") from None
    except OSError as error:
        raise DataError("data.files", f"{path}: {error.strerror or error}") from error


def _read_raw(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        size = CHUNK if stop is None else min(CHUNK, stop - start)
        while size > 0 and (chunk := file.read(size)):
            yield chunk
            start += len(chunk)
            size = CHUNK if stop is None else min(CHUNK, stop - start)


def _slice(chunks: Iterator[bytes], start: int, stop: int | None) -> Iterator[bytes]:
    offset = 0
    for chunk in chunks:
        part = chunk[max(0, start - offset) : None if stop is None else max(0, stop - offset)]
        offset += len(chunk)
        if part:
            yield part
        if stop is not None and offset >= stop:
            return


def _decompress(path: Path, compression: str) -> Iterator[bytes]:
    """Decompresses all streams of a file; zeros after a stream are padding."""
    start_stream = _decompressor(path, compression)
    with path.open("rb") as file:
        stream, data = start_stream(), file.read(FEED)
        while data:
            if stream.eof:
                stream = start_stream()
            try:
                yield stream.decompress(data)
            except Exception as error:  # the libraries have no common base class
                raise DataError("data.files", f"{path}: the {compression} data are damaged") from error
            data = (stream.unused_data if stream.eof else b"") or file.read(FEED)
            while stream.eof and data and not (data := data.lstrip(b"\0")):
                data = file.read(FEED)
        if not stream.eof:
            raise EOFError


def _decompressor(path: Path, compression: str) -> Callable[[], Any]:
    if compression == "zstd":
        return (
            import_package("zstandard", "data.files", f"{path} is compressed with zstd")
            .ZstdDecompressor()
            .decompressobj
        )
    return {
        "gzip": lambda: zlib.decompressobj(wbits=31),
        "bzip2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
    }[compression]


def import_package(name: str, argument: str, reason: str) -> Any:
    """Imports an optional package.

    Raises:
      DataError: The package is not installed.
    """
    try:
        return __import__(name)
    except ImportError:
        raise DataError(argument, f"{reason}, which needs {name}; pip install 'sparsejax[text]'") from None
