"""Progress for people: a bar with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressReport:
    """Follows a run from `start` to `steps`; use as a context manager, and say what begins with `begin`."""

    def __init__(self, console: Console, start: int, steps: int):
        self._console, self._steps = console, steps
        self.begin(start, 0)
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console)
            self._task = self._bar.add_task("train", total=steps, completed=start, note="compiling")

    def __enter__(self) -> ProgressReport:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, start: int, tokens: int) -> None:
        """From step `start` on a step has so many tokens, and the first one compiles."""
        self._start, self._tokens = start, tokens
        self._mark_time, self._mark_step = time.monotonic(), start

    def advance(self, step: int) -> None:
        """A step is under way; the clock starts after the first, which compiles."""
        if step == self._start + 1:
            self._mark_time, self._mark_step = time.monotonic(), step
        if self._bar:
            self._bar.update(self._task, completed=step)

    def pause(self) -> PausedClock:
        """Keeps evaluation and the like out of the throughput: `with report.pause(): ...`."""
        return PausedClock(self)

    def skip_time(self, seconds: float) -> None:
        """Leaves so many seconds out of the throughput since the last log."""
        self._mark_time += seconds

    def log(self, step: int, note: str) -> dict[str, float]:
        """Shows a line; returns the throughput since the last one as timing metrics."""
        now = time.monotonic()
        rate = (step - self._mark_step) / max(now - self._mark_time, 1e-9)
        self._mark_time, self._mark_step = now, step
        timing = {"steps_per_second": rate, "tokens_per_second": rate * self._tokens}
        left = datetime.timedelta(seconds=round((self._steps - step) / rate)) if rate else "?"
        note = f"{note} | {rate:.2f} steps/s {rate * self._tokens:,.0f} tokens/s" if rate else note
        if self._bar:
            self._bar.update(self._task, note=note)
        else:
            self._console.print(f"step {step}/{self._steps} | {note} | ETA {left}", highlight=False, soft_wrap=True)
        return timing if rate else {}


class PausedClock:
    """A stretch of time that does not count as training."""

    def __init__(self, report: ProgressReport):
        self._report = report

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._report.skip_time(time.monotonic() - self._since)
