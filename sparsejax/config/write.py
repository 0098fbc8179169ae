"""Configuration files written from resolved settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sparsejax.config.schema import Config

WIDTH = 120  # characters per line


def write_config(settings: Mapping[str, Any], docstring: str) -> str:
    """Returns the text of a configuration file that yields these settings, with their sections in the usual order."""
    ordered = {field.name: settings[field.name] for field in dataclasses.fields(Config)}
    return (
        f'"""{docstring}"""\n\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n'
        f"    return ConfigDict(\n        {_write(ordered, 8, 0)}\n    )\n"
    )


def _write(value: Any, indent: int, before: int) -> str:
    """A value as Python. A dict that does not fit into a line behind `before` characters has one line per key."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    inline = ", ".join(f'"{key}": {_write(item, 0, 0)}' for key, item in value.items())
    if len(inline) + indent + before + 3 <= WIDTH and not any(isinstance(item, dict) for item in value.values()):
        return f"{{{inline}}}"
    inner = indent + 4
    lines = [f'{" " * inner}"{key}": {_write(item, inner, len(key) + 4)},\n' for key, item in value.items()]
    return "{\n" + "".join(lines) + " " * indent + "}"
