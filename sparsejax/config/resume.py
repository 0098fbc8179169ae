"""Changes of a configuration with which a run can resume: those of fields with the metadata `resume`."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from sparsejax.config.build import UNIONS, annotation_of, fields_of, is_section, member_of, split_none
from sparsejax.config.override import NESTED_OVERRIDE
from sparsejax.config.schema import Config
from sparsejax.overrides import Overrides

# What a change does to a run, by the metadata `resume` of its field, which also holds for the fields of a section.
EFFECTS = {
    "none": "changes no number",
    "rounding": "changes rounding only",
    "divergence": "changes only steps whose loss diverges",
}
ABSENT = "absent"  # value of a key that only one of two configurations has


@dataclasses.dataclass(frozen=True)
class Change:
    """A key in which two configurations differ.

    Attributes:
      key: The key.
      old: Recorded value.
      new: Requested value.
      effect: Key of `EFFECTS`; None if a run cannot resume with the change.
    """

    key: str
    old: Any
    new: Any
    effect: str | None

    def __str__(self) -> str:
        old, new = (value if value == ABSENT else repr(value) for value in (self.old, self.new))
        return f"{self.key} was {old}, is {new}"


def find_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Returns the keys in which two complete configurations differ."""
    changes = []
    for key, was, now in _differences(old, new, ""):
        effect = _effect(new, key)
        if key.endswith("train.accumulate") and new["model"]["dropout"]:
            effect = None  # each microbatch draws dropout masks of its own
        changes.append(Change(key, was, now, effect))
    return changes


@functools.cache
def resumable_keys() -> tuple[str, ...]:
    """The keys that a resume can change; NAME stands for any name, and a section for its keys."""
    return tuple(dict.fromkeys(_list_keys(Config, "")))


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        if old != new:
            yield key, old, new
        return
    for name in dict.fromkeys([*old, *new]):
        yield from _differences(old.get(name, ABSENT), new.get(name, ABSENT), f"{key}.{name}" if key else name)


def _effect(config: Mapping[str, Any], key: str) -> str | None:
    nested = NESTED_OVERRIDE.fullmatch(key)
    if nested and key.startswith("train."):
        return _effect(config, nested[1])
    path = key.split(".")
    for depth, name in enumerate(path):
        section = functools.reduce(lambda value, name: value.get(name) or {}, path[:depth], config)
        annotation, _ = split_none(annotation_of(config, ".".join(path[:depth])))
        if annotation in UNIONS:
            annotation = member_of(annotation, section, None)
        field = fields_of(annotation).get(name) if is_section(annotation) else None
        if field is not None and "resume" in field.metadata:
            return field.metadata["resume"]
    return None


def _list_keys(annotation: Any, key: str, seen: frozenset[Any] = frozenset()) -> Iterator[str]:
    annotation, _ = split_none(annotation)
    if annotation in UNIONS and annotation not in seen:  # a mixer can hold mixers
        for kind in getattr(UNIONS[annotation], "members", UNIONS[annotation]):
            yield from _list_keys(member_of(annotation, {"kind": kind}), key, seen | {annotation})
    elif typing.get_origin(annotation) is dict and annotation != Overrides:
        yield from _list_keys(typing.get_args(annotation)[1], f"{key}.NAME", seen)
    elif is_section(annotation):
        hints = typing.get_type_hints(annotation)
        for name, field in fields_of(annotation).items():
            path = f"{key}.{name}" if key else name
            if "resume" in field.metadata:
                yield path
            else:
                yield from _list_keys(hints[name], path, seen)
