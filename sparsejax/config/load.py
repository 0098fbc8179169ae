"""Configuration files."""

from __future__ import annotations

import contextlib
import importlib
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparsejax import presets
from sparsejax.config.build import ConfigError, complete, copy_sections, resolve
from sparsejax.config.override import follow_references, override
from sparsejax.config.source import ModelSource
from sparsejax.errors import InputError, shorten
from sparsejax.extensions import importing_from, run_file
from sparsejax.paths import local_path

PRESET = "preset:"
MODELS = ("hf:", "run:")  # sources that are trained models
# Defines the `get_config` of these. It stands above this package, and is imported when such a source is loaded.
MODEL_CONFIGS = "sparsejax.init.configs"


def split_source(source: str) -> tuple[str, str]:
    """Splits a source, such as `FILE.py:ARGUMENT` or `preset:jamba`, into its file or preset and its argument.

    The longest prefix before a colon that is an existing file is the file, so that its path may contain colons.
    """
    if source.startswith(PRESET):
        name, _, argument = source.removeprefix(PRESET).partition(":")
        return PRESET + name, argument
    if source.startswith("~") or "://" in source:
        source = str(local_path(source, "config"))
    ends = [match.start() for match in re.finditer(":|$", source)]
    end = next((end for end in reversed(ends) if _is_file(source[:end])), None)
    if end is not None:
        return str(local_path(source[:end])), source[end + 1 :]
    suffix = source.rfind(".py:")
    end = suffix + len(".py") if suffix >= 0 else ends[0]
    return source[:end], source[end + 1 :]


def _is_file(path: str) -> bool:
    try:
        return local_path(path).is_file()
    except (OSError, InputError):  # too long, or an address
        return False


def resolve_source(source: str) -> str:
    """Returns the source of a configuration with the absolute path of its file or folder."""
    if source.startswith(MODELS):
        return str(ModelSource.parse(source).resolve())
    name, argument = split_source(source)
    resolved = name if name.startswith(PRESET) else str(Path(name).resolve())
    return f"{resolved}:{argument}" if argument else resolved


def load(
    source: str, overrides: Mapping[str, Any] | None = None, recorded: Mapping[str, Any] | None = None
) -> ConfigDict:
    """Runs a configuration file or a preset, fills in defaults and applies overrides.

    The tokenizer defaults to that of `init.source`, whose path becomes absolute.

    Args:
      source: `FILE.py`, `FILE.py:ARGUMENT`, `preset:NAME` or `preset:NAME:ARGUMENT`, which defines `get_config()`, or
        `get_config(argument)`, which returns a ConfigDict, with references and placeholders, or a dict. A file can
        import other files of its folder. Or a trained model, see `ModelSource`, from whose weights the run starts.
      overrides: Values by dotted key, see `sparsejax.overrides`.
      recorded: The configuration that a run recorded. It replaces what a resume would read from a model that is gone.

    Raises:
      ConfigError: There is no such file, preset or model, `get_config` fails, an override has an unknown key, or a
        required placeholder has no value.
    """
    overrides, model = overrides or {}, _find_recorded_model(recorded)
    if source.startswith(MODELS):
        config = recorded if model and resolve_source(source) == model else _read_model(source)
    else:
        name, argument = split_source(source)
        config = _get_config(name, argument)
        if not isinstance(config, ConfigDict | dict):
            raise ConfigError(name, f"get_config returned {type(config).__name__}, not a ConfigDict or a dict")
    # A dict that a file uses twice is one ConfigDict in two sections; copies keep an override of one from the other.
    # References stay until the overrides are applied, because values that are computed from them follow.
    sections = copy_sections(config)
    has_tokenizer = "data.tokenizer" in overrides or "tokenizer" in (sections.get("data") or {})
    config = ConfigDict(complete(sections))
    override(config, overrides)
    resolved = ConfigDict(complete(resolve(config)))  # overrides can add a phase
    follow_references(config, resolved)
    _settle_model(resolved, has_tokenizer, recorded if model else None)
    return resolved


def _find_recorded_model(recorded: Mapping[str, Any] | None) -> str | None:
    """The model from which a recorded run started, if it is gone."""
    source = ((recorded or {}).get("init") or {}).get("source")
    return None if source is None or ModelSource.parse(source).exists() else source


def _read_model(source: str) -> Any:
    try:
        return importlib.import_module(MODEL_CONFIGS).get_config(ModelSource.parse(source).resolve())
    except InputError as error:
        raise ConfigError("config" if error.argument == "source" else error.argument, error.problem) from error


def _settle_model(config: ConfigDict, has_tokenizer: bool, recorded: Mapping[str, Any] | None) -> None:
    """Makes the path of `init.source` absolute, and takes its tokenizer unless the configuration names one."""
    init, data = config.get("init"), config.get("data")
    source = init.get("source") if isinstance(init, ConfigDict) else None
    try:
        model = ModelSource.parse(source).resolve() if isinstance(source, str) else None
    except InputError:  # a bucket, or another form, which `check` reports
        model = None
    if init is None or model is None:
        return
    init.source = str(model)
    if has_tokenizer or not isinstance(data, ConfigDict) or data.get("task") != "text":
        return
    if recorded is not None and recorded["init"]["source"] == str(model):
        tokenizer = recorded["data"]["tokenizer"]
    else:
        tokenizer = model.find_tokenizer()
    data.tokenizer = data.get("tokenizer") if tokenizer is None else tokenizer


def _get_config(name: str, argument: str) -> Any:
    """Calls `get_config` of a file or a preset. An error names the line of the file."""
    module = None
    if name.startswith(PRESET):
        try:
            module = presets.find_preset(name.removeprefix(PRESET))
        except InputError as error:
            raise ConfigError(error.argument, error.problem) from None
    elif not _is_file(name):
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
        problem = shorten(f"{kind}{error}")
        raise ConfigError(f"{name}: line {line}" if line else name, problem) from error
