"""A run's command as the callable of a submitit job. It works alone on its workdir and can be asked to save.

This module imports neither NumPy nor JAX: a job only waits for the process of its run, and starts at once.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import filelock

from sparsejax.signals import INTERRUPTED
from sparsejax.workdir import LOCK_TIMEOUT, JobFiles

PREEMPTION = {signal.SIGUSR1, signal.SIGUSR2}  # signals that a cluster sends to the run as well, and that would end it


class _RunEnded(Exception):
    """The run ended by itself when it was asked to save."""


@dataclasses.dataclass
class Job:
    """Runs a command to its end; returns the exit code (negative: a signal), or None if another process works on it."""

    command: list[str]
    files: JobFiles
    result: Path  # the file that the run leaves when it has ended; if it exists, nothing is left to do
    cores: tuple[int, ...] = ()  # that the run may use; empty: all
    environment: dict[str, str | None] = dataclasses.field(default_factory=dict)  # None unsets a variable
    new_session: bool = False  # the terminal's signals do not reach the run

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._code: int | None = None

    def __call__(self) -> int | None:
        self.files.path.parent.mkdir(parents=True, exist_ok=True)
        descriptors: list[int] = []
        try:
            with filelock.FileLock(self.files.lock, timeout=LOCK_TIMEOUT, on_acquired=descriptors.append):
                if self.result.exists():
                    return 0
                self._start(descriptors[-1])
                try:
                    return self._wait()
                finally:
                    self._wait()  # whatever a signal handler raises, the lock is held until the run has ended
                    self.files.lock.write_text("")
        except filelock.Timeout:
            print(f"{self.files.lock} is held: another process works on this run")
            return None
        except _RunEnded:
            return self._code

    def checkpoint(self) -> Any:
        """Asks the run to save and stop; returns what submitit, which calls this in a signal handler, queues again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            if not was_asked(self._wait()):
                raise _RunEnded
        return DelayedSubmission(dataclasses.replace(self))

    def _start(self, lock: int) -> None:
        environment = {name: value for name, value in {**os.environ, **self.environment}.items() if value is not None}
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # the run inherits it, and the blocked signals
        signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION)
        with self.files.log.open("ab") as log:
            # The run holds the lock as well: if this process is killed, the lock is held until the run has ended.
            self._process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=self.new_session,
            )
        threading.Thread(target=self._watch, args=[self._process], daemon=True).start()
        self.files.lock.write_text(f"{self._process.pid} {platform.node()}\n")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PREEMPTION)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        self._code = process.wait()

    def _wait(self) -> int:
        # Popen.wait takes a lock, and `checkpoint` gets here in a signal handler in the middle of `__call__`'s wait.
        while self._code is None:
            time.sleep(0.02)
        return self._code


def was_asked(code: int | None) -> bool:
    """Whether a run with this exit code was asked to stop; before it can save, SIGTERM ends it at once."""
    return code in (INTERRUPTED, -signal.SIGTERM)
