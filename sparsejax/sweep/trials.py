"""Search over schedules and other settings with Optuna: every trial is an ordinary run, launched as those of a sweep.

The function `search(trial)` of a file draws overrides; `sparsejax.sweep.suggest_period` and its like draw schedules.
One objective is searched with asynchronous successive halving (ASHA, arXiv:1810.05934): a trial that is not among the
best third of those that came as far is asked to stop, and saves. Of two objectives, such as a loss and the bytes of the
cache, the Pareto front is searched. Optuna prunes no trial of several objectives, so there all train to the end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sparsejax import config as configs
from sparsejax.job import hold, was_asked
from sparsejax.sweep.axes import SweepError
from sparsejax.sweep.engines import Attempt, Engine, State, build_job
from sparsejax.sweep.front import Objective, find_best, write_outcomes
from sparsejax.sweep.launch import StopSignals, explain
from sparsejax.sweep.match import QUANTITIES, match_runs, remember_accounts
from sparsejax.sweep.record import check_record, write_record
from sparsejax.sweep.runs import Run, limit_steps, plan_runs, show_command, write_settings, write_value
from sparsejax.sweep.search import METRIC, SECONDS, Search
from sparsejax.sweep.study import build_sampler, open_study, read_outcomes, require_packages
from sparsejax.train import RESULT, Interrupted, read_rows, write_json

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

LINES = 8  # of the log of a run that failed
RECORD = "search.json"


def run_search(
    search: Search, folder: Path, engine: Engine, console: Console, hours: float | None = None
) -> list[Path]:
    """Runs trials until there are as many as wanted and writes what was found; goes on with what `folder` holds.

    Args:
      search: What is searched.
      folder: Where study, runs and results are.
      engine: Where runs are launched.
      console: Where it is shown.
      hours: After so long those that run are asked to save and stop.

    Returns:
      The files of the results.

    Raises:
      SweepError: something given cannot be used, or no trial was completed.
      Interrupted: asked to stop; the runs have saved.
    """
    require_packages()
    base = configs.load(search.config, write_settings(search.given.items()))
    check_record(folder, search.config, [])
    with hold(folder / "jobs" / "launcher.lock") as alone, StopSignals() as signals:
        if not alone:
            raise SweepError(f"--workdir: another launcher is at work on {folder}")
        _claim_folder(folder, search)
        study = open_study(search, folder, first_rung=base.eval.every)
        reason = _Trials(search, study, folder, engine, console).run(signals, hours)
        ended = study.get_trials(deepcopy=False)
        if reason:
            raise Interrupted(f"stopped by {reason}: {len(ended)} of {search.trials} trials; the same command goes on")
        outcomes = read_outcomes(ended)
        front = find_best(outcomes, search.objectives)
        if not front:
            raise SweepError(f"no trial was completed; logs: {folder / 'jobs'}")
        best = [(one, Run(search.config, tuple(sorted(one.overrides.items())), "")) for one in front]
        return write_outcomes(folder, outcomes, search.objectives, best)


def _claim_folder(folder: Path, search: Search) -> None:
    """Makes the folder this search's own, or finds that it is another's."""
    place = folder / RECORD
    if place.exists():
        changed = configs.difference(json.loads(place.read_text()), json.loads(json.dumps(search.record)))
        if changed:
            raise SweepError(f"--workdir: {folder} belongs to another search: {changed}")
    write_json(place, search.record)


@dataclasses.dataclass
class _Trial:
    """A trial under way.

    Attributes:
      trial: As Optuna knows it.
      attempt: At its run.
      costs: What its run takes, by the account.
      told: Steps whose values the study knows.
      step: The last step that was looked at.
      pruned: Whether it is to stop.
    """

    trial: Trial
    attempt: Attempt
    costs: dict[str, float]
    told: set[int]
    step: int = 0
    pruned: bool = False

    @property
    def run(self) -> Run:
        return self.attempt.run


class _Trials:
    """Begins trials, follows their runs and tells the study."""

    def __init__(self, search: Search, study: Study, folder: Path, engine: Engine, console: Console):
        self._search, self._study, self._folder = search, study, folder
        self._engine, self._console = engine, console
        self._count = remember_accounts()
        self._live: list[_Trial] = []

    def run(self, signals: StopSignals, hours: float | None) -> str | None:
        """Until all trials have ended; or until their runs have stopped, and why they had to."""
        from optuna.trial import TrialState

        # Those that a launcher left when it was killed go on as what they are: a study's next trials depend on them.
        left = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        end = math.inf if hours is None else time.monotonic() + 3600 * hours
        try:
            while not signals.received and time.monotonic() < end:
                while len(self._live) < (self._engine.jobs or 1) and (left or self._wanted()):
                    self._begin(left.pop(0) if left else None)
                if not self._live:
                    return None
                if not self._follow():
                    time.sleep(self._engine.rest)
        finally:
            if not (signals.received and self._engine.stays):
                self._stop()
        return signals.received or "--max-hours"

    def _wanted(self) -> bool:
        return len(self._study.get_trials(deepcopy=False)) < self._search.trials

    def _begin(self, left: FrozenTrial | None) -> None:
        """Draws a trial and its run; `left`: one that was begun before, whose draws stay."""
        from optuna.exceptions import TrialPruned
        from optuna.trial import Trial, TrialState

        number = len(self._study.get_trials(deepcopy=False)) if left is None else left.number
        self._study.sampler = build_sampler(self._search, number)
        trial = self._study.ask() if left is None else Trial(self._study, left._trial_id)
        try:
            run = self._plan(trial)
        except TrialPruned:
            self._study.tell(trial, state=TrialState.PRUNED)
            self._say(trial, "left out by search()")
            return
        costs = {name: quantity(run.phases, self._count) for name, quantity in QUANTITIES.items()}
        trial.set_user_attr("overrides", {key: write_value(value) for key, value in run.overrides})
        trial.set_user_attr("run", run.name)
        write_record(self._folder, self._search.config, "search", [run])
        attempt = Attempt(run, build_job(run, self._folder), State.WAITING)
        if self._engine.find(attempt):
            attempt.state = State.QUEUED
        elif run.finished(self._folder):
            attempt.state = State.DONE
        known = set() if left is None else set(left.intermediate_values)
        self._live.append(_Trial(trial, attempt, costs, known))
        told = [f"{one.name} {costs[one.name]:.6g}" for one in self._search.objectives if one.name in costs]
        self._say(trial, ", ".join([run.label, *told]))
        self._print(show_command(run.command(self._folder)))

    def _plan(self, trial: Trial) -> Run:
        from optuna.exceptions import TrialPruned

        search = self._search
        try:
            drawn = search.draw(trial)
        except TrialPruned:
            raise
        except Exception as error:
            raise SweepError(f"--search: trial {trial.number}: {type(error).__name__}: {error}") from error
        if not isinstance(drawn, dict):
            raise SweepError(f"--search: must give a dict of overrides, got {type(drawn).__name__}")
        if search.match:
            (matched,) = match_runs(search.config, [drawn], search.match, search.given)
            self._say(trial, str(matched))
            drawn = matched.overrides
        (run,) = plan_runs(search.config, [drawn], search.given)
        limit_steps([run], search.steps)
        return run

    def _follow(self) -> int:
        """Looks at all runs, and launches those that wait; returns how many trials have ended."""
        for one in self._live:
            self._look(one)
        ended = [one for one in self._live if one.attempt.state in (State.DONE, State.FAILED, State.STOPPED)]
        self._live = [one for one in self._live if one not in ended]
        for one in ended:
            self._tell(one)
        attempts = [one.attempt for one in self._live]
        waiting = [attempt for attempt in attempts if attempt.state is State.WAITING]
        live = [attempt for attempt in attempts if attempt.live]
        for attempt in self._engine.launch(waiting, live) if waiting else ():
            attempt.state = State.QUEUED
        return len(ended)

    def _look(self, one: _Trial) -> None:
        """Whether its run has ended, and whether it should."""
        attempt = one.attempt
        ended = attempt.live and self._engine.ended(attempt)  # before its last rows are read
        one.pruned = one.pruned or self._report(one)
        if ended:
            code = attempt.job.exit_code()
            done = attempt.run.finished(self._folder)
            asked = was_asked(code) or (attempt.told and code is None)
            # A run that was stopped by others goes on.
            attempt.state = State.DONE if done else State.WAITING if asked else State.FAILED
        if one.pruned and attempt.live:
            self._engine.stop(attempt)
        elif one.pruned:
            attempt.state = State.STOPPED

    def _report(self, one: _Trial) -> bool:
        """Tells the study of the evaluations since; whether the trial is pruned at one of them.

        This depends on the rows alone, and not on when they are looked at.
        """
        metrics = [objective.name for objective in self._search.objectives if objective.name.startswith(METRIC)]
        for row in read_rows(one.run.workdir(self._folder) / "metrics.jsonl"):
            if row["step"] <= one.step:
                continue
            one.step = row["step"]
            evaluated = [name for name in row if name.startswith(METRIC)]
            missing = [name for name in metrics if name not in evaluated]
            if evaluated and missing:
                raise SweepError(f"--objective: there is no {missing[0]!r}, only {', '.join(evaluated)}")
            if not evaluated or len(self._search.objectives) > 1 or row[metrics[0]] is None:
                continue
            if one.step not in one.told:
                one.trial.report(row[metrics[0]], one.step)
            if one.step < one.run.checked.train.steps and one.trial.should_prune():
                return True
        return False

    def _tell(self, one: _Trial) -> None:
        from optuna.trial import TrialState

        attempt, trial = one.attempt, one.trial
        if attempt.state is State.STOPPED:
            self._study.tell(trial, state=TrialState.PRUNED)
            self._say(trial, f"pruned at step {one.step}; its command goes on with it")
        elif attempt.state is State.FAILED:
            self._study.tell(trial, state=TrialState.FAIL)
            self._say(trial, f"failed: {explain(attempt)}", *attempt.job.last_lines(LINES))
        else:
            values = measure_run(one.run, self._folder, self._search.objectives, one.costs)
            good = all(math.isfinite(value) for value in values)
            self._study.tell(trial, values if good else None, None if good else TrialState.FAIL)
            names = [objective.name for objective in self._search.objectives]
            self._say(trial, ", ".join(f"{name} {value:.6g}" for name, value in zip(names, values, strict=True)))

    def _stop(self) -> None:
        """Asks all runs that are under way to save, and waits for them."""
        running = [one.attempt for one in self._live if one.attempt.live]
        if running:
            self._print(f"{len(running)} runs are asked to save and stop")
        while running := [attempt for attempt in running if not self._engine.ended(attempt)]:
            for attempt in running:
                self._engine.stop(attempt)
            time.sleep(self._engine.rest)

    def _say(self, trial: Trial, *lines: str) -> None:
        self._print(f"trial {trial.number}: {lines[0]}", *(f"    {line}" for line in lines[1:]))

    def _print(self, *lines: str) -> None:
        self._console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def measure_run(
    run: Run, folder: Path, objectives: tuple[Objective, ...], costs: dict[str, float]
) -> tuple[float, ...]:
    """The objectives of a run that has ended; NaN for what is not finite or was not measured.

    Raises:
      SweepError: its evaluation has no such metric.
    """
    workdir = run.workdir(folder)
    found = {**json.loads((workdir / RESULT).read_text()), **costs}
    rates = [row["steps_per_second"] for row in read_rows(workdir / "timing.jsonl")]
    found[SECONDS] = run.checked.train.steps / statistics.median(rates) if rates else None
    for objective in objectives:
        if objective.name not in found:
            known = ", ".join(name for name in found if name.startswith(METRIC))
            raise SweepError(f"--objective: there is no {objective.name!r}, only {known}")
    values = (found[objective.name] for objective in objectives)
    return tuple(math.nan if value is None else float(value) for value in values)
