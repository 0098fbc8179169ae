"""Search over schedules and other settings with Optuna; every trial is an ordinary run.

The function `space(trial)` of a file draws overrides. `sparsejax.sweep.suggest_period` and `suggest_placement` draw
schedules. A search with one objective uses asynchronous successive halving (ASHA, arXiv:1810.05934): a trial that is
not among the best third of those that reached its rung is asked to stop, and saves. A search with two objectives, such
as the loss and the bytes of the cache, finds their Pareto front; Optuna prunes none of its trials.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsejax import config as configs
from sparsejax.account import AccountCache
from sparsejax.budget import QUANTITIES, Budget, match_runs
from sparsejax.errors import InputError
from sparsejax.metrics import EVAL, STEPS_PER_SECOND, direction
from sparsejax.overrides import Overrides, write_value
from sparsejax.records import require
from sparsejax.report.search import PRUNED, Objective, find_best, write_results
from sparsejax.signals import Interrupted
from sparsejax.sweep import SAMPLERS
from sparsejax.sweep.executors import Attempt, Executor, State
from sparsejax.sweep.grid import SweepError
from sparsejax.sweep.progress import Progress
from sparsejax.sweep.runs import Run, check_record, plan_runs, read_function, write_record
from sparsejax.sweep.supervisor import Supervisor
from sparsejax.workdir import SweepFolder, read_json, read_rows, write_json

try:
    import matplotlib  # noqa: F401
    import optuna
    from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
    from optuna.storages import BaseStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:
    raise SweepError("search", f"needs {error.name}; pip install 'sparsejax[search]'") from None

SECONDS = "seconds"  # of training: the steps over the median of the steps per second
STUDY = "search"  # name of the study in its journal
POPULATION = 16  # per generation of NSGA-II; Optuna's 50 suit objectives that need no training
REDUCTION = 3  # of successive halving: one in three trials of a rung continues


@dataclasses.dataclass(frozen=True)
class Search:
    """A search."""

    config: str  # source of the configuration, see `config.load`
    draw: Callable[[Trial], Overrides]  # the overrides of a trial
    objectives: tuple[Objective, ...]  # one or two; the first is a metric
    trials: int  # number of trials
    common: Overrides = dataclasses.field(default_factory=dict)  # of all trials
    match: Budget | None = None  # of all trials
    sampler: str = "tpe"  # "tpe" (arXiv:2304.11127), "nsga2" (Deb et al., 2002) or "random"
    seed: int = 0  # of the sampler. With one job, searches with equal seeds draw equal trials
    max_steps: int | None = None  # rejects runs of more steps
    imports: tuple[str, ...] = ()  # files and modules that every run imports first

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise SweepError("trials", f"must be at least 1, got {self.trials}")
        if self.sampler not in SAMPLERS:
            raise SweepError("sampler", f"must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.match and self.match.target is None:
            raise SweepError("match", "the target of a search must be a number")

    @property
    def record(self) -> dict[str, Any]:
        """What must not change when a search resumes; the number of trials may."""
        return {
            "objectives": [objective.name for objective in self.objectives],
            "overrides": {key: write_value(value) for key, value in self.common.items()},
            "match": self.match and self.match._asdict(),
            "sampler": self.sampler,
            "seed": self.seed,
        }


def read_space(source: str) -> Callable[[Trial], Overrides]:
    """Returns the function `space` of `FILE.py`, or the function of `FILE.py:NAME`."""
    path, name = configs.split_source(source)
    return read_function("space", path, name or "space")


def read_objectives(text: str) -> tuple[Objective, ...]:
    """Parses `METRIC` or `METRIC,OTHER`: a metric such as eval/loss, and another metric or a cost."""
    names, costs = tuple(name.strip() for name in text.split(",")), (*QUANTITIES, SECONDS)
    if len(names) > 2 or not names[0].startswith(EVAL) or len(set(names)) < len(names):
        raise SweepError("objective", f"write METRIC or METRIC,OTHER, where METRIC is such as eval/loss, got {text!r}")
    for name in names:
        if not name.startswith(EVAL) and name not in costs:
            raise SweepError("objective", f"{name!r} is neither a metric (eval/...) nor one of {', '.join(costs)}")
    return tuple(Objective(name, direction(name) or "min") for name in names)


def run_search(
    search: Search, folder: Path, executor: Executor, console: Console, max_hours: float | None = None
) -> list[Path]:
    """Runs or resumes the search in `folder` and writes its results; returns their files.

    Raises:
      SweepError: Invalid input, or no trial was completed.
      Interrupted: The search was asked to stop, or `max_hours` have passed; the runs have saved.
    """
    base = configs.load(search.config, search.common)
    check_record(folder, search.config, [])
    with SweepFolder(folder).hold():
        _claim_folder(SweepFolder(folder), search)
        storage, study = _open_study(search, SweepFolder(folder).study, first_rung=base.eval.every)
        progress = Progress(console, folder, executor.jobs or 1, search.trials)
        reason = _Trials(search, study, storage, folder, executor, progress).follow(max_hours)
        trials = study.get_trials(deepcopy=False)
        if reason:
            summary = f"{len(trials)} of {search.trials} trials"
            raise Interrupted(f"stopped by {reason}: {summary}; the same command resumes")
        best = find_best(trials, search.objectives)
        if not best:
            raise SweepError("search", f"no trial was completed; logs: {SweepFolder(folder).jobs}")
        overrides = {trial.number: trial.user_attrs["overrides"] for trial in best}
        settings = {number: configs.load(search.config, drawn).to_dict() for number, drawn in overrides.items()}
        return write_results(folder, trials, search.objectives, settings, search.imports)


def _claim_folder(folder: SweepFolder, search: Search) -> None:
    """Records the search in its folder; raises SweepError if the folder belongs to another one."""
    if folder.search.exists():
        change = configs.difference(read_json(folder.search, dict), json.loads(json.dumps(search.record)))
        if change:
            raise SweepError("workdir", f"{folder.path} belongs to another search: {change}")
    write_json(folder.search, search.record)


def _open_storage(journal: Path) -> BaseStorage:
    """Opens the journal of a study. The caller is the only process that does so."""
    journal = journal.resolve()  # the backend's lock is a link to the journal
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)  # of a killed launcher
    if journal.exists():  # a crash may have cut the last line short, and Optuna would append to it
        lines = journal.read_bytes()
        with journal.open("r+b") as file:
            file.truncate(lines.rfind(b"\n") + 1)
    return JournalStorage(JournalFileBackend(str(journal)))


def _open_study(search: Search, journal: Path, first_rung: int) -> tuple[BaseStorage, optuna.Study]:
    """Opens or creates the study of a journal. Trials are compared for the first time after `first_rung` steps.

    Raises:
      SweepError: The journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    single = len(search.objectives) == 1
    directions = [StudyDirection[f"{objective.direction}imize".upper()] for objective in search.objectives]
    pruner = optuna.pruners.SuccessiveHalvingPruner(first_rung, REDUCTION) if single else optuna.pruners.NopPruner()
    try:
        storage = _open_storage(journal)
        study = optuna.create_study(
            storage=storage, study_name=STUDY, load_if_exists=True, directions=directions, pruner=pruner
        )
        for trial in study.get_trials(deepcopy=False):
            _check_trial(trial, len(directions), f"{journal}: trial {trial.number}")
        return storage, study
    except (OSError, InputError):
        raise
    except Exception as error:  # Optuna replays the journal without checks
        raise SweepError(journal, f"damaged: {type(error).__name__}: {error}") from error


