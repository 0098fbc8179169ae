"""Overrides: the one form in which the command line, sweeps, phases and evaluations change a configuration.

Overrides are a dict by dotted key, such as `{"train.steps": 100, "model.schedule": "4x(local)"}`. A string is read as
the command line reads it: as text where the key holds text, else as a literal, so that `"100"` and `100` are the same
value of `train.steps`. Other values are taken as they are.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sparsejax.errors import InputError

Overrides = dict[str, Any]
SEED = "train.seed"  # runs that differ only in it are repetitions of one configuration
LABEL = "label"  # no key of the configuration: the name of a run in tables and figures

LITERALS = {"true": True, "false": False, "none": None}  # in any case, besides the literals of Python
MAX_FLOAT = 2**1023  # beyond which integers may not be floats
MAX_DEPTH = 50  # nested sections and lists in a value


def parse_overrides(texts: Iterable[str]) -> Overrides:
    """Parses `KEY=VALUE` texts. The last of several values of a key counts.

    Raises:
      InputError: A text has no `=`.
    """
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(key, "has no value; write KEY=VALUE")
        overrides[key] = value
    return overrides


def write_overrides(overrides: Mapping[str, Any]) -> list[str]:
    """Writes `KEY=VALUE` texts, which `parse_overrides` reads."""
    return [f"{key}={write_value(value)}" for key, value in overrides.items()]


def write_value(value: Any) -> str:
    """Writes a value as the command line takes it."""
    value = to_python(value)
    return value if isinstance(value, str) else repr(value)


def to_python(value: Any, key: str = "value", depth: int = 0) -> Any:
    """Converts scalars of NumPy and JAX to Python's, and paths to text, also inside dicts, lists and tuples.

    Args:
      value: A value of a configuration.
      key: Its key, for errors.
      depth: Number of containers around the value.

    Raises:
      InputError: The value is an array with axes, or is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise InputError(key, f"more than {MAX_DEPTH} nested lists")
    if isinstance(value, dict):
        return {name: to_python(item, f"{key}.{name}", depth + 1) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_python(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(value))
    if hasattr(value, "item") and hasattr(value, "ndim"):
        if value.ndim:
            raise InputError(key, f"an array of shape {tuple(value.shape)} is not a value; use a list, as of .tolist()")
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def read_value(value: Any, current: Any) -> Any:
    """Reads the value of an override.

    Args:
      value: The value, or its text.
      current: The value that it replaces. Text stays text if this is text; an integer becomes a float if this is one.
    """
    value = to_python(value)
    if isinstance(value, str) and not isinstance(current, str):
        value = _read_literal(value)
    return float(value) if isinstance(current, float) and type(value) is int and abs(value) < MAX_FLOAT else value


def _read_literal(text: str) -> Any:
    if text.lower() in LITERALS:
        return LITERALS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def flatten(section: Mapping[str, Any], prefix: str = "") -> Overrides:
    """Values of nested sections by dotted key; an empty section is a value."""
    overrides: Overrides = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            overrides |= flatten(value, f"{prefix}{key}.")
        else:
            overrides[f"{prefix}{key}"] = value
    return overrides


def shorten_keys(keys: Iterable[str]) -> dict[str, str]:
    """Maps each key to its shortest suffix of whole parts that is a suffix of no other key."""
    suffixes = {key: [key.split(".", skip)[-1] for skip in range(key.count("."), -1, -1)] for key in keys}
    others = {key: {end for other in suffixes if other != key for end in suffixes[other]} for key in suffixes}
    return {key: next((end for end in suffixes[key] if end not in others[key]), key) for key in suffixes}


def describe_overrides(overrides: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """Overrides as a label, such as "width=64, steps=100"; `names` defaults to the shortened keys."""
    names = shorten_keys(overrides) if names is None else names
    return ", ".join(f"{names[key]}={write_value(value)}" for key, value in overrides.items())


def name_runs(sweep: Sequence[Overrides], excluded: Collection[str] = ()) -> list[str]:
    """Describes the overrides of each run, without the excluded keys, by names that are common to all runs."""
    names = shorten_keys({key for overrides in sweep for key in overrides} - {LABEL})
    kept = [{key: run[key] for key in sorted(run) if key in names and key not in excluded} for run in sweep]
    return [describe_overrides(overrides, names) or "config" for overrides in kept]
