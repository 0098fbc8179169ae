"""Kills the launcher and the runs of a sweep at random moments, and checks that nothing is lost or repeated.

    python scripts/kill_sweep.py [--runs 8] [--kills 16] [--seed 0] [--jobs 2] [--out FILE.json]

One sweep runs undisturbed. A second sweep of the same runs is disturbed repeatedly: its launcher is killed (SIGKILL),
one of its runs is killed, the process that supervises a run is killed, or the launcher is asked to stop (SIGINT). After
each disturbance the same command, with --retry, must resume the sweep. At no time may two processes work on one
workdir. In the end the metrics and the last checkpoint of every run must be bitwise equal in both sweeps.
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
from pathlib import Path

import jax
from kill_runs import find_differences
from rich.console import Console

from sparsejax.job import Job
from sparsejax.sweep import grid, plan_runs
from sparsejax.sweep.executors import build_job
from sparsejax.workdir import read_json

STEPS, EVERY = 2000, 100
CONFIG = Path(__file__).parents[1] / "configs" / "mqar.py"
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


def main() -> None:
    """Prints a line per disturbance, and writes the record to `--out`; the exit code is 1 if anything is lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=8, help="number of runs; defaults to 8")
    parser.add_argument("--kills", type=int, default=16, help="maximal number of disturbances; defaults to 16")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments; defaults to 0")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs; defaults to 2")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    draw, console, kills = random.Random(options.seed), Console(), []
    with tempfile.TemporaryDirectory(prefix="sparsejax-kills-") as name:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{name}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        whole, killed, log = Path(name, "whole"), Path(name, "killed"), Path(name, "log")
        if start(whole, options.runs, options.jobs, log).wait():
            sys.exit(f"the undisturbed sweep failed:\n{log.read_text()}")
        console.print(f"undisturbed sweep: {options.runs} runs of {STEPS} steps, {options.jobs} at a time")
        runs = plan_runs(str(CONFIG), grid({"train.seed": range(options.runs)}), SETTINGS)
        jobs = [build_job(run, killed) for run in runs]
        with Watch(killed) as watch:
            for number in range(options.kills):
                if all(job.result.exists() for job in jobs):
                    break
                size = log.stat().st_size
                launcher = start(killed, options.runs, options.jobs, log)
                kind = DISTURBANCES[number % len(DISTURBANCES)]
                aims_at_runs = number == 0 or kind in ("kill a run", "kill the job of a run")
                while aims_at_runs and launcher.poll() is None and not find_running(jobs):
                    time.sleep(0.1)
                while kind == "ask the launcher to stop" and launcher.poll() is None and log.stat().st_size == size:
                    time.sleep(0.1)  # during imports, Ctrl-C may be swallowed
                time.sleep(draw.uniform(0, 6))
                kills.append(disturb(kind, launcher, jobs, draw))
                console.print(str(kills[-1]), highlight=False, soft_wrap=True)
                if launcher.poll() is None:  # two launchers cannot run at once
                    time.sleep(draw.uniform(0, 2))
                    launcher.kill()
                launcher.wait()
            code = start(killed, options.runs, options.jobs, log).wait()
        pairs = [[run.workdir(folder) for folder in (killed, whole)] for run in runs]
        changes = {run.name: find_differences(*pair) for run, pair in zip(runs, pairs, strict=True)}
        changes = {name: change for name, change in changes.items() if change}
        starts = [len(read_json(run.workdir(killed).versions)) for run in runs]
    console.print(f"last exit code {code}; starts per run {starts}; clashes on a workdir: {watch.clashes}")
    console.print(f"differences: {changes or 'none'}")
    if options.out:
        about = {"python": sys.version.split()[0], "jax": jax.__version__, "seed": options.seed, "jobs": options.jobs}
        about |= {"runs": options.runs, "steps": STEPS, "save every": EVERY, "disturbances": kills}
        ends = {"last exit code": code, "starts per run": starts, "samples": watch.samples}
        record = about | ends | {"clashes on a workdir": watch.clashes, "differences": changes}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(code or changes or watch.clashes))


if __name__ == "__main__":
    main()
