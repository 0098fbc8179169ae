"""How much later does a run start because its model is checked?

Runs of preset:quickstart start with and without `train.check` in alternation, each in a new process, in an empty
workdir, with an empty compilation cache and without certificates of earlier runs. The clock starts with the process and
stops when a step is printed. Each run is then stopped by a signal; the time that it takes to end is measured, too.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Save, print_rows

STEPS = (1, 10, 50)
STEP = re.compile(r"step (\d+)/")
NEW_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def run(options, save: Save) -> None:
    """Measures three runs of each kind."""
    rows: list[dict] = []
    for _ in range(1 if options.quick else 3):
        rows += [measure(check, STEPS[:1] if options.quick else STEPS) for check in (True, False)]
    print_rows(rows)
    medians = {
        field: [statistics.median(row[field] for row in rows if row["check"] is check) for check in (True, False)]
        for field in rows[0]
        if field != "check"
    }
    later = {field: with_check - without for field, (with_check, without) in medians.items()}
    print_rows([{"median": "later by, s"} | later])
    save({"runs": rows, "medians": medians, "later": later})


def measure(check: bool, steps: tuple[int, ...]) -> dict:
    """Starts a run; returns the seconds until each of `steps` is printed, and until the run has ended after SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="sparsejax-check-") as name:
        settings = {"train.check": str(check).lower(), "train.log_every": 1}
        options = [f"--config.{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "sparsejax", "train", "--config=preset:quickstart", *options]
        environment = os.environ | NEW_CACHE | {"SPARSEJAX_CACHE_DIR": f"{name}/cache", "PYTHONUNBUFFERED": "1"}
        row: dict = {"check": check}
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"--workdir={Path(name) / 'run'}"], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            if (match := STEP.match(line)) and int(match[1]) in steps:
                row[f"step {match[1]}"] = time.perf_counter() - start
                if int(match[1]) == steps[-1]:
                    break
        process.send_signal(signal.SIGTERM)
        start = time.perf_counter()
        process.communicate()
        return row | {"end after SIGTERM": time.perf_counter() - start}
