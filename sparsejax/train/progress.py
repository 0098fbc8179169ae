"""Progress of a run: a bar with the remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsejax.metrics import STEPS_PER_SECOND, TOKENS_PER_SECOND


class ProgressReport:
    """Reports the progress of a run from step `start` to step `steps`; a context manager."""

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
        """Begins a phase after step `start` with `tokens` tokens per step, whose first step compiles."""
        self._start, self._tokens, self._paused = start, tokens, 0.0
        self._mark_time, self._mark_step = time.monotonic(), start

    def advance(self, step: int) -> None:
        """Reports that `step` has been dispatched. The clock starts after the first step, which compiles."""
        if step == self._start + 1:
            self._mark_time, self._mark_step = time.monotonic(), step
        if self._bar:
            self._bar.update(self._task, completed=step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of a block, such as an evaluation, from the throughput, but not from the remaining time."""
        start = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - start
            self._mark_time += elapsed
            self._paused += elapsed

    def log(self, step: int, note: str) -> dict[str, float]:
        """Prints a note; returns the throughput since the previous one, or nothing if no step was measured."""
        now = time.monotonic()
        rate = (step - self._mark_step) / max(now - self._mark_time, 1e-9)
        self._mark_time, self._mark_step = now, step
        remaining: datetime.timedelta | str = "?"
        if rate:
            pace = 1 / rate + self._paused / (step - self._start)  # seconds per step
            remaining = datetime.timedelta(seconds=round((self._steps - step) * pace))
        note = f"{note} | {rate:.2f} steps/s {rate * self._tokens:,.0f} tokens/s" if rate else note
        if self._bar:
            self._bar.update(self._task, note=note)
        else:
            self._console.print(
                f"step {step}/{self._steps} | {note} | ETA {remaining}", highlight=False, soft_wrap=True
            )
        return {STEPS_PER_SECOND: rate, TOKENS_PER_SECOND: rate * self._tokens} if rate else {}
