"""From nested dicts to the dataclasses of the schema."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, RequiredValueError

from sparsejax.config.schema import Config
from sparsejax.data.probes import PROBES, Probe
from sparsejax.errors import InputError, describe_value, shorten, suggest
from sparsejax.layers import FEEDFORWARDS, MIXERS, FeedForwardConfig, MixerConfig
from sparsejax.overrides import MAX_DEPTH, MAX_FLOAT, Overrides, flatten, to_python
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
EXPECTED = {bool: "true or false", str: "text"}


class ConfigError(InputError):
    """An invalid configuration; the argument is the dotted key."""


def unknown_key(key: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error about a key whose last part `name` is none of the known names."""
    return ConfigError(key, f"unknown key; {suggest(name, known, 'keys')}")


def copy_sections(section: Any, path: str = "", depth: int = 0) -> Any:
    """Copies nested sections as dicts; values are converted to Python's, and references are shared.

    Raises:
      ConfigError: A key is not a string or contains a dot, or a value is an array or nested too deeply.
    """
    if isinstance(section, FieldReference) and section.get_type() in (dict, ConfigDict) and not section.empty():
        section = section.get()
    if not isinstance(section, dict | ConfigDict):
        try:
            if not isinstance(section, FieldReference):
                return to_python(section, path, depth)
            if not section.empty():
                _compute(section, path)  # a ConfigDict cannot hold a reference that fails
            return section
        except InputError as error:
            raise ConfigError(error.argument, error.problem) from None
    items = section.items(preserve_field_references=True) if isinstance(section, ConfigDict) else section.items()
    copy = {}
    for name, item in items:
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigError(path or "config", f"{name!r} is not a key; a key is text without a dot")
        if depth > MAX_DEPTH:
            raise ConfigError(path, f"more than {MAX_DEPTH} nested sections")
        copy[name] = copy_sections(item, f"{path}.{name}" if path else name, depth + 1)
    return copy


def resolve(section: Any, path: str = "") -> Any:
    """Copies nested sections as dicts with the values of references.

    Raises:
      ConfigError: A required placeholder has no value, or a reference cannot be computed.
    """
    section = copy_sections(section, path) if isinstance(section, ConfigDict) else section
    if isinstance(section, dict):
        return {name: resolve(item, f"{path}.{name}" if path else name) for name, item in section.items()}
    if type(section) in (list, tuple):
        return type(section)(resolve(item, f"{path}[{i}]") for i, item in enumerate(section))
    if not isinstance(section, FieldReference):
        return section
    return resolve(copy_sections(_compute(section, path), path), path)


