"""The one handler of SIGTERM and SIGINT, for training loops and launchers."""

from __future__ import annotations

import signal
import types
from collections.abc import Callable

INTERRUPTED = 75  # exit code of a process that a signal stopped after it saved its work (EX_TEMPFAIL: try again)


class Interrupted(Exception):
    """A signal stopped the work after it was saved; the same command resumes it."""


class StopSignals:
    """Records a stop signal, so that the work in progress can be saved; use as a context manager.

    Args:
      on_repeat: Called on a second signal; by default, a second signal of the same kind has its default effect.

    Attributes:
      received: The name of the first signal that arrived, or None.
    """

    received: str | None = None

    def __init__(self, on_repeat: Callable[[], None] | None = None):
        self._on_repeat = on_repeat

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        if self.received and self._on_repeat:
            self._on_repeat()
        self.received = self.received or signal.Signals(number).name
        if not self._on_repeat:
            signal.signal(number, signal.SIG_DFL)
