"""Overrides of a ConfigDict, and the configurations of phases and evaluations, which are overrides of the run's."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from sparsejax.config.build import (
    EXPECTED,
    KIND_KEYS,
    UNIONS,
    ConfigError,
    annotation_of,
    build,
    complete,
    copy_sections,
    fields_of,
    hints_of,
    is_optional,
    is_section,
    member_of,
    resolve,
    split_none,
    unknown_key,
)
from sparsejax.config.schema import EVALUATION_KEYS, OPTIMIZER_KEYS, OPTIMIZERS, PHASE_KEYS, Config
from sparsejax.errors import InputError, argument_path, suggest
from sparsejax.overrides import flatten, read_value

# Sections that an override can add by any name, and the keys in them that hold overrides themselves.
OPEN_SECTIONS = ("train.phases", "eval.also", "data.sources")
OPTIMIZER = "optimizer.name"  # selects which of `OPTIMIZER_KEYS` the section has
LAYER = re.compile(r"model\.layers\.[^.]+")
NESTED_OVERRIDE = re.compile(r"(?:train\.phases\.[^.]+\.set|eval\.also\.[^.]+)\.(.+)")


def override(config: ConfigDict, overrides: Mapping[str, Any], allowed: Sequence[str] | None = None) -> None:
    """Applies overrides to a ConfigDict in place.

    A key that holds a reference sets what it refers to, so that values computed from it follow. A new kind of a section
    keeps the keys that it has in common with the old kind, and so does another optimizer. `model.layers.NAME=OTHER`
    comes first: it adds a layer, or replaces it, by a copy of the layer `OTHER`, whose keys can then be set.

    Args:
      config: The configuration.
      overrides: Values by dotted key, see `sparsejax.overrides`.
      allowed: The keys that may be set, and prefixes of keys, which end in a dot; None allows every key.

    Raises:
      ConfigError: A key is unknown, a section or not allowed, or a new kind needs keys that are not set.
    """
    changed = {}
    # The kind of a section decides which keys the section has, and the kinds of outer sections come first.
    for key in sorted(overrides, key=_rank):
        old = _set_value(config, key, overrides[key], can_add=allowed is None)
        if allowed is not None and not any(_matches(key, name) for name in allowed):
            names = ", ".join(f"{name}*" if name.endswith(".") else name for name in allowed)
            raise ConfigError(key, f"cannot be set here, only {names}")
        if old is not None:
            changed[key] = old
    for key, old in changed.items():
        _check_kind(config, key, old, overrides)


def _rank(key: str) -> tuple[bool, bool, int]:
    return not LAYER.fullmatch(key), not _names_kind(key), key.count(".") * _names_kind(key)


def _names_kind(key: str) -> bool:
    return key in KIND_KEYS or key.endswith(".kind") or key == OPTIMIZER


def _matches(key: str, name: str) -> bool:
    """Whether `key` is `name`, in which `*` stands for any name, or starts with it if it ends in a dot."""
    pattern = re.escape(name).replace(r"\*", "[^.]+")
    return bool(re.match(pattern if name.endswith(".") else f"{pattern}$", key))


def _set_value(config: ConfigDict, key: str, value: Any, can_add: bool = True) -> Any:
    """Sets a key. Returns the old kind if this changes the class of a section, else None."""
    if can_add and any(key.startswith(f"{name}.") for name in OPEN_SECTIONS):
        _set_open(config, key, value)
        return None
    if LAYER.fullmatch(key) and isinstance(value, str):
        _copy_layer(config, key, value)
        return None
    section, name = _look_up(config, key)
    current = _read_field(section, name)
    value = _read_override(config, key, value, current)
    if isinstance(current, ConfigDict) and value is not None:
        keys = f"{key}.NAME.KEY" if key in OPEN_SECTIONS else f"one of its keys: {', '.join(current.keys())}"
        raise ConfigError(key, f"is a section; set {keys}")
    _replace(section, name, value)
    if not _names_kind(key) or value == current:
        return None
    if key == OPTIMIZER:
        for name in set(OPTIMIZER_KEYS) - set(OPTIMIZERS.get(str(value), OPTIMIZER_KEYS)):
            _replace(section, name, None)
        return None
    if key in KIND_KEYS:
        sibling = KIND_KEYS[key]
        union, _ = split_none(annotation_of(config, f"{key.rpartition('.')[0]}.{sibling}"))
        _replace(section, sibling, complete(None, union, value))
        return None
    return current if _change_kind(config, key, section) else None


def _copy_layer(config: ConfigDict, key: str, name: str) -> None:
    """Sets the layer at `key` to a copy of the layer `name`."""
    section, layers_name = _look_up(config, key.rpartition(".")[0])
    layers = section[layers_name]
    if not isinstance(layers, ConfigDict) or name not in layers:
        raise ConfigError(key, f"{name!r} is not a layer to copy; {suggest(name, layers or (), 'layers')}")
    with layers.unlocked():
        layers[key.rpartition(".")[2]] = ConfigDict(resolve(layers[name]))


def _change_kind(config: ConfigDict, key: str, section: ConfigDict) -> bool:
    """Drops the keys that a section's new kind lacks, and adds its defaults. Returns whether the kind selects a class.

    Args:
      config: The configuration.
      key: The key of the kind.
      section: The section that holds it.
    """
    union, _ = split_none(annotation_of(config, key.rpartition(".")[0]))
    member = member_of(union, section) if union in UNIONS else None
    if member is None:  # such as the kind of a norm, or an unknown kind, which `check` reports
        return False
    fields = fields_of(member)
    for name in set(section.keys()) - {"kind"}:
        # A key of another type, such as `gate` of attention and of the delta rule, has another meaning.
        if name not in fields or (is_optional(fields[name]) and not _fits(member, name, section[name])):
            del section[name]
    for name, value in complete(copy_sections(section), union).items():
        if name not in section:
            section[name] = value
    return True


def _fits(schema: type, name: str, value: Any) -> bool:
    """Whether the type of a value is that of a field that is no section."""
    annotation, optional = split_none(hints_of(schema)[name])
    return annotation not in EXPECTED or (optional and value is None) or type(value) is annotation


def _check_kind(config: ConfigDict, key: str, old: Any, overrides: Mapping[str, Any]) -> None:
    """Raises ConfigError about the kind at `key` if its section lacks keys, or kept values that do not fit it."""
    path, _, _ = key.rpartition(".")
    union, _ = split_none(annotation_of(config, path))
    section, name = _look_up(config, path)
    section = section[name]
    fields = fields_of(member_of(union, section))
    if missing := [name for name in fields if name not in section and name != "kind"]:
        raise ConfigError(key, f"{section.kind!r} also needs {', '.join(missing)}; set {path}.{missing[0]}")
    try:
        build(union, resolve(section))
    except ConfigError as error:
        name = f"{path}.{error.argument}"
        if any(_matches(name, written) or _matches(written, f"{name}.") for written in overrides):
            return  # `check` reports it
        raise ConfigError(key, f"{section.kind!r} with the {error.argument} of {old!r}: {error.problem}") from None


def _read_override(config: ConfigDict, key: str, value: Any, current: Any) -> Any:
    """Reads the value of an override that replaces `current`; see `read_value`."""
    annotation, optional = split_none(annotation_of(config, key))
    if optional and isinstance(value, str) and value.lower() == "none":
        return None
    try:
        return copy_sections(read_value(value, "" if annotation is str else current), key)
    except InputError as error:
        raise ConfigError(key, error.problem) from None


def _set_open(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key of an open section, and adds the sections that lead to it."""
    *path, name = key.split(".")
    nested = NESTED_OVERRIDE.fullmatch(key)
    if nested:
        target, prefix = copy.deepcopy(config), key[: nested.start(1)]
        present = {k.removeprefix(prefix): v for k, v in flatten(copy_sections(config)).items() if k.startswith(prefix)}
        with argument_path(prefix[:-1]):
            for kind in filter(_names_kind, present):
                _set_value(target, kind, present[kind])
            if LAYER.fullmatch(nested[1]):
                raise ConfigError(nested[1], "no layer can be added here; add it to model.layers of the run")
            value = _read_override(target, nested[1], value, _read_field(*_look_up(target, nested[1])))
    else:
        value = _read_override(config, key, value, None)
    section = config
    for depth, part in enumerate(path):
        if part not in section:
            section[part] = ConfigDict()
        section = section[part]
        if not isinstance(section, ConfigDict):
            raise ConfigError(".".join(path[: depth + 1]), "is a value, not a section")
    _replace(section, name, value)