def _check_trial(trial: FrozenTrial, objectives: int, source: str) -> None:
    """Raises InputError if a record of a trial is damaged."""
    require(trial.user_attrs, {"overrides": (dict, None), "run": (str, None), PRUNED: (int, None)}, source)
    require(trial.user_attrs.get("overrides", {}), {...: str}, source, "overrides")
    require(trial.intermediate_values, {...: (float, None)}, source)
    if trial.state is TrialState.COMPLETE:
        require(trial.values, [float], source)
        if len(trial.values) != objectives or "overrides" not in trial.user_attrs:
            raise InputError(source, "damaged: its values or overrides are missing")


def _build_sampler(search: Search, number: int) -> BaseSampler:
    """The sampler of one trial. Each trial has its own seed, so that a resumed search draws the same trials."""
    seed = random.Random(f"{search.seed} {number}").getrandbits(32)
    if search.sampler == "nsga2":
        return NSGAIISampler(population_size=POPULATION, seed=seed)
    return TPESampler(seed=seed) if search.sampler == "tpe" else RandomSampler(seed=seed)


@dataclasses.dataclass
class _Drawn:
    """A trial whose run is under way."""

    trial: Trial
    costs: dict[str, float]
    reported: set[int]  # steps whose values the study has
    pruned: bool
    step: int = 0  # the last step that was read


