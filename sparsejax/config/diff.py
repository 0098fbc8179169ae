"""Comparison of resolved configurations."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ml_collections import ConfigDict


def digest(config: ConfigDict) -> str:
    """Returns 12 hexadecimal digits that identify a resolved configuration."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """Describes the first key at which two resolved configurations differ; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            key = f"{path}.{name}" if path else str(name)
            if name not in old or name not in new:
                return f"{key} is only in {'this config' if name in new else 'the old one'}"
            change = difference(old[name], new[name], key)
            if change:
                return change
        return None
    return None if old == new else f"{path} was {old!r}, is {new!r}"