def _compute(reference: FieldReference, path: str) -> Any:
    """The value of a reference."""
    try:
        return reference.get()
    except RequiredValueError:
        raise ConfigError(path, "is a placeholder without a value, or computed from one; set it") from None
    except Exception as error:
        raise ConfigError(path, f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def complete(section: Any, annotation: Any = Config, kind: Any = None) -> Any:
    """Fills in the defaults of a configuration, which may be a record that is older than some keys.

    Args:
      section: Nested dicts.
      annotation: What the section is in the schema.
      kind: Kind of the section, if a sibling of it holds the kind.
    """
    return _complete(annotation, section, kind)


def build(schema: type, section: dict[str, Any]) -> Any:
    """Builds a dataclass of the schema, such as ModelConfig, from its section.

    Raises:
      ConfigError: A key is unknown, missing or of the wrong type, or a value is invalid.
    """
    return _build(schema, section, "")


def to_section(config: Any) -> dict[str, Any]:
    """Returns the section from which `build` builds a dataclass of the schema, such as a ModelConfig."""
    schema: type = type(config)
    hints = hints_of(schema)
    return {name: _to_value(getattr(config, name), split_none(hints[name])[0]) for name in fields_of(schema)}


def _to_value(value: Any, annotation: Any = None) -> Any:
    if isinstance(value, Pattern):
        return str(value)
    if is_section(value):
        kinds = getattr(UNIONS.get(annotation), "members", UNIONS.get(annotation, ()))
        kind = next((kind for kind in kinds if member_of(annotation, {"kind": kind}) is type(value)), None)
        return ({} if kind is None else {"kind": kind}) | to_section(value)
    if isinstance(value, Mapping):
        return {name: _to_value(item) for name, item in value.items()}
    return tuple(map(_to_value, value)) if isinstance(value, tuple) else value


def _complete(annotation: Any, value: Any, kind: Any = None) -> Any:
    """Fills in the defaults of nested sections; what does not fit the schema is left for `build` to reject."""
    annotation, _ = split_none(annotation)
    if annotation in UNIONS:
        value = {} if value is None and is_kind(annotation, kind) else value
        annotation = member_of(annotation, value, kind)
    if annotation is int and type(value) is float and value.is_integer():
        return int(value)
    if not isinstance(value, dict) or annotation == Overrides:
        return value
    if typing.get_origin(annotation) is dict:
        return {key: _complete(typing.get_args(annotation)[1], item) for key, item in value.items()}
    if not is_section(annotation):
        return value
    fields, hints = fields_of(annotation), hints_of(annotation)
    missing = [name for name in fields if name not in value and is_optional(fields[name])]
    value = value | {name: _default(fields[name]) for name in missing}
    return {
        name: _complete(hints[name], _update(fields[name], item), _kind_of(fields[name], value))
        if name in fields
        else item
        for name, item in value.items()
    }


def annotation_of(config: Mapping[str, Any], key: str) -> Any:
    """The annotation of a dotted key, given the kinds in a configuration; None for a key that the schema lacks."""
    annotation: Any = Config
    section: Any = config
    kind: Any = None
    for name in key.split(".") if key else ():
        annotation, _ = split_none(annotation)
        if annotation in UNIONS:
            annotation = member_of(annotation, section, kind)
        kind = None
        if typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1] if annotation != Overrides else None
        elif is_section(annotation) and name in fields_of(annotation):
            kind = _kind_of(fields_of(annotation)[name], section)
            annotation = hints_of(annotation)[name]
        else:
            return None
        try:
            section = section.get(name) if isinstance(section, Mapping | ConfigDict) else None
        except Exception:  # a reference that has no value, or cannot be computed, is no section
            section = None
    return annotation


def _build(annotation: Any, value: Any, path: str, kind: Any = None) -> Any:
    """Builds what an annotation names: a dataclass, one of a union, a dict by name, a tuple or a plain value."""
    annotation, optional = split_none(annotation)
    if optional and value is None:
        return None
    if annotation in UNIONS:
        return _build_member(annotation, value, path, kind)
    if is_section(annotation):
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
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect("a number", number and abs(value) < MAX_FLOAT, path, value)
        return float(value)
    if annotation is int:
        value = int(value) if type(value) is float and value.is_integer() else value
        _expect("an integer", type(value) is int, path, value)
        _expect("an integer within 64 bits", -(2**63) <= value < 2**63, path, value)
        return value
    if annotation not in EXPECTED:
        raise ConfigError(path, f"the annotation {annotation} is not one that a configuration can hold")
    _expect(EXPECTED[annotation], type(value) is annotation, path, value)
    return value


def _build_member(union: Any, value: Any, path: str, kind: Any) -> Any:
    if kind is not None:  # of a sibling, which its own section checks
        if not is_kind(union, kind):
            raise ConfigError(path, f"expected none, since {kind!r} has no keys of its own")
        return _build_section(member_of(union, value, kind), value, path)
    _expect("a section", isinstance(value, dict), path, value)
    if "kind" not in value:
        raise ConfigError(f"{path}.kind", "missing")
    kind = value["kind"]
    if not is_kind(union, kind):
        hint = suggest(kind, UNIONS[union], "kinds") if isinstance(kind, str) else "expected text"
        if union is MixerConfig and not hint.startswith("did"):
            hint = f"import the module that registers it; {hint}"
        raise ConfigError(f"{path}.kind", f"{describe_value(kind)} is not a kind; {hint}")
    schema = member_of(union, value)
    if "kind" not in fields_of(schema):  # a class that serves several kinds has a field for it
        value = {name: item for name, item in value.items() if name != "kind"}
    return _build_section(schema, value, path)


