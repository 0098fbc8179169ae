"""JSON that may be damaged: every failure to parse it, and every value of another type, is an InputError.

A schema is a type, a tuple of types, a list of one schema, or a dict of schemas by key. The schema of the key `...`
applies to all keys that are not listed. A value is required unless None is among its types. `float` accepts integers,
and no type of number accepts a bool.
"""

from __future__ import annotations

import json
from typing import Any

from sparsejax.errors import InputError

MAX_DEPTH = 100  # of nested objects and arrays; the recursion of Python ends at about 1,000
INTEGERS = range(-(2**63), 2**63)
NAMES = {
    dict: "an object",
    list: "an array",
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def parse_json(text: str | bytes, source: object, schema: Any = None) -> Any:
    """Parses JSON and checks its types.

    Args:
      text: The JSON.
      source: The file or its part, for errors.
      schema: See the module; None accepts every value.

    Raises:
      InputError: The text is not JSON, is nested too deeply, holds characters that no file can hold, or does not fit
        the schema.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text, parse_int=_parse_integer)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails at half of a surrogate pair
        _require_shallow(value)
    except RecursionError:
        raise InputError(source, f"damaged JSON: nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise InputError(source, f"damaged JSON: {error}") from error
    if schema is not None:
        require(value, schema, source)
    return value


def _parse_integer(digits: str) -> int:
    if len(digits) > 20 or (value := int(digits)) not in INTEGERS:
        raise ValueError(f"integer beyond 64 bits: {digits[:20]}{'...' * (len(digits) > 20)}")
    return value


def require(value: Any, schema: Any, source: object, key: str = "") -> None:
    """Raises InputError about the first part of `value` that does not fit `schema`; `key` is the path of `value`."""
    if isinstance(schema, dict):
        _require_type(value, (dict,), source, key)
        for name in schema:
            if name is not ... and name not in value and not _is_optional(schema[name]):
                raise InputError(source, f"damaged: {_join(key, name)} is missing")
        for name in value if ... in schema else schema.keys() & value.keys():
            require(value[name], schema.get(name, schema.get(...)), source, _join(key, name))
    elif isinstance(schema, list):
        _require_type(value, (list,), source, key)
        for index, item in enumerate(value):
            require(item, schema[0], source, _join(key, index))
    else:
        _require_type(value, schema if isinstance(schema, tuple) else (schema,), source, key)


def _is_optional(schema: Any) -> bool:
    return isinstance(schema, tuple) and None in schema


def _require_type(value: Any, types: tuple[Any, ...], source: object, key: str) -> None:
    if value is None and None in types:
        return
    known = tuple(kind for kind in types if kind is not None)
    if isinstance(value, bool) and bool not in known:
        known = ()
    if isinstance(value, known) or (type(value) is int and float in known):
        return
    expected = " or ".join("null" if kind is None else NAMES[kind] for kind in types)
    text = json.dumps(value) if isinstance(value, bool | float | None) else NAMES[type(value)]
    raise InputError(source, f"damaged: {key and f'{key}: '}expected {expected}, got {text}")


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
