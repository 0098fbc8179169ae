"""From nested dicts to the dataclasses of the schema."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any

from sparsejax.config.schema import Config
from sparsejax.data.probes import PROBES, Probe
from sparsejax.errors import InputError
from sparsejax.layers import FEEDFORWARDS, MIXERS, FeedForwardConfig, MixerConfig
from sparsejax.overrides import Overrides, flatten
from sparsejax.patterns import Pattern

# Annotations of several classes, of which a section has one, by kind. The kind is the section's key `kind`, or the
# value of the sibling that the field's metadata name.
UNIONS: dict[Any, Mapping[str, Any]] = {MixerConfig: MIXERS, FeedForwardConfig: FEEDFORWARDS, Probe: PROBES}
# Key that holds the kind of another section -> name of that section beside it.
KIND_KEYS = {
    f"{section.name}.{field.metadata['kind']}": field.name
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(typing.get_type_hints(Config)[section.name])
    if "kind" in field.metadata
}
EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


class ConfigError(InputError):
    """An invalid configuration; the argument is the dotted key."""


def unknown_key(key: str, name: str, known: list[str]) -> ConfigError:
    """The error about a key whose last part `name` is none of the known names."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return ConfigError(key, f"unknown key{f'; did you mean {nearest[0]!r}?' if nearest else ''}")


def copy_sections(value: Any) -> Any:
    """Copies nested dicts."""
    return {key: copy_sections(item) for key, item in value.items()} if isinstance(value, dict) else value


def complete(section: dict[str, Any]) -> dict[str, Any]:
    """Fills in the defaults of a configuration, which may be a record that is older than some keys."""
    return _complete(Config, section)


def build(schema: type, section: dict[str, Any]) -> Any:
    """Builds a dataclass of the schema, such as ModelConfig, from its section.

    Raises:
      ConfigError: A key is unknown, missing or of the wrong type, or a value is invalid.
    """
    return _build(schema, section, "")


def _complete(annotation: Any, value: Any, kind: Any = None) -> Any:
    """Fills in the defaults of nested sections; what does not fit the schema is left for `build` to reject."""
    annotation, _ = _split_none(annotation)
    if annotation in UNIONS:
        value = {} if value is None and _is_kind(annotation, kind) else value
        kind = value.get("kind") if kind is None and isinstance(value, dict) else kind
        annotation = _member(annotation, kind) if _is_kind(annotation, kind) else None
    if not isinstance(value, dict) or annotation == Overrides:
        return value
    if typing.get_origin(annotation) is dict:
        return {key: _complete(typing.get_args(annotation)[1], item) for key, item in value.items()}
    if not _is_section(annotation):
        return value
    fields, hints = _fields(annotation), _hints(annotation)
    value = value | {name: _default(field) for name, field in fields.items() if name not in value and _optional(field)}
    return {
        name: _complete(hints[name], item, _kind_of(fields[name], value)) if name in fields else item
        for name, item in value.items()
    }


def _build(annotation: Any, value: Any, path: str, kind: Any = None) -> Any:
    """Builds what an annotation names: a dataclass, one of a union, a dict by name, a tuple or a plain value."""
    annotation, optional = _split_none(annotation)
    if optional and value is None:
        return None
    if annotation in UNIONS:
        return _build_member(annotation, value, path, kind)
    if _is_section(annotation):
        return _build_section(annotation, value, path)
    if typing.get_origin(annotation) is dict:
        _expect("a section", isinstance(value, dict), path, value)
        if annotation == Overrides:
            return flatten(value)
        return {key: _build(typing.get_args(annotation)[1], item, f"{path}.{key}") for key, item in value.items()}
    if typing.get_origin(annotation) is tuple:
        _expect("a tuple", isinstance(value, tuple | list), path, value)
        return tuple(_build(typing.get_args(annotation)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if annotation is float:
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _expect(EXPECTED[float], finite, path, value)
        return float(value)
    if annotation not in EXPECTED:
        raise ConfigError(path, f"the annotation {annotation} is not one that a configuration can hold")
    _expect(EXPECTED[annotation], type(value) is annotation, path, value)
    return value


def _build_member(union: Any, value: Any, path: str, kind: Any) -> Any:
    if kind is not None:  # of a sibling, which its own section checks
        if not _is_kind(union, kind):
            raise ConfigError(path, f"expected none, since {kind!r} has no keys of its own")
        return _build_section(_member(union, kind), value, path)
    _expect("a section", isinstance(value, dict), path, value)
    kind = value.get("kind")
    if not _is_kind(union, kind):
        remedy = "; for another, import the module that registers it" if union is MixerConfig else ""
        raise ConfigError(f"{path}.kind", f"{kind!r} is not one of {', '.join(UNIONS[union])}{remedy}")
    schema = _member(union, kind)
    if "kind" not in _fields(schema):  # a class that serves several kinds has a field for it
        value = {name: item for name, item in value.items() if name != "kind"}
    return _build_section(schema, value, path)


def _build_section(schema: type, value: Any, path: str) -> Any:
    _expect("a section", isinstance(value, dict), path, value)
    fields, prefix = _fields(schema), f"{path}." if path else ""
    for name in value:
        if name not in fields:
            raise unknown_key(f"{prefix}{name}", name, list(fields))
    arguments = {}
    for name, field in fields.items():
        if name in value:
            hint, kind = _hints(schema)[name], _kind_of(field, value)
            arguments[name] = _build(hint, value[name], f"{prefix}{name}", kind)
        elif not _optional(field):
            raise ConfigError(f"{prefix}{name}", "missing")
    try:
        return schema(**arguments)
    except InputError as error:
        named = ConfigError(error.argument, error.problem)
        raise (named.within(path) if path else named) from None


def _expect(expected: str, holds: Any, path: str, value: Any) -> None:
    if not holds:
        raise ConfigError(path, f"expected {expected}, got {'a section' if isinstance(value, dict) else repr(value)}")


# Annotations and fields.


def _split_none(annotation: Any) -> tuple[Any, bool]:
    """An annotation without None and Pattern, whose text a configuration holds, and whether it has None."""
    if not isinstance(annotation, types.UnionType):
        return annotation, False
    members = [member for member in typing.get_args(annotation) if member not in (types.NoneType, Pattern)]
    return functools.reduce(operator.or_, members), types.NoneType in typing.get_args(annotation)


def _is_section(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation)


def _is_kind(union: Any, kind: Any) -> bool:
    return isinstance(kind, str) and kind in UNIONS[union]


def _member(union: Any, kind: str) -> type:
    """The config class of a kind; the tables of layers hold its module too."""
    member = UNIONS[union][kind]
    return member[0] if isinstance(member, tuple) else member


def _kind_of(field: dataclasses.Field, section: dict[str, Any]) -> Any:
    """The kind that a sibling of the field holds; None if the field's section holds its own."""
    return section.get(field.metadata["kind"], "") if "kind" in field.metadata else None


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    # A module that a configuration file imports may have left `sys.modules`.
    return typing.get_type_hints(schema, localns=getattr(vars(schema).get("__init__"), "__globals__", None))


@functools.cache
def _fields(schema: Any) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(schema)}


def _optional(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    """The default of a field, a section as a dict."""
    default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return dataclasses.asdict(default) if _is_section(default) else default
