"""Phases and evaluation settings: the configurations of a run (staged training, arXiv:2004.05150, section 4.2)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.config import BASE_PHASE, Config, ConfigError, GroupConfig
from sparsejax.errors import argument_path
from sparsejax.model import Functional
from sparsejax.overrides import Overrides
from sparsejax.runs.groups import assign_groups
from sparsejax.runs.lora import adapt


@dataclasses.dataclass(frozen=True)
class EvaluationSetting:
    """An evaluation of `eval.also`: the configuration of the last phase with overrides.

    Attributes:
      name: Key in `eval.also`.
      config: The configuration.
      overrides: The overrides.
    """

    name: str
    config: Config
    overrides: Overrides

    @property
    def key(self) -> str:
        """Key of the overrides in the configuration of the run."""
        return f"eval.also.{self.name}"


@dataclasses.dataclass(frozen=True)
class Phase:
    """The steps from `start` to `stop` of a run, under one configuration. A run without phases is one unnamed phase.

    Attributes:
      number: From 1.
      name: None if the run has no phases.
      start: Number of steps before the phase.
      stop: Number of steps up to its end.
      config: The configuration of the run with the overrides of the phase, except for `optimizer.warmup`, which is
        always that of the first phase.
      restart: First step and length of a second warm-up; None without one.
      overrides: The overrides.
    """

    number: int
    name: str | None
    start: int
    stop: int
    config: Config
    restart: tuple[int, int] | None = None
    overrides: Overrides = dataclasses.field(default_factory=dict)

    def contains(self, step: int) -> bool:
        """Whether `step` is a step of the phase."""
        return self.start < step <= self.stop

    def elapsed(self, step: int) -> int:
        """Number of steps of the phase among the first `step` steps of the run."""
        return min(max(step - self.start, 0), self.stop - self.start)

    @property
    def seed(self) -> int:
        """Seed of the training batches. The first phase uses that of the run, so that phases do not change it."""
        seed = self.config.train.seed
        return seed if self.number == 1 else int(np.random.SeedSequence([seed, self.number]).generate_state(1)[0])

    @property
    def key(self) -> str:
        """Key of the overrides in the configuration of the run; empty without overrides."""
        return f"train.phases.{self.name}.set" if self.overrides else ""


def plan_phases(settings: ConfigDict) -> list[Phase]:
    """Returns the phases of a run, in order.

    The learning rate follows the schedule of the whole run, with the peak of the phase. The first phase sets the
    warm-up of the run; a later phase that sets `optimizer.warmup` warms up again.

    Raises:
      ConfigError: As `config.check`, or a phase changes the shapes of the parameters, or no phase uses the teacher.
      InputError: A pattern of `optimizer.freeze` or `optimizer.groups` matches no parameter.
    """
    base = configs.check(settings)
    phases = _plan(settings, base) if base.train.phases else [Phase(1, None, 0, base.train.steps, base)]
    _require_same_parameters(base, phases)
    for phase in phases:
        _check_groups(phase, changes=len({_groups_of(phase) for phase in phases}) > 1)
    if base.train.teacher is not None and not any(phase.config.train.active_teacher for phase in phases):
        raise ConfigError("train.teacher", "kl, hidden and attention_output are 0 in every phase; set one of them")
    return phases


def _plan(settings: ConfigDict, base: Config) -> list[Phase]:
    starts = sorted((phase.start, name) for name, phase in base.train.phases.items())
    if starts[0][0] > 0:
        starts.insert(0, (0, BASE_PHASE))
    stops = [*(start for start, _ in starts[1:]), base.train.steps]
    phases: list[Phase] = []
    for number, ((start, name), stop) in enumerate(zip(starts, stops, strict=True), 1):
        config = base if name == BASE_PHASE else configs.check_phase(settings, name)
        overrides = {} if name == BASE_PHASE else base.train.phases[name].set
        restart = None
        if phases:
            warmup = config.optimizer.warmup if "optimizer.warmup" in overrides else 0
            restart = (start, warmup) if warmup else None
            optimizer = dataclasses.replace(config.optimizer, warmup=phases[0].config.optimizer.warmup)
            config = dataclasses.replace(config, optimizer=optimizer)
        phases.append(Phase(number, name, start, stop, config, restart, overrides))
    return phases


def _groups_of(phase: Phase) -> tuple[str, tuple[GroupConfig, ...]]:
    return phase.config.optimizer.freeze, phase.config.optimizer.groups


def _check_groups(phase: Phase, changes: bool) -> None:
    """Checks the patterns of the parameters that a phase trains; `changes` if phases train different ones."""
    config = phase.config.optimizer
    key = phase.key if {"optimizer.freeze", "optimizer.groups"} & phase.overrides.keys() else ""
    if changes and config.name == "schedule_free_adamw":
        raise ConfigError("optimizer.name", f"{config.name} averages parameters, which all phases must train alike")
    if config.freeze or config.groups or config.lora:
        with argument_path(key) if key else contextlib.nullcontext():
            assign_groups(config, adapt(Functional(phase.config.model), config).shapes)


def plan_evaluations(settings: ConfigDict) -> list[EvaluationSetting]:
    """Returns the evaluations of `eval.also`.

    Raises:
      ConfigError: As `plan_phases`.
    """
    base = configs.check(settings)
    evaluations = [
        EvaluationSetting(name, configs.check_evaluation(settings, name), overrides)
        for name, overrides in base.eval.also.items()
    ]
    _require_same_parameters(base, evaluations)
    return evaluations


def _require_same_parameters(base: Config, settings: Sequence[Phase | EvaluationSetting]) -> None:
    # The reference is the base configuration, not another phase, so that the error names the phase at fault.
    changed = [setting for setting in settings if setting.overrides]
    expected = _describe_parameters(base) if changed else {}
    for setting in changed:
        change = configs.difference(expected, _describe_parameters(setting.config))
        if change:
            raise ConfigError(setting.key, f"changes the shapes of the parameters: {change}")


def _describe_parameters(config: Config) -> dict[str, Any]:
    shapes = Functional(config.model).shapes
    return jax.tree.map(lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}", shapes)
