"""Stop signals, on which all processes that train together agree."""

from __future__ import annotations

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparsejax.signals import Interrupted, StopSignals

PERIOD = 3.0  # seconds between two exchanges


class StopRequests:
    """The stop signals of all processes that train together.

    Several processes exchange their signals at the same calls, about every `PERIOD` seconds: the coordinator measures
    the time between two exchanges, and all processes use its number of calls up to the next one. Training steps and the
    batches of an evaluation differ in duration, so that each kind of work has its own schedule.
    """

    def __init__(self, signals: StopSignals):
        self._signals = signals
        self._schedules: dict[str, _Schedule] = {}

    def poll(self, work: str) -> str | None:
        """Returns the signal that arrived in any process; the processes make the same calls in the same order.

        Args:
          work: Kind of work between two calls.
        """
        if jax.process_count() == 1:
            return self._signals.received
        schedule = self._schedules.setdefault(work, _Schedule())
        if not schedule.is_due():
            return None
        flags = np.array([self._signals.received is not None, schedule.next_interval(time.monotonic())])
        flags = multihost_utils.process_allgather(flags)
        schedule.start(int(flags[0, 1]), time.monotonic())
        return "a signal" if flags[:, 0].any() else None

    def check(self, step: int, work: str) -> None:
        """Raises Interrupted if a signal arrived; `step` has been saved, or the caller saves it."""
        if signal := self.poll(work):
            raise Interrupted(f"stopped by {signal} at step {step}; run the same command to resume")


class _Schedule:
    """Number of calls between two exchanges. The first call exchanges."""

    def __init__(self) -> None:
        self._interval = self._remaining = 1
        self._start = -PERIOD

    def is_due(self) -> bool:
        self._remaining -= 1
        return self._remaining == 0

    def next_interval(self, now: float) -> int:
        """The number of calls that take `PERIOD` seconds, at most twice that of the last interval."""
        return max(1, round(self._interval * min(2.0, PERIOD / max(now - self._start, 1e-9))))

    def start(self, interval: int, now: float) -> None:
        self._interval = self._remaining = interval
        self._start = now
