"""How much time does a sweep of tiny runs, one at a time, add to the same command lines in sequence?

Half of the command lines run before the sweep and half after it, so that a linear drift of the machine's load cancels.
The overhead per run is the difference of the total times, divided by the number of runs. To break it down, the
benchmark also launches commands that do nothing (`true`) as runs, and times the imports of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT, Save, alternate, timed
from sparsejax.sweep import Run, grid, plan_runs

CONFIG = ROOT / "configs" / "mqar.py"
SETTINGS = {"train.steps": 2, "train.batch": 2, "model.schedule": "full", "checkpoint.every": 2, "eval.every": 2}
IMPORTS = {
    "python": "pass",
    "python and the imports of submitit's controller": "import submitit.local.local",
    "python and the imports of submitit's job": "import submitit.core._submit, submitit.core.submission, sparsejax.job",
    "python and the imports of the launcher": "import sparsejax.cli",
}
REPETITIONS = 5


def execute(command: Sequence[str]) -> None:
    """Runs a command; exits with its output if it fails."""
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{process.stdout}{process.stderr}")


def launch_empty(count: int, folder: Path) -> float:
    """Launches commands that do nothing as runs, one at a time; returns seconds per command."""
    from sparsejax.sweep.executors import Attempt, Local, build_job

    class EmptyRun(Run):
        def command(self, folder: Path) -> list[str]:
            return ["true"]

    executor = Local(folder, 1)

    def launch_all():
        for seed in range(count):
            empty = EmptyRun(str(CONFIG), (("train.seed", seed),), "empty")
            attempt = Attempt(empty, build_job(empty, folder))
            executor.launch([attempt], [])
            while not executor.ended(attempt):
                time.sleep(executor.poll_interval)

    return timed(launch_all) / count


def measure(count: int, folder: Path) -> dict[str, object]:
    """Measures a sweep of `count` runs; returns times in seconds."""
    runs = plan_runs(str(CONFIG), grid({"train.seed": range(count)}), SETTINGS)
    commands = [planned.command(folder / "serial") for planned in runs]
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    options = [f"--config={CONFIG}", f"--sweep=seed=range({count})", f"--workdir={folder / 'sweep'}", "--jobs=1"]
    sweep = [sys.executable, "-m", "sparsejax", "sweep", *options, *settings]
    warm_up = plan_runs(str(CONFIG), [{"train.seed": count}], SETTINGS)[0]
    execute(warm_up.command(folder / "warm"))  # fills the compilation cache
    half = count // 2
    serial = [timed(lambda command=command: execute(command)) for command in commands[:half]]
    whole = timed(lambda: execute(sweep))
    serial += [timed(lambda command=command: execute(command)) for command in commands[half:]]
    commands = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    starts = {name: lambda command=command: timed(lambda: execute(command)) for name, command in commands.items()}
    imports = {name: row["seconds"] for name, row in alternate(starts, REPETITIONS).items()}
    return {
        "runs": count,
        "sweep": whole,
        "sequential runs": sum(serial),
        "overhead per run": (whole - sum(serial)) / count,
        "launch of a command that does nothing": launch_empty(count, folder / "empty"),
        "imports": imports,
        "each sequential run": serial,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--runs", type=int, default=30, help="number of runs; defaults to 30")


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures a sweep with an empty compilation cache."""
    with tempfile.TemporaryDirectory(prefix="sparsejax-sweep-") as name:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{name}/compiled", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        os.environ |= cache
        measured = measure(2 if options.quick else options.runs, Path(name))
    print(json.dumps(measured, indent=1))
    save(measured)