def _build_section(schema: type, value: Any, path: str) -> Any:
    _expect("a section", isinstance(value, dict), path, value)
    fields, prefix = fields_of(schema), f"{path}." if path else ""
    for name in value:
        if name not in fields:
            raise unknown_key(f"{prefix}{name}", name, list(fields))
    arguments = {}
    for name, field in fields.items():
        if name in value:
            hint, kind = hints_of(schema)[name], _kind_of(field, value)
            arguments[name] = _build(hint, _update(field, value[name]), f"{prefix}{name}", kind)
        elif not is_optional(field):
            raise ConfigError(f"{prefix}{name}", "missing")
    try:
        return schema(**arguments)
    except InputError as error:
        named = ConfigError(error.argument, shorten(error.problem))
        raise (named.within(path) if path else named) from None


def _expect(expected: str, holds: Any, path: str, value: Any) -> None:
    if not holds:
        raise ConfigError(path, f"expected {expected}, got {describe_value(value)}")


# Annotations and fields.


def split_none(annotation: Any) -> tuple[Any, bool]:
    """An annotation without None and Pattern, whose text a configuration holds, and whether it has None."""
    if not isinstance(annotation, types.UnionType):
        return annotation, False
    members = [member for member in typing.get_args(annotation) if member not in (types.NoneType, Pattern)]
    return functools.reduce(operator.or_, members), types.NoneType in typing.get_args(annotation)


def is_section(annotation: Any) -> bool:
    """Whether an annotation is a dataclass."""
    return dataclasses.is_dataclass(annotation)


def is_kind(union: Any, kind: Any) -> bool:
    """Whether a kind is one of a union's."""
    return isinstance(kind, str) and kind in UNIONS[union]


def member_of(union: Any, section: Any, kind: Any = None) -> Any:
    """The class of a union that a section, or the kind of its sibling, selects; None for an unknown kind."""
    if kind is None:
        kind = section.get("kind") if isinstance(section, Mapping | ConfigDict) else None
    kind = kind.get() if isinstance(kind, FieldReference) and not kind.empty() else kind
    if not is_kind(union, kind):
        return None
    member = UNIONS[union][kind]  # the tables of layers hold the module too
    return member[0] if isinstance(member, tuple) else member


def _kind_of(field: dataclasses.Field, section: Any) -> Any:
    """The kind that a sibling of the field holds; None if the field's section holds its own."""
    return section.get(field.metadata["kind"], "") if "kind" in field.metadata else None


@functools.cache
def hints_of(schema: Any) -> dict[str, Any]:
    """The annotations of the fields of a dataclass by name."""
    # A module that a configuration file imports may have left `sys.modules`.
    return typing.get_type_hints(schema, localns=getattr(vars(schema).get("__init__"), "__globals__", None))


@functools.cache
def fields_of(schema: Any) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass by name."""
    return {field.name: field for field in dataclasses.fields(schema)}


def is_optional(field: dataclasses.Field) -> bool:
    """Whether a field has a default."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _update(field: dataclasses.Field, value: Any) -> Any:
    """The value of a key, from one that only records and files of earlier versions hold, see the metadata `older`."""
    return field.metadata.get("older", {}).get(value, value) if isinstance(value, bool | str) else value


def _default(field: dataclasses.Field) -> Any:
    """The default of a field, a section as a dict."""
    default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return dataclasses.asdict(default) if is_section(default) else default
