"""Configuration files."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparsejax import presets
from sparsejax.config.build import ConfigError, complete, copy_sections
from sparsejax.config.override import override
from sparsejax.errors import InputError
from sparsejax.extensions import importing_from, run_file

PRESET = "preset:"


def split_source(source: str) -> tuple[str, str]:
    """Splits the source of a configuration into its file or preset, such as `preset:jamba`, and its argument."""
    prefix = PRESET if source.startswith(PRESET) else ""
    name, _, argument = source.removeprefix(prefix).partition(":")
    return prefix + name, argument


def resolve_source(source: str) -> str:
    """Returns the source of a configuration with the absolute path of its file."""
    name, argument = split_source(source)
    resolved = name if name.startswith(PRESET) else str(Path(name).resolve())
    return f"{resolved}:{argument}" if argument else resolved


def load(source: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Runs a configuration file or a preset, fills in defaults and applies overrides.

    Args:
      source: `FILE.py`, `FILE.py:ARGUMENT`, `preset:NAME` or `preset:NAME:ARGUMENT`. The file or preset defines
        `get_config()`, or `get_config(argument)`, which returns a ConfigDict. A file can import other files of its
        folder.
      overrides: Values by dotted key, see `sparsejax.overrides`.

    Raises:
      ConfigError: There is no such file or preset, `get_config` fails, or an override has an unknown key.
    """
    name, argument = split_source(source)
    config = _get_config(name, argument)
    if not isinstance(config, ConfigDict):
        raise ConfigError(name, f"get_config returned {type(config).__name__}, not a ConfigDict")
    # A dict that a file uses twice is one ConfigDict in two sections; copies keep an override of one from the other.
    config = ConfigDict(complete(copy_sections(config.to_dict())))
    override(config, overrides or {})
    return ConfigDict(complete(config.to_dict()))  # overrides can add a phase


def _get_config(name: str, argument: str) -> Any:
    """Calls `get_config` of a file or a preset. An error names the line of the file."""
    module = None
    if name.startswith(PRESET):
        try:
            module = presets.find_preset(name.removeprefix(PRESET))
        except InputError as error:
            raise ConfigError(error.argument, error.problem) from None
    elif not Path(name).is_file():
        preset = name if name in presets.list_presets() else "NAME"
        raise ConfigError("config", f"no file {name!r}; a preset is written preset:{preset}")
    try:
        with contextlib.nullcontext() if module else importing_from(Path(name).parent):
            module = module or run_file(name)
            return module.get_config(argument) if argument else module.get_config()
    except Exception as error:
        file = str(Path(name).absolute())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        problem = f"{kind}{' '.join(str(error).split())}"
        raise ConfigError(f"{name}: line {line}" if line else name, problem) from error
