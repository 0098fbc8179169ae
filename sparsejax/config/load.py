"""Configuration files."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparsejax.config.build import ConfigError, complete, copy_sections
from sparsejax.config.override import override


def load(source: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Runs a configuration file, fills in defaults and applies overrides.

    Args:
      source: `FILE.py` or `FILE.py:ARGUMENT`. The file defines `get_config()`, or `get_config(argument)`, which returns
        a ConfigDict. It can import other files of its folder.
      overrides: Values by dotted key, see `sparsejax.overrides`.

    Raises:
      ConfigError: There is no such file, the file fails, or an override has an unknown key.
    """
    path, _, argument = source.partition(":")
    if not Path(path).is_file():
        raise ConfigError("config", f"no file {path!r}")
    try:
        module = run_file(path)
        config = module.get_config(argument) if argument else module.get_config()
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{path}: line {line}" if line else path, problem) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(path, f"get_config returned {type(config).__name__}, not a ConfigDict")
    # A dict that a file uses twice is one ConfigDict in two sections; copies keep an override of one from the other.
    config = ConfigDict(complete(copy_sections(config.to_dict())))
    override(config, overrides or {})
    return ConfigDict(complete(config.to_dict()))  # overrides can add a phase


def run_file(path: str) -> types.ModuleType:
    """Runs a Python file and returns its module.

    What the file imports from its own folder is forgotten, so that no other file finds it.
    """
    spec = importlib.util.spec_from_file_location("sparsejax_config_file", path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module, folder, before = importlib.util.module_from_spec(spec), str(Path(path).parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(Path(getattr(sys.modules[name], "__file__", None) or "").parent) == folder:
                del sys.modules[name]
    return module
