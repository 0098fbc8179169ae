"""Cases that run in another process, with limits on time and memory.

A fuzzer is a function of one case, a JSON value, which raises an exception if the case fails. A nightly run appends the
cases that fail to `cases/NAME.json`, and the default tier runs these cases again. The seed of a night is random and
printed. The environment variables SPARSEJAX_FUZZ_SEED, SPARSEJAX_FUZZ_COUNT and SPARSEJAX_FUZZ_SECONDS repeat and
shorten a run.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import resource
import selectors
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CASES = Path(__file__).parent / "cases"
ROOT = Path(__file__).parents[2]
SECONDS = 10  # of CPU time per case, which does not depend on other processes
PATIENCE = 300  # seconds without an answer, even if the process sleeps
MEMORY = 12 * 2**30  # bytes of address space, of which the libraries take a few GiB
MAX_FAILURES = 20  # after which a nightly run stops


class Worker:
    """A process that runs the cases of a fuzzer one by one. It is started again after a case that ends it."""

    def __init__(self, fuzzer: str):
        self._fuzzer = fuzzer  # "MODULE:FUNCTION"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, case: Any) -> str | None:
        """Runs a case. Returns how it failed, or None."""
        process = self._start() if self._process is None else self._process
        assert process.stdin is not None
        process.stdin.write(json.dumps(case).encode() + b"\n")
        process.stdin.flush()
        answer = self._read(process, _cpu_seconds(process) + SECONDS)
        if answer is None:
            self.close()
            return f"no answer after {SECONDS} s of CPU time"
        if not answer:
            self.close()
            return "the process died"
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.fuzz.worker", self._fuzzer]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT
        )
        if not self._read(self._process, PATIENCE):
            self.close()
            raise RuntimeError(f"{self._fuzzer} does not start")
        return self._process

    def _read(self, process: subprocess.Popen[bytes], limit: float) -> bytes | None:
        """A line of the process; empty if it has died, None if its CPU time exceeds the limit."""
        assert process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(0.5):
                if _cpu_seconds(process) > limit or time.monotonic() > deadline:
                    return None
        return process.stdout.readline()


def _cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """CPU time of a process in seconds; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in user mode and in the kernel


def run_nightly(name: str, fuzzer: str, generate: Callable[[random.Random], Any], count: int) -> None:
    """Runs generated cases and stores those that fail.

    Args:
      name: Name of the file of stored cases.
      fuzzer: "MODULE:FUNCTION" of the check of a case.
      generate: Makes a case.
      count: Number of cases, unless an environment variable limits it.
    """
    seed = int(os.environ.get("SPARSEJAX_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    count = int(os.environ.get("SPARSEJAX_FUZZ_COUNT") or count)
    print(f"{name}: seed {seed}, {count} cases")
    rng, done = random.Random(seed), itertools.count()
    deadline = time.monotonic() + float(os.environ.get("SPARSEJAX_FUZZ_SECONDS") or "inf")
    cases = itertools.takewhile(lambda _: time.monotonic() < deadline, (generate(rng) for _ in range(count)))
    failures = run_cases(fuzzer, (case for case in cases if next(done) >= 0))
    print(f"{name}: {next(done)} cases run, {len(failures)} failed")
    if failures:
        stored = read_cases(name)
        write_cases(name, stored + [case for case, _ in failures if case not in stored])
    problems = "\n".join(f"{json.dumps(case)}\n{problem}" for case, problem in failures)
    assert not failures, f"seed {seed}: {len(failures)} cases failed, now in {CASES / name}.json:\n{problems}"


def run_cases(fuzzer: str, cases: Iterable[Any]) -> list[tuple[Any, str]]:
    """Runs cases until `MAX_FAILURES` have failed. Returns those that failed, with their problems."""
    worker, failures = Worker(fuzzer), []
    try:
        for case in cases:
            if (problem := worker.run(case)) is not None:
                failures.append((case, problem))
            if len(failures) == MAX_FAILURES:
                break
    finally:
        worker.close()
    return failures


def read_cases(name: str) -> list[Any]:
    """The stored cases of a fuzzer."""
    path = CASES / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_cases(name: str, cases: list[Any]) -> None:
    """Writes the cases of a fuzzer, one per line."""
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
    (CASES / f"{name}.json").write_text(f"[\n{lines}\n]\n")


def _serve(fuzzer: str) -> None:
    """Answers each case on stdin with a line on stdout: null, or the traceback of a failure."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a case prints is no answer
    module, _, name = fuzzer.partition(":")
    run = getattr(importlib.import_module(module), name)
    answers.write(b"ready\n")
    for line in sys.stdin.buffer:
        problem = None
        try:
            run(json.loads(line))
        except BaseException:
            problem = traceback.format_exc()[-3000:]
        answers.write(json.dumps(problem).encode() + b"\n")


if __name__ == "__main__":
    _serve(sys.argv[1])
