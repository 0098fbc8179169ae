"""Launches the runs of a sweep and follows them; whatever an earlier launcher has left is found again."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from sparsejax.job import hold, was_asked
from sparsejax.sweep.axes import Overrides, SweepError
from sparsejax.sweep.board import Board, read_progress
from sparsejax.sweep.engines import Attempt, Engine, State, build_engine, build_job
from sparsejax.sweep.match import Match, match_runs
from sparsejax.sweep.record import check_record, write_record
from sparsejax.sweep.runs import Run, limit_steps, plan_runs, read_sweep, show_command
from sparsejax.train import Interrupted

LINES = 8  # of the log of a run that failed


class RunsFailed(Exception):
    """Runs of a sweep failed; the others are done."""


def sweep(
    text: str,
    config: str,
    given: Overrides,
    folder: Path,
    console: Console,
    jobs: int | None = None,
    slurm: Mapping[str, str] | None = None,
    dry: bool = False,
    retry: bool = False,
    steps: int | None = None,
    hours: float | None = None,
    match: Match | None = None,
) -> None:
    """The verb: plans all runs, checks them, and launches what is not done.

    Args:
      text: Which runs: a file, or axes; see `read_sweep`.
      config: Of all runs, `FILE` or `FILE:ARGUMENT`.
      given: Overrides of all runs, which a run may set anew.
      folder: Where the sweep lives.
      console: Where it is shown.
      jobs: Runs at a time.
      slurm: Settings of the submission, to launch through Slurm; None for this machine.
      dry: Only print the command lines.
      retry: See `launch`.
      steps: Runs of more steps are refused.
      hours: See `launch`.
      match: What all runs are to take the same of.

    Raises:
      SweepError, ConfigError: before any run starts: something given cannot be used.
      RunsFailed, Interrupted: see `launch`.
    """
    if jobs is not None and jobs < 1:
        raise SweepError(f"--jobs: at least 1, got {jobs}")
    planned = read_sweep(text)
    if match is not None:
        matched = match_runs(config, planned, match, given)
        console.print(*dict.fromkeys(map(str, matched)), sep="\n", highlight=False, markup=False, soft_wrap=True)
        planned = [one.overrides for one in matched]
    runs = plan_runs(config, planned, given)
    limit_steps(runs, steps)
    check_record(folder, config, runs)
    if dry:
        for run in runs:
            console.print(show_command(run.command(folder)), highlight=False, markup=False, soft_wrap=True)
        return
    engine = build_engine(folder, jobs, slurm)
    with hold(folder / "jobs" / "launcher.lock") as alone:
        if not alone:
            raise SweepError(f"--workdir: another launcher is at work on {folder}")
        write_record(folder, config, text, runs)
        launch(runs, folder, engine, Board(console, folder, engine.jobs), retry, hours)


def launch(
    runs: Sequence[Run], folder: Path, engine: Engine, board: Board, retry: bool = False, hours: float | None = None
) -> None:
    """Runs all that are not done, and waits for them.

    Args:
      runs: What is to be done.
      folder: The sweep's folder.
      engine: Where runs are launched.
      board: What people see of it.
      retry: Whether runs that failed are run again.
      hours: After so long no run starts, and those that run are asked to save and stop.

    Raises:
      RunsFailed: some runs failed; the board has said which.
      Interrupted: some runs were asked to stop, or had no time to start.
    """
    attempts = [_assess(run, folder, engine, retry) for run in runs]
    for attempt in attempts:
        if attempt.state is State.QUEUED:
            board.report(attempt, "found again, launched before")
        elif attempt.state is State.FAILED:
            board.report(attempt, f"failed before, and --retry runs it again: {explain(attempt)}")
    with StopSignals() as signals, board:
        reason = _follow(attempts, engine, board, folder, signals, hours)
    board.say(_conclude(attempts, reason))


def _assess(run: Run, folder: Path, engine: Engine, retry: bool) -> Attempt:
    """Where a run stands as the launcher comes to it."""
    attempt = Attempt(run, build_job(run, folder), State.WAITING, since=time.monotonic())
    code = attempt.job.exit_code()
    if engine.find(attempt):
        attempt.state = State.QUEUED
    elif run.finished(folder):
        attempt.state = State.DONE
    elif not (retry or code is None or was_asked(code)):
        attempt.state = State.FAILED
    return attempt


def _follow(
    attempts: list[Attempt], engine: Engine, board: Board, folder: Path, signals: StopSignals, hours: float | None
) -> str | None:
    """Until all have ended, or those that run have stopped; returns why they had to."""
    end = None if hours is None else time.monotonic() + 3600 * hours
    reason = None
    while True:
        for attempt in attempts:
            if attempt.live:
                _look(attempt, engine, folder, board)
        live, waiting = [one for one in attempts if one.live], _having(attempts, State.WAITING)
        if reason is None:
            reason = "--max-hours" if end is not None and time.monotonic() > end else signals.received
            if reason and live:
                what = "left to go on" if reason == signals.received and engine.stays else "asked to save and stop"
                board.say(f"{reason}: {_count(len(live))} {what}")
        if reason and reason == signals.received and engine.stays:
            return reason
        if reason:
            for attempt in live:
                engine.stop(attempt)
        else:
            for attempt in engine.launch(waiting, live):
                attempt.state, attempt.since = State.QUEUED, time.monotonic()
                board.say(show_command(attempt.job.command))
        board.show(attempts)
        if not any(one.live for one in attempts) and (reason or not waiting):
            return reason
        time.sleep(engine.rest)


def _look(attempt: Attempt, engine: Engine, folder: Path, board: Board) -> None:
    """Whether a launched run has begun, or ended, and how."""
    if not engine.ended(attempt):
        if attempt.state is State.QUEUED and engine.began(attempt):
            attempt.state, attempt.since = State.RUNNING, time.monotonic()
            attempt.step = read_progress(attempt.run.workdir(folder)).step
        elif not engine.began(attempt):
            attempt.state = State.QUEUED
        return
    code = attempt.job.exit_code()
    took = f"after {time.monotonic() - attempt.since:.0f} s"
    if attempt.run.finished(folder):
        attempt.state = State.DONE
        board.report(attempt, f"done {took}")
    elif was_asked(code) or (attempt.told and code is None):
        attempt.state = State.STOPPED
        board.report(attempt, f"stopped {took}")
    else:
        attempt.state = State.FAILED
        board.report(attempt, f"failed {took}: {explain(attempt)}", attempt.job.last_lines(LINES))


def explain(attempt: Attempt) -> str:
    """How the run's last attempt ended, in words."""
    code = attempt.job.exit_code()
    if code is None:
        how = "its job ended without an exit code"
    elif code < 0:
        how = f"killed by signal {-code}, {signal.Signals(-code).name}"
    else:
        how = f"exit code {code}" + (", but no result" if code == 0 else "")
    return f"{how}; log: {attempt.job.log}"


def _conclude(attempts: list[Attempt], reason: str | None) -> str:
    """How many runs are done; raises what says that it is not all of them."""
    done, failed = len(_having(attempts, State.DONE)), len(_having(attempts, State.FAILED))
    counted = f"{done} of {_count(len(attempts))} done"
    counted += f", {failed} failed" if failed else ""
    left = len(attempts) - done - failed
    if left:
        raise Interrupted(f"stopped by {reason or 'others'}: {counted}, {left} left; the same command goes on")
    if failed:
        raise RunsFailed(f"{counted}; the same command with --retry runs again what failed")
    return counted


def _count(runs: int) -> str:
    return f"{runs} run{'' if runs == 1 else 's'}"


def _having(attempts: list[Attempt], state: State) -> list[Attempt]:
    return [attempt for attempt in attempts if attempt.state is state]


class StopSignals:
    """Notes SIGINT and SIGTERM, so that the runs can be asked to save; a second one leaves at once."""

    received: str | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received:
            raise Interrupted("left at once: what runs goes on, and the same command finds it")
        self.received = signal.Signals(number).name
