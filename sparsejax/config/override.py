"""Overrides of a ConfigDict, and the configurations of phases and evaluations, which are overrides of the run's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sparsejax.config.build import KIND_KEYS, ConfigError, build, complete, copy_sections, unknown_key
from sparsejax.config.schema import EVALUATION_KEYS, PHASE_KEYS, Config
from sparsejax.errors import argument_path
from sparsejax.overrides import flatten, read_value

# Sections that an override can add by any name, and the keys in them that hold overrides themselves.
OPEN_SECTIONS = ("train.phases", "eval.also")
NESTED_OVERRIDE = re.compile(r"(?:train\.phases\.[^.]+\.set|eval\.also\.[^.]+)\.(.+)")


def override(config: ConfigDict, overrides: Mapping[str, Any], allowed: Sequence[str] | None = None) -> None:
    """Applies overrides to a ConfigDict in place.

    Args:
      config: The configuration.
      overrides: Values by dotted key, see `sparsejax.overrides`.
      allowed: The keys that may be set, and prefixes of keys, which end in a dot; None allows every key.

    Raises:
      ConfigError: A key is unknown, a section or not allowed.
    """
    # The kind of a section decides which keys the section has.
    for key in sorted(overrides, key=lambda key: key not in KIND_KEYS):
        _set_value(config, key, overrides[key])
        if allowed is not None and not any(_matches(key, name) for name in allowed):
            names = ", ".join(f"{name}*" if name.endswith(".") else name for name in allowed)
            raise ConfigError(key, f"cannot be set here, only {names}")


def _matches(key: str, name: str) -> bool:
    """Whether `key` is `name`, or starts with it if it ends in a dot."""
    return key == name or (name.endswith(".") and key.startswith(name))


def _set_value(config: ConfigDict, key: str, value: Any) -> None:
    if any(key.startswith(f"{name}.") for name in OPEN_SECTIONS):
        _set_open(config, key, value)
        return
    section, name = _look_up(config, key)
    current = section[name]
    value = read_value(value, current)
    if isinstance(current, ConfigDict) and value is not None:
        keys = f"{key}.NAME.KEY" if key in OPEN_SECTIONS else f"one of its keys: {', '.join(current.keys())}"
        raise ConfigError(key, f"is a section; set {keys}")
    _replace(section, name, value)
    if key in KIND_KEYS and value != current:
        _replace(section, KIND_KEYS[key], None)
        top = key.partition(".")[0]
        _replace(config, top, ConfigDict(complete(config.to_dict())[top]))


def _set_open(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key of an open section, and adds the sections that lead to it."""
    *path, name = key.split(".")
    nested = NESTED_OVERRIDE.fullmatch(key)
    current = None
    if nested:
        with argument_path(key[: nested.start(1) - 1]):
            target, target_name = _look_up(config, nested[1])
        current = target[target_name]
    section = config
    for depth, part in enumerate(path):
        if part not in section:
            section[part] = ConfigDict()
        section = section[part]
        if not isinstance(section, ConfigDict):
            raise ConfigError(".".join(path[: depth + 1]), "is a value, not a section")
    _replace(section, name, read_value(value, current))


def _look_up(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the section that holds a key, and the key's name there."""
    section, path = config, key.split(".")
    for depth, name in enumerate(path):
        if not isinstance(section, ConfigDict):
            raise ConfigError(".".join(path[:depth]), "is a value, not a section")
        if name not in section:
            raise unknown_key(".".join(path[: depth + 1]), name, list(section.keys()))
        if depth < len(path) - 1:
            section = section[name]
    return section, path[-1]


def _replace(section: ConfigDict, name: str, value: Any) -> None:
    if name in section:
        del section[name]  # a ConfigDict converts a value to the type of the previous one; `check` reports the type
    section[name] = value


def check(config: ConfigDict) -> Config:
    """Builds the dataclasses of a configuration and checks every phase and every evaluation of `eval.also`.

    Raises:
      ConfigError: A key is unknown, missing or of the wrong type, or a value is invalid. The error names the key and,
        for an unknown one, the nearest known key.
    """
    checked = build(Config, config.to_dict())
    for name in checked.train.phases:
        check_phase(config, name)
    for name in checked.eval.also:
        check_evaluation(config, name)
    return checked


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
    changed = ConfigDict(copy_sections(config.to_dict()))
    with argument_path(key):
        override(changed, flatten(section.to_dict()), allowed)
    return changed


def _build_below(key: str, changed: ConfigDict) -> Config:
    with argument_path(key):
        return build(Config, changed.to_dict())
