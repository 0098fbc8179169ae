"""Kills a training run at random moments, also during saves, and checks that nothing is lost.

    python -m tests.stress.kill_runs [--kills=10] [--seed=0] [--out=FILE.json]

One run is undisturbed. Another run of the same config is killed (SIGKILL) repeatedly: during start-up, at random
moments, or during a save. After each kill the same command must resume from a checkpoint at least as new as the newest
complete checkpoint before the kill. In the end the parameters, optimizer states, data iterators and metrics of both
runs must be bitwise equal. The exit code is 1 if anything is lost or differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import describe_machine
from sparsejax.runs import list_steps, read_arrays, read_iterator
from sparsejax.workdir import Workdir, read_rows

STEPS, EVERY = 600, 10
CONFIG = "preset:quickstart"
SETTINGS = {
    "train.steps": STEPS,
    "train.batch": 2,
    "train.log_every": 1,
    "train.check": False,
    "data.length": 64,
    "model.schedule": "ssm local full",
    "checkpoint.every": EVERY,
    "checkpoint.keep_best": 0,
    "eval.every": STEPS,
    "eval.batch": 256,
    "eval.sample": 0,
}
MOMENTS = ("start", "any", "save")
START_TIME = 5.0  # seconds, approximately


def start(workdir: Path, compiled: Path) -> subprocess.Popen:
    """Starts or resumes the run; writes its output to `workdir`.log."""
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    command = [sys.executable, "-m", "sparsejax", "train", f"--config={CONFIG}", f"--workdir={workdir}", *settings]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with workdir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, env=os.environ | cache, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Waits for the end of a run; exits with its output if it failed."""
    if process.wait():
        sys.exit(f"the run in {workdir} failed:\n{workdir.with_suffix('.log').read_text()}")


def last_step(workdir: Path) -> int:
    """Returns the last step in the metrics; 0 if there is none."""
    return max((row["step"] for row in read_rows(Workdir(workdir).metrics)), default=0)


def is_saving(workdir: Path) -> bool:
    """Whether a save is in progress, or was in progress when the run was killed."""
    return any("tmp" in path.name for path in Workdir(workdir).checkpoints.glob("*"))


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Returns as soon as the condition holds or the run has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def wait_for_moment(process: subprocess.Popen, workdir: Path, moment: str, draw: random.Random) -> None:
    """Returns at a random moment: during start-up, at any time or during a save."""
    if moment == "start":
        time.sleep(draw.uniform(0, START_TIME))
        return
    before = last_step(workdir)
    wait_for(process, lambda: last_step(workdir) > before)  # past the first compilation
    time.sleep(draw.uniform(0, 1.5))
    if moment == "save":
        wait_for(process, lambda: not is_saving(workdir))
        wait_for(process, lambda: is_saving(workdir))
        time.sleep(draw.uniform(0, 0.05))


def kill_once(workdir: Path, compiled: Path, draw: random.Random) -> dict:
    """Starts the run and kills it; returns a record of the kill."""
    moment = draw.choice(MOMENTS)
    process = start(workdir, compiled)
    wait_for_moment(process, workdir, moment, draw)
    complete = list_steps(Workdir(workdir).checkpoints)
    process.kill()
    if process.wait() == 0:
        sys.exit("the run ended before it could be killed: raise STEPS")
    return {
        "moment": moment,
        "during a save": is_saving(workdir),
        "resumed at": resumed_at(workdir),
        "complete before the kill": max(complete, default=0),
        "complete after it": max(list_steps(Workdir(workdir).checkpoints), default=0),
        "logged": last_step(workdir),
    }


def resumed_at(workdir: Path) -> int | None:
    """Returns the step from which the run resumed; None if it was killed before that."""
    match = re.search(r"^resuming .* at step (\d+)$", workdir.with_suffix(".log").read_text(), re.MULTILINE)
    return int(match[1]) if match else None


def find_differences(first: Workdir, second: Workdir) -> list[str]:
    """Returns the arrays and files in which two finished runs differ."""
    step = max(list_steps(first.checkpoints))
    states = [read_arrays(workdir.checkpoints, step) for workdir in (first, second)]
    different = [path for path in states[0].keys() | states[1].keys() if not _same_bits(path, *states)]
    if read_iterator(first.checkpoints, step) != read_iterator(second.checkpoints, step):
        different.append("data iterator")
    for name in ("metrics", "metrics_table", "config", "schedule", "result"):
        paths = [getattr(workdir, name) for workdir in (first, second)]
        if paths[0].read_bytes() != paths[1].read_bytes():
            different.append(paths[0].name)
    return different


def _same_bits(path: str, first: dict, second: dict) -> bool:
    return path in first and path in second and first[path].tobytes() == second[path].tobytes()


def measure(kills: int, seed: int, folder: Path) -> dict:
    """Trains an undisturbed run and a run that is killed; returns the record, and prints a line per kill."""
    draw, records, newest = random.Random(seed), [], 0
    whole, killed, compiled = folder / "whole", folder / "killed", folder / "compiled"
    finish(start(whole, compiled), whole)
    print(f"undisturbed run: {STEPS} steps, a save every {EVERY}", flush=True)
    for _ in range(kills):
        kill = kill_once(killed, compiled, draw)
        kill["lost"] = kill["resumed at"] is not None and kill["resumed at"] < newest
        newest = max(newest, kill["complete before the kill"])
        kill["lost"] |= kill["complete after it"] < newest
        records.append(kill)
        print(f"{len(records)}/{kills}", *(f"{key}: {value}" for key, value in kill.items()), sep=", ", flush=True)
    finish(start(killed, compiled), killed)
    differences = find_differences(Workdir(whole), Workdir(killed))
    lost = sum(kill["lost"] for kill in records)
    sizes = {"seed": seed, "steps": STEPS, "save every": EVERY}
    return sizes | {"kills": records, "lost": lost, "differences": differences}


def main() -> int:
    """Measures, and writes the record to `--out`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="number of kills; defaults to 10")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments; defaults to 0")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    facts = describe_machine()
    with tempfile.TemporaryDirectory(prefix="sparsejax-kills-") as folder:
        record = facts | measure(options.kills, options.seed, Path(folder))
    during = sum(kill["during a save"] for kill in record["kills"])
    print(f"{during} kills during a save; {record['lost']} lost; differences: {record['differences'] or 'none'}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(record["lost"] or record["differences"]))


if __name__ == "__main__":
    sys.exit(main())
