"""Kills training runs at system calls, or fails these, and checks that nothing is lost.

    python -m tests.stress.faulty_runs [--kills=50] [--faults=50] [--seed=0] [--out=FILE.json]

A run is killed, or one of its system calls on the workdir fails (no space, an I/O error, no permission, no descriptor),
again and again until it ends; then the same is done to a new run. A run whose call fails ends in one line on stderr, or
completes. The same command then resumes from the newest complete checkpoint. In the end, checkpoints and metrics are
bitwise equal to those of an undisturbed run. The exit code is 1 if anything is lost or differs.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsejax.runs import list_steps
from sparsejax.workdir import Workdir
from tests.stress.kill_runs import find_differences
from tests.stress.server import Ended, Server, compile_faults
from tests.train.runs import RECIPE, write_text

STEPS, EVERY = 8, 2
SETTINGS = {
    "train.steps": STEPS,
    "train.batch": 4,
    "model.schedule": "local",
    "data.length": 16,
    "checkpoint.every": EVERY,
    "eval.every": EVERY,
    "eval.sample": 0,
}
CALLS = "owsnmut"  # see faults.c
# Errors, the calls that they can end, and whether all later calls of these kinds fail as well.
FAULTS = (("ENOSPC", "owsnmt", 1), ("EIO", CALLS, 0), ("EIO", CALLS, 1), ("EACCES", "onmu", 0), ("EMFILE", "o", 0))
CHAIN = 8  # disturbances of one run
USAGE_ERROR = 2
KILLED = -9


class Runs:
    """Training runs of one configuration, of which some are disturbed."""

    def __init__(self, server: Server, folder: Path):
        self._server, self._folder, self._text = server, folder, write_text(folder / "text")
        self.whole = Workdir(folder / "whole")
        ended, self._calls = self.train(self.whole)
        if ended.code:
            raise RuntimeError(f"the undisturbed run failed: {ended}")

    def train(self, workdir: Workdir, **faults: Any) -> tuple[Ended, list[str]]:
        """Trains or resumes a run; returns how it ended and its calls, see faults.c."""
        log = self._folder / "calls"
        log.unlink(missing_ok=True)
        settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
        command = ["train", f"--config={RECIPE}", f"--config.data.files={self._text}", f"--workdir={workdir.path}"]
        faults = {"folder": workdir.path, "calls": CALLS, "log": log} | faults
        ended = self._server.run(*command, *settings, **faults)
        return ended, log.read_text(errors="replace").splitlines() if log.exists() else []

    def disturb(self, workdir: Workdir, draw: random.Random, kill: bool) -> dict[str, Any]:
        """Disturbs a random call of a run; returns a record of it."""
        before = max(list_steps(workdir.checkpoints), default=0)
        name, kinds, lasts = (None, CALLS, 0) if kill else draw.choice(FAULTS)
        total = sum(line.split()[1] in kinds for line in self._calls)
        at = draw.randint(1, 5 + int(total * (STEPS - before) / STEPS))
        ended, calls = self.train(workdir, calls=kinds, at=at, errno=getattr(errno, name) if name else 0, lasts=lasts)
        call = next((line.removesuffix(" !") for line in calls if line.endswith(" !")), "")
        resumed = re.search(r"^resuming .* at step (\d+)$", ended.output.replace("\n/", "/"), re.MULTILINE)
        record = {"error": name, "lasts": lasts, "call": call.replace(str(workdir.path), ""), "code": ended.code}
        record |= {"before": before, "after": max(list_steps(workdir.checkpoints), default=0)}
        record |= {"resumed": int(resumed[1]) if resumed else None, "seconds": ended.seconds}
        record["ended"] = workdir.result.exists()
        if problem := find_problem(ended, record, kill):
            record |= {"problem": problem, "errors": ended.errors[-2000:]}
        return record

    def chain(self, name: str, draw: random.Random, kill: bool) -> Iterator[dict[str, Any]]:
        """Disturbs a new run until it has ended, at most `CHAIN` times; the last record has the differences."""
        workdir, records = Workdir(self._folder / name), []
        for _ in range(CHAIN):
            records.append(self.disturb(workdir, draw, kill))
            yield records[-1]
            if not records[-1]["call"]:
                break
        ended, _ = self.train(workdir)
        differences = find_differences(self.whole, workdir) if ended.code == 0 else [f"failed: {ended.errors[-500:]}"]
        yield {"chain": name, "differences": differences}
        if not differences:
            shutil.rmtree(workdir.path)


def find_problem(ended: Ended, record: dict[str, Any], kill: bool) -> str | None:
    """Describes what is wrong with the end of a disturbed run."""
    lines = ended.errors.splitlines()
    if not record["call"] or (not kill and ended.code == 0):
        expected = ended.code == 0 and not lines
    elif kill:
        expected = ended.code == KILLED and not lines
    else:
        expected = ended.code == USAGE_ERROR and len(lines) == 1 and lines[0].startswith("sparsejax: ")
    if not expected:
        return f"exit code {ended.code}, {len(lines)} lines on stderr"
    if record["after"] < record["before"] or (record["resumed"] or record["before"]) < record["before"]:
        return "a checkpoint is lost"
    if record["ended"] and record["after"] < STEPS:
        return "a result without its checkpoint"
    return None


def measure(kills: int, faults: int, seed: int, folder: Path) -> dict[str, Any]:
    """Disturbs runs until there are that many kills and faults; returns the record, and prints a line per event."""
    draw, records = random.Random(seed), []
    with Server(folder, compile_faults(folder)) as server:
        runs = Runs(server, folder)
        for kill, count in ((True, kills), (False, faults)):
            done = number = 0
            while done < count:
                for record in runs.chain(f"{'kills' if kill else 'faults'}-{number}", draw, kill):
                    records.append(record)
                    done += bool(record.get("call"))
                    print(f"{done}/{count} {json.dumps(record)}", flush=True)
                number += 1
    return {
        "seed": seed,
        "kills": sum(record.get("code") == KILLED for record in records),
        "faults": sum(bool(record.get("call")) and record["error"] is not None for record in records),
        "problems": [record for record in records if record.get("problem") or record.get("differences")],
    }


def main() -> int:
    """Measures, and writes the record to `--out`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="number of kills; defaults to 50")
    parser.add_argument("--faults", type=int, default=50, help="number of failing calls; defaults to 50")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calls; defaults to 0")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sparsejax-faults-") as folder:
        record = measure(options.kills, options.faults, options.seed, Path(folder))
    print(f"{record['kills']} kills, {record['faults']} faults, {len(record['problems'])} problems")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(record["problems"]))


if __name__ == "__main__":
    sys.exit(main())
