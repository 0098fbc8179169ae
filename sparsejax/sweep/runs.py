"""The runs of a sweep: each is one ordinary command line, checked before the first run starts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.config import Config, ConfigError
from sparsejax.overrides import LABEL, SEED, Overrides, name_runs, to_python, write_overrides, write_value
from sparsejax.paths import local_path
from sparsejax.runs import Phase, plan_phases
from sparsejax.sweep.grid import SweepError, parse
from sparsejax.train import find_change
from sparsejax.workdir import SweepFolder, Workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a sweep."""

    config: str  # source of the configuration, see `config.load`
    overrides: tuple[tuple[str, Any], ...]  # key and value, sorted by key
    label: str  # name in tables, the same for all seeds
    imports: tuple[str, ...] = ()  # files and modules that the run imports first

    @property
    def name(self) -> str:
        """Name of the workdir: 12 hexadecimal digits of the hash of the overrides."""
        text = json.dumps([[key, write_value(value)] for key, value in self.overrides])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def seed(self) -> int:
        """`train.seed`, in which repetitions of one configuration differ."""
        return self.checked.train.seed

    @functools.cached_property
    def settings(self) -> ConfigDict:
        """The resolved configuration."""
        return configs.load(self.config, dict(self.overrides))

    @functools.cached_property
    def checked(self) -> Config:
        """The resolved configuration as dataclasses; raises ConfigError if it is invalid."""
        return configs.check(self.settings)

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The phases of training."""
        return plan_phases(self.settings)

    def workdir(self, folder: Path) -> Workdir:
        """The workdir of the run in the sweep in `folder`."""
        return SweepFolder(folder).workdir(self.name)

    def command(self, folder: Path) -> list[str]:
        """The command line that trains or resumes the run."""
        train = [sys.executable, "-m", "sparsejax", "train", f"--config={self.config}"]
        imports = [f"--import={source}" for source in self.imports]
        overrides = [f"--config.{text}" for text in write_overrides(dict(self.overrides))]
        return [*train, *imports, *overrides, f"--workdir={self.workdir(folder).path}"]


def show_command(command: Iterable[str]) -> str:
    """A command line of `Run.command` as typed in a shell: `sparsejax VERB ...`."""
    _, _, program, *arguments = command  # interpreter, -m, sparsejax
    return shlex.join([program, *arguments])


def read_sweep(source: str) -> list[Overrides]:
    """Reads the runs of `FILE.py` (its function `sweep`), of `FILE.py:NAME`, or of a text of axes."""
    path, name = configs.split_source(source)
    if not path.endswith(".py"):
        return parse(source)
    define = read_function("sweep", path, name or "sweep")
    try:
        runs = list(define())
    except Exception as error:
        raise SweepError("sweep", f"{path}: {define.__name__}(): {type(error).__name__}: {error}") from error
    if not runs or not all(isinstance(overrides, dict) for overrides in runs):
        raise SweepError("sweep", f"{path}: {define.__name__}() must return at least one dict of overrides")
    return runs


def read_function(argument: str, path: str, name: str) -> Callable[..., Any]:
    """Returns a function of a Python file; raises SweepError about `argument` if there is none."""
    path = str(local_path(path, argument))
    if not path.endswith(".py") or not Path(path).is_file():
        raise SweepError(argument, f"no Python file {path!r}")
    try:
        function = getattr(configs.run_file(path), name, None)
    except Exception as error:
        raise SweepError(argument, f"{path}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise SweepError(argument, f"{path} has no function {name}")
    return function


def plan_runs(
    config: str,
    sweep: Iterable[Overrides],
    common: Overrides | None = None,
    max_steps: int | None = None,
    imports: Iterable[str] = (),
) -> list[Run]:
    """Returns the runs of a sweep, each checked and each once.

    Args:
      config: Source of the configuration, see `config.load`.
      sweep: Overrides per run.
      common: Overrides of all runs; those of a run take precedence.
      max_steps: Rejects runs of more steps.
      imports: Files and modules that every run imports first.

    Raises:
      SweepError: A run is invalid, or it has two labels.
    """
    runs: dict[str, Run] = {}
    sweep = [to_python(overrides, "sweep") for overrides in sweep]
    common = to_python(common or {}, "sweep")
    for specific, name, words in zip(sweep, name_runs(sweep), name_runs(sweep, {SEED}), strict=True):
        overrides = {**common, **specific}
        label = str(overrides.pop(LABEL, words))
        run = Run(config, tuple(sorted(overrides.items())), label, tuple(imports))
        try:
            steps = run.checked.train.steps
        except ConfigError as error:
            raise SweepError(name, str(error)) from None
        if max_steps is not None and steps > max_steps:
            raise SweepError("max_steps", f"{label} has train.steps = {steps} > {max_steps}")
        if runs.setdefault(run.name, run).label != label:
            raise SweepError(label, f"is the same run as {runs[run.name].label}")
    return list(runs.values())


def check_record(folder: Path, config: str, runs: Iterable[Run]) -> None:
    """Raises SweepError if the folder belongs to another configuration, or a run was started with other settings."""
    recorded = SweepFolder(folder).read()["config"]
    if recorded is not None and configs.resolve_source(recorded) != configs.resolve_source(config):
        raise SweepError("workdir", f"{folder} is a sweep of {recorded}, not of {config}")
    for run in runs:
        if error := find_change(run.workdir(folder).path, run.settings):
            raise SweepError(run.label, error.problem)


def write_record(folder: Path, config: str, sweep: str, runs: Iterable[Run]) -> None:
    """Adds runs to the record of a folder. The last label of a run counts."""
    added = {run.name: {"label": run.label, "seed": run.seed, "overrides": dict(run.overrides)} for run in runs}
    SweepFolder(folder).add(config, sweep, added)
