"""Progress of a sweep: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from sparsejax.metrics import STEPS_PER_SECOND, TRAIN_LOSS
from sparsejax.sweep.executors import Attempt, State
from sparsejax.workdir import Workdir, read_last_row

LIVE_INTERVAL = 1.0  # seconds between two updates of the table
PLAIN_INTERVAL = 60.0  # seconds between two updates without a terminal
MAX_ROWS = 20  # of the table


class RunProgress(NamedTuple):
    """The last logged step of a run, its loss in nats per token, and the steps per second since the previous log."""

    step: int
    loss: float | None
    rate: float | None


def read_progress(workdir: Workdir) -> RunProgress:
    """Reads the last rows of the metrics and the timing of a run; step 0 before the first row."""
    metrics, timing = read_last_row(workdir.metrics), read_last_row(workdir.timing)
    return RunProgress(metrics.get("step", 0), metrics.get(TRAIN_LOSS), timing.get(STEPS_PER_SECOND))


class Progress:
    """Reports on the runs of the sweep in `folder`, `jobs` at a time; use as a context manager.

    The number of runs, `total`, defaults to the number of attempts so far.
    """

    def __init__(self, console: Console, folder: Path, jobs: int | None = None, total: int | None = None):
        self._console, self._folder, self._jobs, self._total = console, folder, jobs, total
        self._start = self._updated = time.monotonic()
        self._seconds = self._steps = 0.0  # of the runs that were done since then
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def print(self, *lines: str) -> None:
        """Prints lines verbatim."""
        print_lines(self._console, *lines)

    def report(self, attempt: Attempt, event: str, log: Sequence[str] = ()) -> None:
        """Prints an event of a run and the last lines of its log."""
        self.print(f"{attempt.run.name} {_name(attempt)}: {event}", *(f"    {line}" for line in log))
        if attempt.state is State.DONE:
            self._seconds += time.monotonic() - attempt.since
            self._steps += attempt.run.checked.train.steps - attempt.step

    def update(self, attempts: Sequence[Attempt]) -> None:
        """Shows the state of all runs, if the last update is old enough."""
        now = time.monotonic()
        if now - self._updated < (LIVE_INTERVAL if self._live else PLAIN_INTERVAL):
            return
        self._updated = now
        running = [attempt for attempt in attempts if attempt.state is State.RUNNING]
        progress = {attempt.run.name: read_progress(attempt.run.workdir(self._folder)) for attempt in running}
        rows = [_describe(attempt, progress[attempt.run.name]) for attempt in running]
        summary = self._summarize(attempts, progress)
        if self._live is None:
            self.print(
                summary, *(f"    {name} | step {step} | loss {loss} nats | ETA {eta}" for name, step, loss, eta in rows)
            )
            return
        table = Table("run", "step", "loss (nats)", "ETA")
        for row in rows[:MAX_ROWS]:
            table.add_row(*row)
        self._live.update(Group(table, summary), refresh=True)

    def _summarize(self, attempts: Sequence[Attempt], progress: dict[str, RunProgress]) -> str:
        counts = {state: sum(attempt.state is state for attempt in attempts) for state in State}
        words = [f"{counts[state]} {state}" for state in State if counts[state] or state is State.DONE]
        elapsed, total = _clock(time.monotonic() - self._start), self._total or len(attempts)
        return f"sweep: {', '.join(words)} of {total} | {elapsed} | ETA {_clock(self._estimate(attempts, progress))}"

    def _estimate(self, attempts: Sequence[Attempt], progress: dict[str, RunProgress]) -> float | None:
        """Seconds to the end, at the pace of the runs that are done, or else of those that are running."""
        rates = [run.rate for run in progress.values() if run.rate]
        if not self._steps and not rates:
            return None
        pace = self._seconds / self._steps if self._steps else len(rates) / sum(rates)
        steps = {attempt.run.name: attempt.run.checked.train.steps for attempt in attempts}
        pending = [attempt.run.name for attempt in attempts if attempt.live or attempt.state is State.WAITING]
        unknown = (self._total or len(attempts)) - len(attempts)  # runs that a search has not drawn yet
        remaining = unknown * sum(steps.values()) / max(1, len(steps))
        remaining += sum(steps[name] - (progress[name].step if name in progress else 0) for name in pending)
        return remaining * pace / max(1, min(self._jobs or len(progress), len(pending) + unknown))


def print_lines(console: Console, *lines: str) -> None:
    """Prints lines verbatim."""
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def _name(attempt: Attempt) -> str:
    return f"{attempt.run.label} seed {attempt.run.seed}"


def _describe(attempt: Attempt, progress: RunProgress) -> tuple[str, str, str, str]:
    steps = attempt.run.checked.train.steps
    loss = "?" if progress.loss is None else f"{progress.loss:.4f}"
    eta = (steps - progress.step) / progress.rate if progress.rate else None
    return _name(attempt), f"{progress.step}/{steps}", loss, _clock(eta)


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
