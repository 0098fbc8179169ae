"""The one handler of SIGTERM and SIGINT, for training loops and launchers."""

from __future__ import annotations

import signal
import types

INTERRUPTED = 75  # exit code of a process that was asked to stop and has saved (EX_TEMPFAIL: try again)


class StopSignals:
    """Records a stop signal, so that the work in progress can be saved; use as a context manager.

    A second signal of the same kind has its default effect.

    Attributes:
      received: The name of the first signal that arrived, or None.
    """

    received: str | None = None

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
