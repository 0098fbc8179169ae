"""Phases: stretches of a run, each with settings of its own (staged training, arXiv:2004.05150, section 4.2)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.config import BASE_PHASE, Config, ConfigError
from sparsejax.model import Functional


@dataclasses.dataclass(frozen=True)
class Phase:
    """The steps from `start` to `stop` of a run, under one configuration; a run without phases is one, without a name.

    Attributes:
      number: From 1; 0 of an evaluation of `eval.also`.
      name: None if the run has no phases.
      start: Steps of the run before it.
      stop: Steps of the run up to its end.
      config: The run's configuration with what the phase sets, but for `optimizer.warmup`: it is always that of the
        first phase.
      restart: If the phase warms up another time, from which step on and over how many.
      given: What it sets.
    """

    number: int
    name: str | None
    start: int
    stop: int
    config: Config
    restart: tuple[int, int] | None = None
    given: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """What its batches are drawn with: every phase has an order of its own, the first that of a run without any."""
        seed = self.config.train.seed
        return seed if self.number == 1 else int(np.random.SeedSequence([seed, self.number]).generate_state(1)[0])

    @property
    def place(self) -> str:
        """Where the configuration says what it sets, to begin a message with; empty if it sets nothing."""
        if not self.given:
            return ""
        return f"train.phases.{self.name}.set: " if self.number else f"eval.also.{self.name}: "


def plan_phases(settings: ConfigDict) -> list[Phase]:
    """The phases of a run, in order.

    The rate is the run's schedule, over all its steps, at the peak of the phase. The warm-up of the run is that of its
    first phase; a later one that sets `optimizer.warmup` begins with another.

    Raises:
      ConfigError: as `config.check`; or the parameters of the phases have not the same shapes.
    """
    whole = configs.check(settings)
    if not whole.train.phases:
        return [Phase(1, None, 0, whole.train.steps, whole)]
    named = sorted((phase.start, name) for name, phase in whole.train.phases.items())
    named = named if named[0][0] == 0 else [(0, None), *named]
    stops = [*(start for start, _ in named[1:]), whole.train.steps]
    phases: list[Phase] = []
    for number, ((start, name), stop) in enumerate(zip(named, stops, strict=True), 1):
        config = whole if name is None else configs.check_phase(settings, name)
        given, restart = () if name is None else whole.train.phases[name].set, None
        if phases:
            warmup = config.optimizer.warmup if any(text.startswith("optimizer.warmup=") for text in given) else 0
            restart = (start, warmup) if warmup else None
            optimizer = dataclasses.replace(config.optimizer, warmup=phases[0].config.optimizer.warmup)
            config = dataclasses.replace(config, optimizer=optimizer)
        phases.append(Phase(number, name or BASE_PHASE, start, stop, config, restart, given))
    _require_same_parameters(whole, phases)
    return phases


def plan_evaluations(settings: ConfigDict) -> list[Phase]:
    """What `eval.also` says: phases at the end of the run that have no steps.

    Raises:
      ConfigError: as `plan_phases`.
    """
    whole = configs.check(settings)
    stop = whole.train.steps
    found = [
        Phase(0, name, stop, stop, configs.check_also(settings, name), None, given)
        for name, given in whole.eval.also.items()
    ]
    _require_same_parameters(whole, found)
    return found


def _require_same_parameters(whole: Config, phases: list[Phase]) -> None:
    # Held against the configuration itself and not against one another: then the phase that changes them is named.
    setting = [phase for phase in phases if phase.given]
    expected = _describe_parameters(whole) if setting else {}
    for phase in setting:
        changed = configs.difference(expected, _describe_parameters(phase.config))
        if changed:
            raise ConfigError(f"{phase.place}changes the model's parameters: {changed}")


def _describe_parameters(config: Config) -> dict:
    shapes = Functional(config.model).shapes
    return jax.tree.map(lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}", shapes)
