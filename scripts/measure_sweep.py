"""Measures the overhead of a sweep of 30 tiny runs, one at a time, over the same command lines in sequence.

    python scripts/measure_sweep.py [--runs 30] [--out FILE.json]

Half of the command lines run before the sweep and half after it, so that a drift of the machine's load cancels. The
difference is divided by the number of runs. Commands that do nothing (`true`), launched in the same way, and the
imports of each process show its parts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from sparsejax.sweep import Run, grid, plan_runs

CONFIG = Path(__file__).parents[1] / "configs" / "mqar.py"
SETTINGS = {"train.steps": 2, "train.batch": 2, "model.schedule": "full", "checkpoint.every": 2, "eval.every": 2}
IMPORTS = {
    "python": "pass",
    "python, what submitit's controller imports": "import submitit.local.local",
    "python, what submitit's job imports": "import submitit.core._submit, submitit.core.submission, sparsejax.job",
    "python, what the launcher imports": "import sparsejax.cli",
}
REPEATS = 5


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(command: Sequence[str]) -> None:
    """Runs a command to its end; exits with its output if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def launch_nothing(count: int, folder: Path) -> float:
    """Seconds per command that does nothing, launched as runs are."""
    from sparsejax.sweep.executors import Attempt, Local, build_job

    class Nothing(Run):
        def command(self, folder: Path) -> list[str]:
            return ["true"]

    executor = Local(folder, 1)

    def launch_all():
        for seed in range(count):
            nothing = Nothing(str(CONFIG), (("train.seed", seed),), "nothing")
            attempt = Attempt(nothing, build_job(nothing, folder))
            executor.launch([attempt], [])
            while not executor.ended(attempt):
                time.sleep(executor.poll_interval)

    return timed(launch_all) / count


def measure(count: int, folder: Path) -> dict[str, object]:
    """All times in seconds."""
    runs = plan_runs(str(CONFIG), grid({"train.seed": range(count)}), SETTINGS)
    commands = [planned.command(folder / "serial") for planned in runs]
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    options = [f"--config={CONFIG}", f"--sweep=seed=range({count})", f"--workdir={folder / 'sweep'}", "--jobs=1"]
    sweep = [sys.executable, "-m", "sparsejax", "sweep", *options, *settings]
    warm_up = plan_runs(str(CONFIG), [{"train.seed": count}], SETTINGS)[0]
    run(warm_up.command(folder / "warm"))  # fills the compilation cache
    half = count // 2
    serial = [timed(lambda command=command: run(command)) for command in commands[:half]]
    whole = timed(lambda: run(sweep))
    serial += [timed(lambda command=command: run(command)) for command in commands[half:]]
    imports = {
        name: statistics.median(timed(lambda code=code: run([sys.executable, "-c", code])) for _ in range(REPEATS))
        for name, code in IMPORTS.items()
    }
    return {
        "runs": count,
        "sweep": whole,
        "sequential runs": sum(serial),
        "overhead per run": (whole - sum(serial)) / count,
        "a command that does nothing, launched": launch_nothing(count, folder / "nothing"),
        "imports": imports,
        "each sequential run": serial,
    }


def main() -> None:
    """Prints the measurement and writes it to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sparsejax-sweep-") as name:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{name}/compiled", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        os.environ |= cache
        load = os.getloadavg()[0]
        measured = measure(options.runs, Path(name))
    about = {"python": sys.version.split()[0], "jax": jax.__version__, "cores": os.cpu_count(), "load before": load}
    text = json.dumps(about | measured, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
