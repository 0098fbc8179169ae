"""The supervisor launches runs and follows them to their end, for sweeps and for searches.

Everything that it knows is on disk, so that the next launcher finds what a killed one has left.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from sparsejax.budget import Budget, match_runs
from sparsejax.job import was_asked
from sparsejax.overrides import Overrides
from sparsejax.signals import LOSS_DIVERGED, Interrupted, StopSignals
from sparsejax.sweep.executors import Attempt, Executor, State, build_executor, build_job
from sparsejax.sweep.progress import Progress, print_lines, read_progress
from sparsejax.sweep.runs import Run, check_record, plan_runs, read_sweep, show_command, write_record
from sparsejax.workdir import SweepFolder, read_tail

LOG_LINES = 8  # of a failed run
TIME_LIMIT = "the time limit"


class RunsFailed(Exception):
    """Some runs of a sweep failed; the others are done."""


def sweep(
    axes: str,
    config: str,
    overrides: Overrides,
    folder: Path,
    console: Console,
    *,
    jobs: int | None = None,
    slurm: Mapping[str, str] | None = None,
    print_only: bool = False,
    retry: bool = False,
    max_steps: int | None = None,
    max_hours: float | None = None,
    match: Budget | None = None,
    imports: Sequence[str] = (),
) -> None:
    """Plans all runs of a sweep, checks them, and launches those that are not done.

    Args:
      axes: The runs, see `read_sweep`.
      config: Source of the configuration of all runs, see `config.load`.
      overrides: Overrides of all runs; those of a run take precedence.
      folder: Folder of the sweep.
      console: Where to print.
      jobs: Number of concurrent runs.
      slurm: Settings of the submission to Slurm; None for this machine.
      print_only: Whether to print the command lines and start nothing.
      retry: Whether to run failed runs again.
      max_steps: Rejects runs of more steps.
      max_hours: Time after which no run starts, and the running ones are asked to save and stop.
      match: Budget of all runs.
      imports: Files and modules that every run imports first.

    Raises:
      InputError: Invalid input; no run was started.
      RunsFailed: Some runs failed, as printed.
      Interrupted: Some runs were asked to stop, or had no time to start.
    """
    planned = read_sweep(axes)
    if match is not None:
        matched = match_runs(config, planned, match, overrides)
        print_lines(console, *dict.fromkeys(map(str, matched)))
        planned = [run.overrides for run in matched]
    runs = plan_runs(config, planned, overrides, max_steps, imports)
    check_record(folder, config, runs)
    if print_only:
        print_lines(console, *(show_command(run.command(folder)) for run in runs))
        return
    executor = build_executor(folder, jobs, slurm)
    with SweepFolder(folder).hold():
        write_record(folder, config, axes, runs)
        launch(runs, folder, executor, Progress(console, folder, executor.jobs), retry, max_hours)


def launch(
    runs: Sequence[Run],
    folder: Path,
    executor: Executor,
    progress: Progress,
    retry: bool = False,
    max_hours: float | None = None,
) -> None:
    """Runs all runs that are not done, and waits for them; raises RunsFailed or Interrupted, see `sweep`."""
    supervisor = Supervisor(folder, executor, progress)
    for run in runs:
        supervisor.add(run, retry)
    reason = supervisor.follow(max_hours)
    states = [attempt.state for attempt in supervisor.attempts]
    done, failed = states.count(State.DONE), states.count(State.FAILED)
    summary = f"{done} of {_count(len(runs))} done" + (f", {failed} failed" if failed else "")
    if remaining := len(runs) - done - failed:
        stopped_by = reason or "another process"
        raise Interrupted(f"stopped by {stopped_by}: {summary}, {remaining} remaining; the same command resumes")
    if failed:
        raise RunsFailed(summary)
    progress.print(summary)


class Supervisor:
    """Launches attempts and follows them. A search overrides `extend`, `observe` and `settle`."""

    stops_on_error = False  # whether live runs are asked to stop when the launcher fails

    def __init__(self, folder: Path, executor: Executor, progress: Progress):
        self.folder, self.executor, self.progress = folder, executor, progress
        self.attempts: list[Attempt] = []

    def add(self, run: Run, retry: bool) -> Attempt:
        """Adds a run in the state in which the last launcher left it."""
        attempt = Attempt(run, build_job(run, self.folder), since=time.monotonic())
        self.attempts.append(attempt)
        code = self.executor.exit_code(attempt)
        if self.executor.find(attempt):
            attempt.state = State.QUEUED
            self.progress.report(attempt, "found, launched before")
        elif attempt.job.result.exists():
            attempt.state, attempt.settled = State.DONE, True
        elif not (retry or code is None or was_asked(code)):
            attempt.state, attempt.settled = State.FAILED, True
            self.progress.report(attempt, f"failed before: {self.explain(attempt)}")
        return attempt

    def follow(self, max_hours: float | None = None) -> str | None:
        """Returns when all attempts are settled, or those that were live have stopped; returns why they had to."""
        deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        with StopSignals(_leave) as signals, self.progress:
            try:
                return self._follow(signals, deadline)
            except Interrupted:
                raise
            except Exception:
                if self.stops_on_error:
                    self.stop_all()
                raise

    def _follow(self, signals: StopSignals, deadline: float) -> str | None:
        reason = None
        while True:
            for attempt in self.attempts:
                if not attempt.settled:
                    self._check(attempt)
            live = [attempt for attempt in self.attempts if attempt.live]
            if reason is None and (reason := signals.received or (TIME_LIMIT if time.monotonic() > deadline else None)):
                fate = "left running" if self._leaves(reason) else "asked to save and stop"
                if live:
                    self.progress.print(f"{reason}: {_count(len(live))} {fate}")
            if reason and self._leaves(reason):
                return reason
            if reason:
                for attempt in live:
                    self.executor.stop(attempt)
            else:
                self.extend()
                self._launch()
            self.progress.update(self.attempts)
            if all(attempt.settled or (reason and not attempt.live) for attempt in self.attempts):
                return reason
            time.sleep(self.executor.poll_interval)

    def _leaves(self, reason: str) -> bool:
        return self.executor.detached and reason != TIME_LIMIT

    def _check(self, attempt: Attempt) -> None:
        """Updates the state of a run."""
        ended = attempt.live and self.executor.ended(attempt)  # before the last rows are read
        cancelled = self.observe(attempt)
        if ended:
            attempt.state = self._final_state(attempt)
        if cancelled and attempt.live:
            self.executor.stop(attempt)
        elif cancelled:
            attempt.state = State.STOPPED
        if attempt.live:
            started = self.executor.started(attempt)
            if started and attempt.state is State.QUEUED:
                attempt.since = time.monotonic()
                attempt.step = read_progress(attempt.run.workdir(self.folder)).step
            attempt.state = State.RUNNING if started else State.QUEUED
        elif attempt.state is not State.WAITING:
            self.settle(attempt, cancelled)

    def _final_state(self, attempt: Attempt) -> State:
        code = self.executor.exit_code(attempt)
        if attempt.job.result.exists():
            return State.DONE
        return State.STOPPED if was_asked(code) or (attempt.asked and code is None) else State.FAILED

    def _launch(self) -> None:
        waiting = [attempt for attempt in self.attempts if attempt.state is State.WAITING]
        live = [attempt for attempt in self.attempts if attempt.live]
        for attempt in self.executor.launch(waiting, live):
            attempt.state, attempt.since = State.QUEUED, time.monotonic()
            self.progress.print(show_command(attempt.job.command))

    def stop_all(self) -> None:
        """Asks all live runs to save, and waits for them."""
        while live := [attempt for attempt in self.attempts if attempt.live and not self.executor.ended(attempt)]:
            for attempt in live:
                self.executor.stop(attempt)
            time.sleep(self.executor.poll_interval)

    def explain(self, attempt: Attempt) -> str:
        """How the last attempt of a run ended."""
        code = self.executor.exit_code(attempt)
        if code is None:
            end = "the job ended without an exit code"
        elif code < 0:
            end = f"killed by signal {-code}, {signal.Signals(-code).name}"
        else:
            end = f"exit code {code}" + {0: ", but no result", LOSS_DIVERGED: ", the loss diverged"}.get(code, "")
        return f"{end}; log: {attempt.job.files.log}"

    def read_log(self, attempt: Attempt) -> list[str]:
        """The last lines of the log of a failed run."""
        return read_tail(attempt.job.files.log)[-LOG_LINES:] if attempt.state is State.FAILED else []

    def extend(self) -> None:
        """Adds attempts while there is room."""

    def observe(self, attempt: Attempt) -> bool:
        """Looks at an unsettled attempt; returns whether to cancel it."""
        return False

    def settle(self, attempt: Attempt, cancelled: bool) -> None:
        """Records the end of an attempt."""
        attempt.settled = True
        end = f": {self.explain(attempt)}" if attempt.state is State.FAILED else ""
        event = f"{attempt.state} after {time.monotonic() - attempt.since:.0f} s{end}"
        self.progress.report(attempt, event, self.read_log(attempt))


def _leave() -> None:
    raise Interrupted("left at once: runs continue, and the same command finds them")


def _count(runs: int) -> str:
    return f"{runs} run{'' if runs == 1 else 's'}"
