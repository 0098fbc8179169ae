"""What is searched: the overrides that a trial draws, and the objectives that its run is measured by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax import config as configs
from sparsejax.sweep.axes import Overrides, SweepError
from sparsejax.sweep.front import Objective
from sparsejax.sweep.match import QUANTITIES, Match
from sparsejax.sweep.runs import write_value

if TYPE_CHECKING:
    from optuna.trial import Trial

METRIC = "eval/"  # names of metrics begin so
SECONDS = "seconds"  # of training as measured: the steps over the median of the steps per second
MOST = ("eval/accuracy", "eval/exact_match")  # of metrics that begin so the most is looked for, of others the least
SAMPLERS = ("tpe", "nsga2", "random")


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched.

    Attributes:
      config: The config's place.
      draw: Gives the overrides of a trial.
      objectives: One or two; the first is a metric.
      trials: How many in all.
      given: Overrides of all trials.
      match: What all trials are to take the same of.
      sampler: "tpe" (arXiv:2304.11127), "nsga2" (Deb et al., 2002) or "random".
      seed: Of the sampler: one after the other, the trials of equal searches are the same.
      steps: Runs of more steps are refused.
    """

    config: str
    draw: Callable[[Trial], Overrides]
    objectives: tuple[Objective, ...]
    trials: int
    given: Overrides = dataclasses.field(default_factory=dict)
    match: Match | None = None
    sampler: str = "tpe"
    seed: int = 0
    steps: int | None = None

    def __post_init__(self):
        if self.trials < 1:
            raise SweepError(f"--trials: at least 1, got {self.trials}")
        if self.sampler not in SAMPLERS:
            raise SweepError(f"--sampler: one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.match and self.match.target is None:
            raise SweepError("--match: in a search the target must be a number")

    @property
    def record(self) -> dict[str, Any]:
        """What must be the same when a search goes on; how many trials need not be."""
        return {
            "objectives": [objective.name for objective in self.objectives],
            "given": {key: write_value(value) for key, value in self.given.items()},
            "match": self.match and dataclasses.asdict(self.match),
            "sampler": self.sampler,
            "seed": self.seed,
        }


def read_search(place: str) -> Callable[[Trial], Overrides]:
    """The function `search` of `FILE.py`, or another one of `FILE.py:NAME`.

    Raises:
      SweepError: no such file or function, or an error inside it.
    """
    path, _, name = place.partition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise SweepError(f"--search: a Python file, FILE.py or FILE.py:NAME, and there is no {path!r}")
    name = name or "search"
    try:
        found = getattr(configs.run_file(path), name, None)
    except Exception as error:
        raise SweepError(f"--search: {path}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise SweepError(f"--search: {path} has no function {name}(trial)")
    return found


def read_objectives(text: str) -> tuple[Objective, ...]:
    """Reads `METRIC` or `METRIC,OTHER`: a metric such as eval/loss, and another one or a cost.

    Raises:
      SweepError: it cannot be read.
    """
    names, costs = tuple(name.strip() for name in text.split(",")), (*QUANTITIES, SECONDS)
    if len(names) > 2 or not names[0].startswith(METRIC) or len(set(names)) < len(names):
        raise SweepError(f"--objective: METRIC or METRIC,OTHER, where METRIC is such as eval/loss, got {text!r}")
    for name in names:
        if not name.startswith(METRIC) and name not in costs:
            raise SweepError(f"--objective: {name!r} is no metric such as eval/loss, and none of {', '.join(costs)}")
    return tuple(Objective(name, most=name.startswith(MOST)) for name in names)
