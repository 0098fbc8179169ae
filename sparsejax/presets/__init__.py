"""Presets: small models that train on a CPU, and released models with the sizes of their papers.

A preset is a module that defines `get_config`, as a config file does, and is loaded as `preset:NAME` or
`preset:NAME:ARGUMENT`. Its docstring states the command, the source of the sizes and the expected result. A copy of
the module is a config file. `sparsejax.presets.recipe` has the building blocks.
"""

from __future__ import annotations

import importlib
import pkgutil
import types

from sparsejax.errors import InputError, suggest

__all__ = ["find_preset", "list_presets", "summarize_presets"]


def list_presets() -> list[str]:
    """Returns the names of all presets."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name != "recipe"]


def find_preset(name: str) -> types.ModuleType:
    """Returns the module of a preset.

    Raises:
      InputError: There is no such preset; the error suggests the nearest one, or lists all of them.
    """
    if name not in list_presets():
        raise InputError("config", f"no preset {name!r}; {suggest(name, list_presets(), 'presets')}")
    return importlib.import_module(f"{__name__}.{name}")


def summarize_presets() -> dict[str, str]:
    """Returns the first line of the docstring of every preset, by name."""
    return {name: (find_preset(name).__doc__ or "").partition("\n")[0] for name in list_presets()}