def _look_up(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the section that holds a key, and the key's name there. A section that is none on the way is added."""
    section: Any = config
    *path, name = key.split(".")
    for depth, part in enumerate([*path, name]):
        here = ".".join(path[:depth])
        annotation, _ = split_none(annotation_of(config, here))
        if section is None and is_section(annotation):
            section = _add_section(config, here, complete({}, annotation))
        elif section is None and annotation in UNIONS and part == "kind":
            section = _add_section(config, here, {"kind": None})
        elif section is None and annotation in UNIONS:
            siblings = {f"{kind.rpartition('.')[0]}.{name}": kind for kind, name in KIND_KEYS.items()}
            raise ConfigError(here, f"is none; set {siblings.get(here, f'{here}.kind')} as well")
        if not isinstance(section, ConfigDict):
            raise ConfigError(here, "is a value, not a section")
        annotation = member_of(annotation, section) if annotation in UNIONS else annotation
        if part not in section and not (is_section(annotation) and part in fields_of(annotation)):
            raise unknown_key(f"{here}.{part}" if here else part, part, section.keys())
        if depth < len(path):
            section = _read_field(section, part)
    return section, name


def _add_section(config: ConfigDict, key: str, content: dict[str, Any]) -> ConfigDict:
    section, name = _look_up(config, key)
    _replace(section, name, ConfigDict(content))
    return section[name]


def _read_field(section: ConfigDict, name: str) -> Any:
    """The value of a key; that of a placeholder is an empty value of its type."""
    field = dict(section.items(preserve_field_references=True)).get(name)
    if not isinstance(field, FieldReference):
        return field
    if field.empty():
        return field.get_type()() if field.get_type() in (int, float, str, bool) else None
    return resolve(field, name)


def _replace(section: ConfigDict, name: str, value: Any) -> None:
    field = dict(section.items(preserve_field_references=True)).get(name)
    if isinstance(field, FieldReference):
        field.set(value, type_safe=False)
        return
    with section.unlocked():
        if name in section:
            del section[name]  # a ConfigDict converts a value to the type of the previous one; `check` reports the type
        section[name] = value


def check(config: ConfigDict) -> Config:
    """Builds the dataclasses of a configuration and checks every phase and every evaluation of `eval.also`.

    Raises:
      ConfigError: A key is unknown, missing or of the wrong type, or a value is invalid. The error names the key and,
        for an unknown one, the nearest known key.
    """
    config = ConfigDict(resolve(config))
    checked = build(Config, config.to_dict())
    for name in checked.train.phases:
        check_phase(config, name)
    for name in checked.eval.also:
        check_evaluation(config, name)
    return checked


def follow_references(config: ConfigDict, resolved: ConfigDict) -> None:
    """Adds to the phases and evaluations of `resolved` the keys that follow a key which they set, by a reference.

    Args:
      config: The configuration with its references.
      resolved: The same configuration without references.

    Raises:
      ConfigError: A phase or an evaluation cannot set a key that follows.
    """
    phases, evaluations = _dicts(resolved, "train", "phases"), _dicts(resolved, "eval", "also")
    if not (phases or evaluations) or not _references(config):
        return
    by_phase = {}
    for name, phase in phases.items():
        if isinstance(phase.get("set"), ConfigDict):
            by_phase[name] = _follow(config, f"train.phases.{name}.set", phase.set, PHASE_KEYS)
    starts = {name: phases[name].start for name in by_phase if type(phases[name].get("start")) is int}
    last = by_phase[max(starts, key=starts.__getitem__)] if starts else config
    for name, section in evaluations.items():
        _follow(last, f"eval.also.{name}", section, EVALUATION_KEYS)


def _follow(config: ConfigDict, key: str, section: ConfigDict, allowed: Sequence[str]) -> ConfigDict:
    """Adds what follows to the section of overrides at `key`. Returns the configuration with the overrides."""
    changed, overrides = copy.deepcopy(config), flatten(section.to_dict())
    with argument_path(key):
        override(changed, overrides, allowed)
    before, after = _references(config), _references(changed)
    for name in before.keys() & after.keys() - overrides.keys():
        value = resolve(after[name], name)
        if value == resolve(before[name], name):
            continue
        if not any(_matches(name, prefix) for prefix in allowed):
            raise ConfigError(key, f"{name} follows, as a reference, but cannot be set here; make it a value")
        *path, last = name.split(".")
        target = section
        for part in path:
            if part not in target:
                target[part] = ConfigDict()
            target = target[part]
        target[last] = value
    return changed


def _references(config: ConfigDict) -> dict[str, FieldReference]:
    """The references of a configuration by dotted key, outside of the open sections."""
    values = flatten(copy_sections(config)).items()
    return {
        key: value
        for key, value in values
        if isinstance(value, FieldReference) and not any(key.startswith(f"{name}.") for name in OPEN_SECTIONS)
    }


def _dicts(config: ConfigDict, section: str, name: str) -> dict[str, ConfigDict]:
    """The sections in an open section; none if it is not one, which `check` reports."""
    holder = config.get(section)
    sections = holder.get(name) if isinstance(holder, ConfigDict) else None
    sections = dict(sections.items()) if isinstance(sections, ConfigDict) else {}
    return {name: item for name, item in sections.items() if isinstance(item, ConfigDict)}


def check_phase(config: ConfigDict, name: str) -> Config:
    """Builds the configuration of the phase `name`: the run's with the overrides of the phase.

    Raises:
      ConfigError: As `check`, below the key of the phase; or the phase sets a key that phases cannot set.
    """
    return _build_below(f"train.phases.{name}.set", _apply_phase(config, name))


def check_evaluation(config: ConfigDict, name: str) -> Config:
    """Builds the configuration of the evaluation `name` of `eval.also`: that of the last phase with its overrides.

    Raises:
      ConfigError: As `check_phase`.
    """
    key, phases = f"eval.also.{name}", config.train.get("phases", {})
    last = max(phases, key=lambda phase: phases[phase].start, default=None)
    changed = config if last is None else _apply_phase(config, last)
    return _build_below(key, _apply_section(changed, key, config.eval.also[name], EVALUATION_KEYS))


def _apply_phase(config: ConfigDict, name: str) -> ConfigDict:
    section = config.train.phases[name].get("set", ConfigDict())
    return _apply_section(config, f"train.phases.{name}.set", section, PHASE_KEYS)


def _apply_section(config: ConfigDict, key: str, section: ConfigDict, allowed: Sequence[str]) -> ConfigDict:
    """Returns a copy of `config` with the overrides in `section`, which is at `key`."""
    changed = ConfigDict(resolve(config))
    with argument_path(key):
        override(changed, flatten(resolve(section)), allowed)
    return changed


def _build_below(key: str, changed: ConfigDict) -> Config:
    with argument_path(key):
        return build(Config, changed.to_dict())
