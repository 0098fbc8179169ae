"""Damage to files: bytes that are lost or changed, and values of another type, size or depth."""

from __future__ import annotations

import csv
import io
import json
import random
import struct
from typing import Any

DEEP = "deep"  # stands for an array nested 5,000 deep, which `json.dumps` cannot write
HUGE = "huge"  # an integer of 400 digits
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, -0.0, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**12, 1e-320, 1e308),
    *(float("inf"), float("-inf"), float("nan")),
    *("", " ", "x" * 300, "../../x", "/dev/null", "a\0b", "\x1b[31m", "\ud800", "\uffff", "nan", "1e999", "<&>]]>"),
    *([], {}, [[]], [1, 2], {"a": 1}, {"": {}}, [None], ["x"]),
    *(f"\0{DEEP}\0", f"\0{HUGE}\0"),
)


def damage(rng: random.Random, name: str, content: bytes) -> bytes | None:
    """Returns a damaged content of a file; None for a folder in its place."""
    if rng.random() < 0.03:
        return None
    structured = rng.random() < 0.6
    try:
        if structured and name.endswith((".jsonl", ".journal")):
            lines = content.split(b"\n")
            index = rng.randrange(len(lines))
            lines[index] = _change_json(rng, lines[index])
            return b"\n".join(lines)
        if structured and name.endswith(".json"):
            return _change_json(rng, content)
        if structured and name.endswith(".safetensors"):
            (size,) = struct.unpack("<Q", content[:8])
            header = _change_json(rng, content[8 : 8 + size])
            return struct.pack("<Q", len(header)) + header + content[8 + size :]
        if structured and name.endswith(".csv"):
            return _change_csv(rng, content)
        if structured and name.endswith(".parquet"):
            return _change_parquet(rng, content)
    except (ValueError, TypeError, LookupError, ArithmeticError):  # this value does not fit this format
        pass
    return _change_bytes(rng, content)


def _change_bytes(rng: random.Random, content: bytes) -> bytes:
    start, stop = sorted(rng.randint(0, len(content)) for _ in range(2))
    kind = rng.randrange(9)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[stop:]
    if kind == 2:
        return content[:stop] + content[start:]
    if kind == 3:
        return content[:start] + bytes(stop - start) + content[stop:]
    if kind == 4:
        return b""
    if kind == 5:
        return content[:start] + rng.randbytes(rng.randint(1, 8)) + content[start:]
    if kind == 6:
        return content.decode("latin-1").encode("utf-16")
    if kind == 7:
        return (
            content[:start] + rng.choice([b"\xff", b"\0", b"\xed\xa0\x80", b"[" * 3000, b"9" * 400]) + content[start:]
        )
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 8)) if damaged else ():
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _change_json(rng: random.Random, content: bytes) -> bytes:
    """JSON of which one to three values or keys are different."""
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _change_value(rng, value)
    text = json.dumps(value)
    return (
        text.replace(f'"\\u0000{DEEP}\\u0000"', "[" * 5000 + "]" * 5000)
        .replace(f'"\\u0000{HUGE}\\u0000"', "9" * 400)
        .encode()
    )


def _change_value(rng: random.Random, value: Any) -> Any:
    nodes: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        node = stack.pop()
        items = list(node.items() if isinstance(node, dict) else enumerate(node))
        nodes += [(node, key) for key, _ in items]
        stack += [item for _, item in items if isinstance(item, dict | list)]
    if not nodes or rng.random() < 0.03:
        return rng.choice(VALUES)
    node, key = rng.choice(nodes)
    kind = rng.random()
    if kind < 0.15:
        del node[key]
    elif kind < 0.25 and isinstance(node, dict):
        node[str(rng.choice(VALUES))] = node.pop(key)
    elif kind < 0.35 and type(node[key]) in (int, float):
        node[key] = rng.choice([-node[key], node[key] + 1, node[key] * 1000, float(node[key]), str(node[key])])
    else:
        node[key] = rng.choice(VALUES)
    return value


def _change_csv(rng: random.Random, content: bytes) -> bytes:
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    row = rows[0 if rng.random() < 0.15 else rng.randrange(len(rows))]
    index = rng.randrange(len(row))
    if rng.random() < 0.15:
        del row[index]
    else:
        value = rng.choice(VALUES)
        row[index] = value if isinstance(value, str) else json.dumps(value)
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode(errors="surrogatepass")


def _change_parquet(rng: random.Random, content: bytes) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(content))
    index = rng.randrange(table.num_columns)
    values: list[Any] = table.column(index).to_pylist()
    kind = rng.random()
    if kind < 0.1:
        table = table.remove_column(index)
    else:
        if kind < 0.4:
            values = [rng.choice(VALUES)] * len(values)
        elif values:
            values[rng.randrange(len(values))] = rng.choice(VALUES)
        if rng.random() < 0.3:
            values = [
                None if value is None else str(value).encode(errors="surrogatepass") + b"\xff" for value in values
            ]
        try:
            column = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise ValueError(str(error)) from error
        table = table.set_column(index, table.column_names[index], column)
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()
