"""The one handler of SIGTERM and SIGINT, for training loops and launchers."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

INTERRUPTED = 75  # exit code of a process that a signal stopped after it saved its work (EX_TEMPFAIL: try again)
LOSS_DIVERGED = 3  # exit code of a process whose training stopped after saving, or ended without a finite evaluation
LEAVE_TIMEOUT = 1.0  # seconds that an abandoned thread has to notice that it was abandoned

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        self._on_repeat, self._raises = on_repeat, False

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raising(self, work: str) -> Iterator[None]:
        """Interrupts the block, which has nothing to save, as soon as a signal arrives.

        The block is left by KeyboardInterrupt, after which every library cleans up.

        Args:
          work: Description of the block, such as "while reading the data".

        Raises:
          Interrupted: A signal arrived.
        """
        self._raises = True
        try:
            yield
        except BaseException:  # a library may have turned the KeyboardInterrupt into an error of its own
            if self.received is None:
                raise
        finally:
            self._raises = False
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received} {work}; run the same command to resume")

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        if self.received and self._on_repeat:
            self._on_repeat()
        self.received = self.received or signal.Signals(number).name
        if not self._on_repeat:
            signal.signal(number, signal.SIG_DFL)
        if self._raises:
            raise KeyboardInterrupt


def call_interruptibly(function: Callable[[Iterable[Item]], Result], items: Iterable[Item]) -> Result:
    """Returns `function(items)`, called in a thread, so that a signal handler can end the wait for native code.

    Python runs signal handlers in the main thread only, and not while that is in native code. If a handler raises, the
    thread is abandoned, and its next item raises KeyboardInterrupt.
    """
    result: list[Result] = []
    errors: list[BaseException] = []
    done, abandoned = threading.Event(), threading.Event()

    def iterate() -> Iterator[Item]:
        for item in items:
            if abandoned.is_set():
                raise KeyboardInterrupt
            yield item

    def call() -> None:
        try:
            result.append(function(iterate()))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=call, daemon=True).start()
    try:
        done.wait()  # not `Thread.join`, which takes the thread for ended when a handler raises
    except BaseException:
        abandoned.set()
        done.wait(LEAVE_TIMEOUT)  # a thread in native code that returns while Python exits aborts the process
        raise
    if errors:
        raise errors[0]
    return result[0]
