"""A run's command as a job: it is started by submitit, works alone on its workdir, and can be asked to save.

The standard library is all that this file imports: a job waits for a process that has the rest, and starts in no time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INTERRUPTED = 75  # the exit code of a run that was asked to stop and has saved
PATIENCE = 2.0  # seconds; who looks whether a lock is held holds it for an instant


@dataclasses.dataclass
class Job:
    """What runs a command to its end, as submitit's callable, and what others see of it.

    Attributes:
      command: The command line of the run.
      place: Its files: `place`.log, what the run prints; .exit, its exit code; .lock, held while it runs, with its
        process and machine.
      result: The file that a run leaves when it has ended; with it nothing is left to do.
      cores: The cores that it may use; all, if none are named.
      environment: Variables that are set for the run, or taken away (None).
      apart: Whether the run is out of reach of the terminal's signals.
    """

    command: list[str]
    place: Path
    result: Path
    cores: tuple[int, ...] = ()
    environment: dict[str, str | None] = dataclasses.field(default_factory=dict)
    apart: bool = False

    def __post_init__(self):
        self._child: subprocess.Popen | None = None
        self._code: int | None = None

    @property
    def log(self) -> Path:
        """What the run has printed, in all its attempts."""
        return self.place.with_suffix(".log")

    def __call__(self) -> int | None:
        """Runs the command unless it is done, or another process is at it (None); returns the exit code."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with self.place.with_suffix(".lock").open("a+") as lock:
            if not _take(lock.fileno(), PATIENCE):
                print(f"{lock.name} is held: another process is at work on this run")
                return None
            lock.truncate(0)
            if self.result.exists():
                return 0
            self.forget()  # a cluster may have queued it again
            with self.log.open("ab") as log:
                self._start(log.fileno(), lock.fileno())
            lock.write(f"{self._child.pid} {platform.node()}\n")
            lock.flush()
            code = self._wait()
            self._record(code)
            lock.truncate(0)
        return code

    def checkpoint(self) -> Any:
        """Asks the run to save and stop; returns what submitit queues again, or None if there is nothing to go on with.

        Submitit calls this in a signal handler, when the job is about to be preempted or out of time.
        """
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)
            code = self._wait()
            if not was_asked(code):
                self._record(code)
                return None
        return DelayedSubmission(dataclasses.replace(self))

    def held(self) -> bool:
        """Whether a process is at work on this run, the job or what it started."""
        try:
            with self.place.with_suffix(".lock").open("a") as lock:
                return not _take(lock.fileno())
        except FileNotFoundError:
            return False

    def forget(self) -> None:
        """Forgets how the last attempt ended, as another is launched."""
        self.place.with_suffix(".exit").unlink(missing_ok=True)

    def exit_code(self) -> int | None:
        """How the last attempt ended, below 0: by which signal; None if there was none, or nobody saw its end."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(self.place.with_suffix(".exit").read_text())
        return None

    def began(self) -> bool:
        """Whether the run is running, on whatever machine."""
        return self._running() is not None

    def process(self) -> int | None:
        """The id of the run's process while it is running; None if it runs on another machine."""
        process, machine = self._running() or (None, platform.node())
        return process if machine == platform.node() else None

    def _running(self) -> tuple[int, str] | None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            process, machine = self.place.with_suffix(".lock").read_text().split()
            return int(process), machine
        return None

    def last_lines(self, count: int) -> list[str]:
        """The end of the log."""
        return read_tail(self.log)[-count:]

    def _start(self, log: int, lock: int) -> None:
        environment = {k: v for k, v in {**os.environ, **self.environment}.items() if v is not None}
        # The lock goes to the run as well: should this process be killed, it is held until the run has ended.
        self._child = subprocess.Popen(
            self.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            preexec_fn=self._prepare,
            start_new_session=self.apart,
        )
        threading.Thread(target=self._watch, daemon=True).start()

    def _prepare(self) -> None:
        """In the new process: its cores and signals. A cluster sends USR2 to it too, which would end it."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def _watch(self) -> None:
        self._code = self._child.wait()

    def _wait(self) -> int:
        # Without a lock, such as Popen's: `checkpoint` comes here in a signal handler, amid `__call__`'s own wait.
        while self._code is None:
            time.sleep(0.02)
        return self._code

    def _record(self, code: int) -> None:
        part = self.place.with_suffix(".exit.part")
        part.write_text(f"{code}\n")
        os.replace(part, self.place.with_suffix(".exit"))


def was_asked(code: int | None) -> bool:
    """Whether a run ended so because it was asked to; before it can save, SIGTERM ends it at once."""
    return code in (INTERRUPTED, -signal.SIGTERM)


def read_tail(path: Path, size: int = 1 << 14) -> list[str]:
    """The last whole lines of a file that may be growing, as many as so many bytes hold; none if there is no file."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[bool(start) :]


@contextlib.contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Holds the lock of a file, if nobody does; yields whether it is held here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        yield _take(lock.fileno())


def _take(descriptor: int, patience: float = 0.0) -> bool:
    """Whether the lock of an open file could be taken; it is given back as the file is closed by all who have it."""
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
