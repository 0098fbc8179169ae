"""Kills the launcher and the runs of a sweep at random moments, and checks that nothing is lost or repeated.

    python -m tests.stress.kill_sweep [--runs=8] [--kills=16] [--seed=0] [--jobs=2] [--out=FILE.json]

One sweep runs undisturbed. A second sweep of the same runs is disturbed repeatedly: its launcher is killed (SIGKILL),
one of its runs is killed, the process that supervises a run is killed, or the launcher is asked to stop (SIGINT). After
each disturbance the same command, with --retry, must resume the sweep. At no time may two processes work on one
workdir. In the end the metrics and the last checkpoint of every run must be bitwise equal in both sweeps. The exit code
is 1 if anything is lost, repeated or different.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import ROOT, describe_machine
from sparsejax.job import Job
from sparsejax.sweep import grid, plan_runs
from sparsejax.sweep.executors import build_job
from sparsejax.workdir import read_json
from tests.stress.kill_runs import find_differences

STEPS, EVERY = 2000, 100
CONFIG = ROOT / "configs" / "mqar.py"
SETTINGS = {
    "train.steps": STEPS,
    "train.batch": 4,
    "train.log_every": 1,
    "model.schedule": "full",
    "checkpoint.every": EVERY,
    "eval.every": STEPS,
}
DISTURBANCES = ("kill the launcher", "kill a run", "kill the job of a run", "ask the launcher to stop")


class Watch:
    """Samples the training processes, and counts those that share a workdir with another process."""

    def __init__(self, folder: Path):
        self._folder, self.samples, self.clashes, self._stopped = str(folder), 0, 0, False
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped = True
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped:
            ours = {pid: info for pid, info in list_processes().items() if f"--workdir={self._folder}/runs/" in info[1]}
            # A run that starts another program, such as git, exists twice for a moment.
            counts = collections.Counter(line for parent, line in ours.values() if ours.get(parent, (0, ""))[1] != line)
            self.clashes += sum(count > 1 for count in counts.values())
            self.samples += 1
            time.sleep(0.2)


def list_processes() -> dict[int, tuple[int, str]]:
    """Returns parent and command line of every training process by process id."""
    processes = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "train" in words[:4]:
                processes[int(entry.name)] = parent_of(int(entry.name)), " ".join(words)
        except OSError:  # the process has just ended
            continue
    return processes


def start(folder: Path, count: int, jobs: int, log: Path) -> subprocess.Popen:
    """Starts the launcher; appends its output to `log`."""
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    options = [f"--config={CONFIG}", f"--sweep=seed=range({count})", f"--workdir={folder}", f"--jobs={jobs}", "--retry"]
    with log.open("a") as file:
        command = [sys.executable, "-m", "sparsejax", "sweep", *options, *settings]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def parent_of(process: int) -> int:
    """Returns the id of the parent of a process."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def find_running(jobs: list[Job]) -> list[Job]:
    """Returns the jobs whose run is running."""
    return [job for job in jobs if job.files.process() is not None]


def disturb(kind: str, launcher: subprocess.Popen, jobs: list[Job], draw: random.Random) -> dict:
    """Disturbs a running sweep; returns a record of it."""
    running = find_running(jobs)
    record = {"kind": kind, "done before": sum(job.result.exists() for job in jobs), "running": len(running)}
    if kind == "kill the launcher":
        launcher.kill()
    elif kind == "ask the launcher to stop":
        launcher.send_signal(signal.SIGINT)
    elif running:
        process = draw.choice(running).files.process()
        if process is not None:
            os.kill(process[0] if kind == "kill a run" else parent_of(process[0]), signal.SIGKILL)
        if draw.random() < 0.5:  # the launcher is killed too, before or after it observes the end of the run
            time.sleep(draw.uniform(0, 1))
            launcher.kill()
    if kind == "ask the launcher to stop":
        record["exit code"] = launcher.wait()
    return record


def measure(count: int, kills: int, seed: int, jobs_at_once: int, folder: Path) -> dict:
    """Trains an undisturbed sweep and a sweep that is disturbed; returns the record, and prints each disturbance."""
    draw, records = random.Random(seed), []
    whole, killed, log = folder / "whole", folder / "killed", folder / "log"
    if start(whole, count, jobs_at_once, log).wait():
        raise SystemExit(f"the undisturbed sweep failed:\n{log.read_text()}")
    print(f"undisturbed sweep: {count} runs of {STEPS} steps, {jobs_at_once} at a time", flush=True)
    runs = plan_runs(str(CONFIG), grid({"train.seed": range(count)}), SETTINGS)
    jobs = [build_job(run, killed) for run in runs]
    with Watch(killed) as watch:
        for number in range(kills):
            if all(job.result.exists() for job in jobs):
                break
            size = log.stat().st_size
            launcher = start(killed, count, jobs_at_once, log)
            kind = DISTURBANCES[number % len(DISTURBANCES)]
            wait_for_moment(kind, number, launcher, jobs, lambda size=size: log.stat().st_size > size)
            time.sleep(draw.uniform(0, 6))
            records.append(disturb(kind, launcher, jobs, draw))
            print(records[-1], flush=True)
            if launcher.poll() is None:  # two launchers cannot run at once
                time.sleep(draw.uniform(0, 2))
                launcher.kill()
            launcher.wait()
        code = start(killed, count, jobs_at_once, log).wait()
    if code:
        print(log.read_text(), flush=True)
    pairs = [[run.workdir(path) for path in (killed, whole)] for run in runs]
    differences = {run.name: find_differences(*pair) for run, pair in zip(runs, pairs, strict=True)}
    return {
        "seed": seed,
        "jobs": jobs_at_once,
        "runs": count,
        "steps": STEPS,
        "save every": EVERY,
        "disturbances": records,
        "last exit code": code,
        "starts per run": [len(read_json(run.workdir(killed).versions)) for run in runs],
        "samples": watch.samples,
        "clashes on a workdir": watch.clashes,
        "differences": {name: change for name, change in differences.items() if change},
    }


def wait_for_moment(
    kind: str, number: int, launcher: subprocess.Popen, jobs: list[Job], has_printed: Callable[[], bool]
) -> None:
    """Returns when a disturbance can take effect, or when the launcher has ended."""
    aims_at_runs = number == 0 or kind in ("kill a run", "kill the job of a run")
    while aims_at_runs and launcher.poll() is None and not find_running(jobs):
        time.sleep(0.1)
    while kind == "ask the launcher to stop" and launcher.poll() is None and not has_printed():
        time.sleep(0.1)  # during imports, Ctrl-C may be swallowed


def is_intact(record: dict) -> bool:
    """Whether nothing was lost, repeated or changed."""
    return not (record["last exit code"] or record["differences"] or record["clashes on a workdir"])


def main() -> int:
    """Measures, and writes the record to `--out`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=8, help="number of runs; defaults to 8")
    parser.add_argument("--kills", type=int, default=16, help="maximal number of disturbances; defaults to 16")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments; defaults to 0")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs; defaults to 2")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    facts = describe_machine()
    with tempfile.TemporaryDirectory(prefix="sparsejax-kills-") as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        record = facts | measure(options.runs, options.kills, options.seed, options.jobs, Path(folder))
    for name in ("last exit code", "starts per run", "clashes on a workdir", "differences"):
        print(f"{name}: {record[name]}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(not is_intact(record))


if __name__ == "__main__":
    sys.exit(main())
