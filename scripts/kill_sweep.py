"""Kills a sweep's launcher and runs at random moments, and checks that nothing was lost and nothing done twice.

    python scripts/kill_sweep.py [--runs 8] [--kills 16] [--seed 0] [--jobs 2] [--out FILE.json]

One sweep goes through undisturbed. Another, of the same runs, is disturbed again and again: its launcher is killed
(SIGKILL), one of its runs is killed, the process that waits for a run is killed, or the launcher is asked to stop
(SIGINT). After each the same command, with --retry, has to go on. All the while no two processes may be at work on one
workdir. In the end every run has the same metrics and the same last checkpoint in both sweeps, to the bit.
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
from kill_runs import differences
from rich.console import Console

from sparsejax.job import Job
from sparsejax.sweep import grid, plan_runs
from sparsejax.sweep.engines import build_job

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
    """Looks all the while at which processes train, and counts those that are not alone on their workdir."""

    def __init__(self, folder: Path):
        self._folder, self.looks, self.clashes, self._over = str(folder), 0, 0, False
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over = True
        self._thread.join()

    def _look(self) -> None:
        while not self._over:
            ours = {one: two for one, two in list_processes().items() if f"--workdir={self._folder}/runs/" in two[1]}
            # A run that starts another program, such as git, is for a moment there twice: itself and its copy.
            found = collections.Counter(line for parent, line in ours.values() if ours.get(parent, (0, ""))[1] != line)
            self.clashes += sum(count > 1 for count in found.values())
            self.looks += 1
            time.sleep(0.2)


def list_processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process that trains; one that has ended has no command line."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "train" in words[:4]:
                found[int(place.name)] = parent_of(int(place.name)), " ".join(words)
        except OSError:  # it has just ended
            continue
    return found


def start(folder: Path, count: int, jobs: int, log: Path) -> subprocess.Popen:
    """Starts the launcher; what it prints is added to `log`."""
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    places = [f"--config={CONFIG}", f"--sweep=seed=range({count})", f"--workdir={folder}", f"--jobs={jobs}", "--retry"]
    with log.open("a") as file:
        command = [sys.executable, "-m", "sparsejax", "sweep", *places, *settings]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def parent_of(process: int) -> int:
    """The process that started another one."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def find_running(jobs: list[Job]) -> list[Job]:
    """Those whose run is running; a job that was killed leaves the id of its process behind."""
    return [job for job in jobs if job.held() and job.process() is not None]


def disturb(what: str, launcher: subprocess.Popen, jobs: list[Job], draw: random.Random) -> dict:
    """Does one thing to a sweep that is under way; returns what was done and how the launcher ended."""
    running = find_running(jobs)
    found = {"what": what, "done before": sum(job.result.exists() for job in jobs), "running": len(running)}
    if what == "kill the launcher":
        launcher.kill()
    elif what == "ask the launcher to stop":
        launcher.send_signal(signal.SIGINT)
    elif running:
        process = draw.choice(running).process()
        if process is not None:
            os.kill(process if what == "kill a run" else parent_of(process), signal.SIGKILL)
        if draw.random() < 0.5:  # the launcher may see it, or be killed as well
            time.sleep(draw.uniform(0, 1))
            launcher.kill()
    if what == "ask the launcher to stop":
        found["exit code"] = launcher.wait()
    return found


def main() -> None:
    """Prints one line for each disturbance; with --out also writes the record. Exits with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"runs": 8, "kills": 16, "seed": 0, "jobs": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
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
        jobs, expected = ([build_job(run, folder) for run in runs] for folder in (killed, whole))
        with Watch(killed) as watch:
            for number in range(options.kills):
                if all(job.result.exists() for job in jobs):
                    break
                said = log.stat().st_size
                launcher = start(killed, options.runs, options.jobs, log)
                what = DISTURBANCES[number % len(DISTURBANCES)]
                aims_at_runs = number == 0 or what in ("kill a run", "kill the job of a run")
                while aims_at_runs and launcher.poll() is None and not find_running(jobs):
                    time.sleep(0.1)
                while what == "ask the launcher to stop" and launcher.poll() is None and log.stat().st_size == said:
                    time.sleep(0.1)  # who presses Ctrl-C while Python still imports is at the mercy of what it imports
                time.sleep(draw.uniform(0, 6))
                kills.append(disturb(what, launcher, jobs, draw))
                console.print(str(kills[-1]), highlight=False, soft_wrap=True)
                if launcher.poll() is None:  # it goes on; two launchers cannot, so this one is killed for the next
                    time.sleep(draw.uniform(0, 2))
                    launcher.kill()
                launcher.wait()
            code = start(killed, options.runs, options.jobs, log).wait()
        workdirs = [[job.result.parent for job in pair] for pair in zip(jobs, expected, strict=True)]
        found = {run.name: differences(*pair) for run, pair in zip(runs, workdirs, strict=True)}
        found = {name: what for name, what in found.items() if what}
        starts = [len(json.loads((job.result.parent / "versions.json").read_text())) for job in jobs]
    console.print(f"last exit code {code}; starts of each run {starts}; two at work on one workdir: {watch.clashes}")
    console.print(f"differences: {found or 'none'}")
    if options.out:
        about = {"python": sys.version.split()[0], "jax": jax.__version__, "seed": options.seed, "jobs": options.jobs}
        about |= {"runs": options.runs, "steps": STEPS, "save every": EVERY, "disturbances": kills}
        ends = {"last exit code": code, "starts of each run": starts, "looks": watch.looks}
        record = about | ends | {"two at work on one workdir": watch.clashes, "differences": found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(code or found or watch.clashes))


if __name__ == "__main__":
    main()
