"""The progress board of a sweep: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from sparsejax.job import read_tail
from sparsejax.sweep.engines import Attempt, State
from sparsejax.sweep.runs import Run

LOOK = 1.0  # seconds between two looks at what the runs have written
PLAIN = 60.0  # seconds between two lines where there is no terminal
ROWS = 20  # running runs that are shown one by one


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: its last logged step, the loss there, and steps per second since the log before."""

    step: int
    loss: float | None
    rate: float | None


def read_progress(workdir: Path) -> Progress:
    """From the last lines of `metrics.jsonl` and `timing.jsonl`; step 0 before the first."""
    metrics, timing = (_read_last(workdir / name) for name in ("metrics.jsonl", "timing.jsonl"))
    return Progress(metrics.get("step", 0), metrics.get("train/loss"), timing.get("steps_per_second"))


class Board:
    """Says what happens to the runs of the sweep in `folder`, `jobs` of them at a time; use as a context manager."""

    def __init__(self, console: Console, folder: Path, jobs: int | None = None):
        self._console, self._folder, self._jobs = console, folder, jobs
        self._begun = self._looked = self._printed = time.monotonic()
        self._seconds = self._steps = 0.0  # of the runs that were done under this board
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """One line, as it is."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def report(self, attempt: Attempt, note: str, log: Sequence[str] = ()) -> None:
        """What has become of a run, and the end of its log."""
        self.say(f"{attempt.run.name} {attempt.name}: {note}")
        for line in log:
            self.say(f"    {line}")
        if attempt.state is State.DONE:
            self._seconds += time.monotonic() - attempt.since
            self._steps += attempt.run.checked.train.steps - attempt.step

    def show(self, attempts: Sequence[Attempt]) -> None:
        """Renews the board, as often as it makes sense."""
        now = time.monotonic()
        if now - self._looked < LOOK or (self._live is None and now - self._printed < PLAIN):
            return
        self._looked = self._printed = now
        running = [attempt.run for attempt in attempts if attempt.state is State.RUNNING]
        progress = {run.name: read_progress(run.workdir(self._folder)) for run in running}
        line = self._summarize(attempts, progress)
        if self._live is None:
            self.say(line)
            for attempt in attempts:
                if attempt.run.name in progress:
                    name, step, loss, left = self._describe(attempt, progress[attempt.run.name])
                    self.say(f"    {name} | step {step} | loss {loss} | ETA {left}")
        else:
            self._live.update(Group(self._table(attempts, progress), line), refresh=True)

    def _table(self, attempts: Sequence[Attempt], progress: dict[str, Progress]) -> Table:
        table = Table("run", "step", "loss", "ETA")
        for attempt in [a for a in attempts if a.run.name in progress][:ROWS]:
            table.add_row(*self._describe(attempt, progress[attempt.run.name]))
        return table

    def _describe(self, attempt: Attempt, progress: Progress) -> tuple[str, ...]:
        steps = attempt.run.checked.train.steps
        loss = "?" if progress.loss is None else f"{progress.loss:.4f}"
        left = (steps - progress.step) / progress.rate if progress.rate else None
        return attempt.name, f"{progress.step}/{steps}", loss, _clock(left)

    def _summarize(self, attempts: Sequence[Attempt], progress: dict[str, Progress]) -> str:
        counts = {state: sum(a.state is state for a in attempts) for state in State}
        words = [f"{counts[state]} {state}" for state in State if counts[state] or state is State.DONE]
        took, left = time.monotonic() - self._begun, self._estimate(attempts, progress)
        return f"sweep: {', '.join(words)} of {len(attempts)} | {_clock(took)} | ETA {_clock(left)}"

    def _estimate(self, attempts: Sequence[Attempt], progress: dict[str, Progress]) -> float | None:
        """Seconds that the sweep still takes, at the pace of the runs that are done, or else of those that run."""
        rates = [one.rate for one in progress.values() if one.rate]
        if not self._steps and not rates:
            return None
        pace = self._seconds / self._steps if self._steps else len(rates) / sum(rates)
        open_runs = [a for a in attempts if a.live or a.state is State.WAITING]
        steps = sum(_steps(a.run) - (progress[a.run.name].step if a.run.name in progress else 0) for a in open_runs)
        return steps * pace / max(1, min(self._jobs or len(progress), len(open_runs)))


def _steps(run: Run) -> int:
    return run.checked.train.steps


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def _read_last(path: Path) -> dict[str, Any]:
    """The last whole row of a file of rows."""
    for line in reversed(read_tail(path)):
        try:
            return json.loads(line)
        except ValueError:  # it is being written
            continue
    return {}
