"""A process that has imported the package and forks a process per command, which saves the seconds of the imports.

The commands of `sparsejax` read the variables of `faults.c`, which fails their system calls or kills them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.devices import simulate

SOURCE = Path(__file__).with_name("faults.c")
MODULES = ("train", "report", "data_show")  # verbs that are imported before the first fork


class Ended(NamedTuple):
    """How a command ended."""

    code: int  # negative for a signal
    output: str
    errors: str  # stderr
    seconds: float


def compile_faults(folder: Path) -> Path:
    """Compiles `faults.c`; raises OSError if there is no compiler."""
    library, compiler = folder / "faults.so", shutil.which("cc")
    if compiler is None:
        raise OSError("no C compiler")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


class Server:
    """The process; a context manager."""

    def __init__(self, folder: Path, library: Path):
        self._folder, self._library = folder, library

    def __enter__(self) -> Server:
        variables = simulate(1) | {
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "NPROC": "2",  # sums are split by the number of threads
            "LD_PRELOAD": str(self._library),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.server"],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(self, *command: str, timeout: int = 300, **faults: object) -> Ended:
        """Runs a command of `sparsejax` with the variables of `faults.c` in lower case, without their prefix."""
        variables = {f"FAULT_{name.upper()}": str(value) for name, value in faults.items()}
        files = [str(self._folder / name) for name in ("stdout", "stderr")]
        request = {"command": command, "variables": variables, "files": files, "timeout": timeout}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        output, errors = (Path(file).read_text(errors="replace") for file in files)
        return Ended(answer["code"], output, errors, answer["seconds"])


def serve() -> None:
    """Reads a command per line, and answers with its end, until stdin is closed."""
    for name in MODULES:
        importlib.import_module(f"sparsejax.cli.{name}")
    for line in sys.stdin:
        request = json.loads(line)
        start = time.monotonic()
        process = os.fork()
        if not process:
            _become(request["command"], request["variables"], request["files"])
        code = _wait(process, request["timeout"])
        print(json.dumps({"code": code, "seconds": round(time.monotonic() - start, 2)}), flush=True)


def _become(command: Sequence[str], variables: Mapping[str, str], files: Sequence[str]) -> None:
    """Runs a command, and ends as the interpreter does."""
    import faulthandler

    from sparsejax.cli import main

    for target, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= variables
    faulthandler.enable()  # `_wait` aborts a process that hangs
    ctypes.CDLL(None).faults_configure()
    sys.exit(main(command))


def _wait(process: int, timeout: float) -> int:
    """Returns the exit code of a process, which is killed after `timeout` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGABRT)
        time.sleep(1)
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -int(signal.SIGALRM)


if __name__ == "__main__":
    serve()