class _Trials(Supervisor):
    """Draws trials, follows their runs and reports to the study."""

    stops_on_error = True

    def __init__(
        self,
        search: Search,
        study: optuna.Study,
        storage: BaseStorage,
        folder: Path,
        executor: Executor,
        progress: Progress,
    ):
        super().__init__(folder, executor, progress)
        self._search, self._study, self._storage = search, study, storage
        self._accounts = AccountCache()
        self._drawn: dict[int, _Drawn] = {}  # by id of the attempt
        # A killed launcher leaves trials that run. They continue as what they are: later draws depend on them.
        self._left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def extend(self) -> None:
        while sum(not attempt.settled for attempt in self.attempts) < (self.executor.jobs or 1):
            if self._left:
                self._begin(self._left.pop(0))
            elif len(self._study.get_trials(deepcopy=False)) < self._search.trials:
                self._begin(None)
            else:
                return

    def _begin(self, left: FrozenTrial | None) -> None:
        """Draws a trial and its run, or resumes a trial that a launcher has left."""
        number = len(self._study.get_trials(deepcopy=False)) if left is None else left.number
        self._study.sampler = _build_sampler(self._search, number)
        if left is None:
            trial = self._study.ask()
        else:
            study = self._storage.get_study_id_from_name(STUDY)
            trial = Trial(self._study, self._storage.get_trial_id_from_study_id_trial_number(study, number))
        try:
            run = self._plan(trial)
        except optuna.TrialPruned:
            self._study.tell(trial, state=TrialState.PRUNED)
            self._print(trial, "skipped by search()")
            return
        costs = {name: quantity(run.phases, self._accounts) for name, quantity in QUANTITIES.items()}
        trial.set_user_attr("overrides", {key: write_value(value) for key, value in run.overrides})
        trial.set_user_attr("run", run.name)
        write_record(self.folder, self._search.config, "search", [run])
        names = [objective.name for objective in self._search.objectives if objective.name in costs]
        shown = [f"{name} {costs[name]:.6g}" for name in names]
        self._print(trial, ", ".join([run.label, *shown]))
        attempt = self.add(run, retry=True)
        attempt.settled = False  # the study does not know the end of the trial, even if that of the run is known
        reported, attributes = (left.intermediate_values, left.user_attrs) if left else ((), {})
        self._drawn[id(attempt)] = _Drawn(trial, costs, set(reported), PRUNED in attributes, attributes.get(PRUNED, 0))

    def _plan(self, trial: Trial) -> Run:
        search = self._search
        try:
            drawn = search.draw(trial)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            raise SweepError("space", f"trial {trial.number}: {type(error).__name__}: {error}") from error
        if not isinstance(drawn, dict):
            raise SweepError("space", f"must return a dict of overrides, got {type(drawn).__name__}")
        if search.match:
            (matched,) = match_runs(search.config, [drawn], search.match, search.common)
            self._print(trial, str(matched))
            drawn = matched.overrides
        (run,) = plan_runs(search.config, [drawn], search.common, search.max_steps, search.imports)
        return run

    def observe(self, attempt: Attempt) -> bool:
        """Reports new evaluations to the study; returns whether the trial is pruned at one of them.

        The result depends on the recorded rows only, not on when they are read.
        """
        drawn, objectives = self._drawn[id(attempt)], self._search.objectives
        metrics = [objective.name for objective in objectives if objective.name.startswith(EVAL)]
        for row in () if drawn.pruned else read_rows(attempt.run.workdir(self.folder).metrics):
            evaluated = [name for name in row if name.startswith(EVAL)]
            if row["step"] <= drawn.step or not evaluated:
                continue
            drawn.step = row["step"]
            if missing := [name for name in metrics if name not in evaluated]:
                raise SweepError("objective", f"the runs have no {missing[0]!r}, only {', '.join(evaluated)}")
            if len(objectives) > 1 or row[metrics[0]] is None:
                continue
            if drawn.step not in drawn.reported:
                drawn.trial.report(row[metrics[0]], drawn.step)
            if drawn.step < attempt.run.checked.train.steps and drawn.trial.should_prune():
                drawn.trial.set_user_attr(PRUNED, drawn.step)
                drawn.pruned = True
                break
        return drawn.pruned

    def settle(self, attempt: Attempt, cancelled: bool) -> None:
        """Reports the end of a trial to the study. A run that another process stopped resumes."""
        drawn = self._drawn[id(attempt)]
        if attempt.state is State.STOPPED and not cancelled:
            attempt.state = State.WAITING
            return
        attempt.settled = True
        if cancelled:
            self._study.tell(drawn.trial, state=TrialState.PRUNED)
            self._print(drawn.trial, f"pruned at step {drawn.step}; its command resumes it")
        elif attempt.state is State.FAILED:
            self._study.tell(drawn.trial, state=TrialState.FAIL)
            self._print(drawn.trial, f"failed: {self.explain(attempt)}", *self.read_log(attempt))
        else:
            values = measure_run(attempt.run, self.folder, self._search.objectives, drawn.costs)
            finite = all(map(math.isfinite, values))
            self._study.tell(drawn.trial, values if finite else None, None if finite else TrialState.FAIL)
            names = [objective.name for objective in self._search.objectives]
            shown = (f"{name} {value:.6g}" for name, value in zip(names, values, strict=True))
            self._print(drawn.trial, ", ".join(shown))

    def _print(self, trial: Trial, first: str, *lines: str) -> None:
        self.progress.print(f"trial {trial.number}: {first}", *(f"    {line}" for line in lines))


def measure_run(
    run: Run, folder: Path, objectives: tuple[Objective, ...], costs: dict[str, float]
) -> tuple[float, ...]:
    """Returns the objectives of a run that has ended; NaN for a value that is not finite or was not measured."""
    workdir = run.workdir(folder)
    rates = [row[STEPS_PER_SECOND] for row in read_rows(workdir.timing)]
    seconds = run.checked.train.steps / statistics.median(rates) if rates else None
    measured = {**read_json(workdir.result), **costs, SECONDS: seconds}
    for objective in objectives:
        if objective.name not in measured:
            known = ", ".join(name for name in measured if name.startswith(EVAL))
            raise SweepError("objective", f"the runs have no {objective.name!r}, only {known}")
    values = (measured[objective.name] for objective in objectives)
    return tuple(math.nan if value is None else float(value) for value in values)
