"""Stop signals and the check of the model, on which all processes that train together agree."""

from __future__ import annotations

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparsejax.signals import Interrupted, StopSignals
from sparsejax.train.certify import ModelCheck

PERIOD = 3.0  # seconds between two exchanges
INTERVAL = 0.2  # seconds between two looks at whether the check of the model has ended


class StopRequests:
    """The stop signals of all processes that train together.

    Several processes exchange their signals at the same calls, about every `PERIOD` seconds: the coordinator measures
    the time between two exchanges, and all processes use its number of calls up to the next one. Training steps and the
    batches of an evaluation differ in duration, so that each kind of work has its own schedule.

    Each of these calls also concludes a check of the model that has ended, and raises CheckFailed in all processes.
    """

    def __init__(self, signals: StopSignals, check: ModelCheck):
        self._signals, self._check = signals, check
        self._schedules: dict[str, _Schedule] = {}

    def poll(self, work: str) -> str | None:
        """Returns the signal that arrived in any process; the processes make the same calls in the same order.

        Args:
          work: Kind of work between two calls.
        """
        if jax.process_count() == 1:
            return self._exchange()[0]
        schedule = self._schedules.setdefault(work, _Schedule())
        if not schedule.is_due():
            return None
        signal, interval = self._exchange(schedule.next_interval(time.monotonic()))
        schedule.start(interval, time.monotonic())
        return signal

    def settle(self) -> str | None:
        """Waits for the end of the check, or for a signal in any process, which is returned."""
        while self._check.pending:
            self._check.wait(INTERVAL)
            signal, _ = self._exchange()
            if signal and self._check.pending:
                return signal
        return None

    def _exchange(self, interval: int = 0) -> tuple[str | None, int]:
        """Returns the signal that arrived in any process, and the coordinator's interval; concludes the check."""
        signal, done = self._signals.received, self._check.done
        if jax.process_count() > 1:
            flags = multihost_utils.process_allgather(np.array([signal is not None, done, interval]))
            signal = "a signal" if flags[:, 0].any() else None
            done, interval = bool(flags[0, 1]), int(flags[0, 2])
        if done:
            self._check.conclude()
        return signal, interval

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
