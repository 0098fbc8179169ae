"""From a sweep to its runs: each one ordinary command line, checked before any of them starts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.config import Config, ConfigError
from sparsejax.sweep.axes import LABEL, SEED, Overrides, SweepError, parse
from sparsejax.train import RESULT, Phase, plan_phases


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      config: The config's place, `FILE` or `FILE:ARGUMENT`.
      overrides: Key and value of each override, sorted by key.
      label: What tables call it: the same for all seeds.
    """

    config: str
    overrides: tuple[tuple[str, Any], ...]
    label: str

    @property
    def name(self) -> str:
        """12 hexadecimal digits that name the overrides: the workdir's name."""
        text = json.dumps([[key, write_value(value)] for key, value in self.overrides])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def seed(self) -> int:
        """`train.seed`: repeats of the same settings differ in it."""
        return self.checked.train.seed

    @functools.cached_property
    def settings(self) -> ConfigDict:
        """The resolved configuration."""
        return configs.load(self.config, write_settings(self.overrides))

    @functools.cached_property
    def checked(self) -> Config:
        """The same, as the program reads it.

        Raises:
          ConfigError: it cannot be used.
        """
        return configs.check(self.settings)

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The stretches of its training."""
        return plan_phases(self.settings)

    def workdir(self, folder: Path) -> Path:
        """Where a sweep that lives in `folder` has this run."""
        return folder / "runs" / self.name

    def command(self, folder: Path) -> list[str]:
        """The command line that trains it, or goes on with it."""
        given = [f"--config.{text}" for text in write_settings(self.overrides)]
        train = [sys.executable, "-m", "sparsejax", "train"]
        return [*train, f"--config={self.config}", *given, f"--workdir={self.workdir(folder)}"]

    def finished(self, folder: Path) -> bool:
        """Whether its last step was evaluated and written down."""
        return (self.workdir(folder) / RESULT).exists()


def write_value(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else repr(value)


def write_settings(overrides: Iterable[tuple[str, Any]]) -> list[str]:
    """Overrides as the command line takes them, but for the `--config.` before each."""
    return [f"{key}={write_value(value)}" for key, value in overrides]


def show_command(command: Iterable[str]) -> str:
    """A command as one types it; the interpreter by its name alone."""
    first, *rest = command
    return shlex.join([Path(first).name, *rest])


def read_sweep(place: str) -> list[Overrides]:
    """The runs of `FILE.py`, whose function is `sweep`, of `FILE.py:NAME`, or of a text of axes.

    Raises:
      SweepError: no such file or function, an error inside it, or a text that cannot be read.
    """
    path, _, name = place.partition(":")
    if not path.endswith(".py"):
        return parse(place)
    if not Path(path).is_file():
        raise SweepError(f"--sweep: no file {path!r}")
    name = name or "sweep"
    try:
        define = getattr(configs.run_file(path), name, None)
        found = None if define is None else list(define())
    except Exception as error:
        raise SweepError(f"--sweep: {path}: {type(error).__name__}: {error}") from error
    if found is None:
        raise SweepError(f"--sweep: {path} has no function {name}()")
    if not found or not all(isinstance(one, dict) for one in found):
        raise SweepError(f"--sweep: {path}: {name}() must give dicts of overrides, at least one")
    return found


def plan_runs(config: str, sweep: Iterable[Overrides], given: Overrides | None = None) -> list[Run]:
    """Every run of a sweep, each checked; `given` are overrides of all of them, which a run may set anew.

    A run that comes twice is one run.

    Raises:
      SweepError: a run that its config refuses, named by its overrides; or one run under two labels.
    """
    runs: dict[str, Run] = {}
    sweep = list(sweep)
    for one, name, words in zip(sweep, describe_runs(sweep), describe_runs(sweep, {SEED}), strict=True):
        overrides = {**(given or {}), **one}
        label = str(overrides.pop(LABEL, words))
        run = Run(config, tuple(sorted(overrides.items())), label)
        try:
            run.checked  # noqa: B018
        except ConfigError as error:
            raise SweepError(f"{name}: {error}") from None
        if runs.setdefault(run.name, run).label != run.label:
            raise SweepError(f"{run.label}: is the same run as {runs[run.name].label}")
    return list(runs.values())


def limit_steps(runs: Iterable[Run], most: int | None) -> None:
    """Refuses runs of more than `most` steps.

    Raises:
      SweepError: names the first one.
    """
    for run in runs:
        if most is not None and run.checked.train.steps > most:
            raise SweepError(f"{run.label}: train.steps is {run.checked.train.steps}, more than --max-steps={most}")


def describe_runs(sweep: Sequence[Overrides], without: Set[str] = frozenset()) -> list[str]:
    """The overrides of each run in words; what `plan_runs` calls a run without a label is said without its seed."""
    words = shorten({key for one in sweep for key in one} - {LABEL})
    kept = [{key: one[key] for key in sorted(one) if key in words and key not in without} for one in sweep]
    return [write_overrides(one, words) or "config" for one in kept]


def write_overrides(overrides: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Overrides as people read them, each key by its word."""
    return ", ".join(f"{words[key]}={write_value(value)}" for key, value in overrides.items())


def shorten(keys: Iterable[str]) -> dict[str, str]:
    """The end of each key that is long enough to tell it from the others."""
    ends = {key: [key.split(".", skip)[-1] for skip in range(key.count("."), -1, -1)] for key in keys}
    others = {key: [end for other in ends if other != key for end in ends[other]] for key in ends}
    return {key: next((end for end in ends[key] if end not in others[key]), key) for key in ends}
