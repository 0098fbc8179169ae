"""Progress of a verb that works through batches, cells or windows."""

from __future__ import annotations

import datetime
import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL = 10.0  # seconds between two lines of progress without a terminal


class WorkProgress:
    """Reports progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, verb: str, unit: str, console: Console | None = None):
        self._console, self._bar = console or Console(stderr=True), None
        self._unit = unit
        self._first: int | None = None
        if self._console.is_terminal:
            columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._task = self._bar.add_task(verb, total=None)
        self._shown = self._compiled = time.monotonic()

    def __enter__(self) -> WorkProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, index: int, count: int) -> None:
        """Reports that unit `index` of `count` begins; a resumed verb begins with a later one than 0."""
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=index, total=count)
            return
        if self._first is None:
            self._first = index
        done = index - self._first - 1  # without the first, which compiles
        if done == 0:
            self._compiled = now
        if done > 0 and now - self._shown >= INTERVAL:
            self._shown = now
            seconds = math.ceil((now - self._compiled) / done * (count - index))
            remaining = datetime.timedelta(seconds=seconds)
            self._console.print(f"{self._unit} {index}/{count} | ETA {remaining}", highlight=False)
