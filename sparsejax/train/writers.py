"""What a run leaves in its workdir: metrics, TensorBoard events, versions."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

RESULT = "result.json"  # of a run that has ended: its size and its last evaluation
PACKAGES = ("sparsejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy")


class Writers:
    """Writes rows of metrics: `metrics.jsonl`, TensorBoard events, and `metrics.csv` at the end.

    What depends on the clock goes to `timing.jsonl`, so that two equal runs leave equal metrics. Rows past
    `step`, the step the run goes on from, are dropped: the run will write them again. Of several processes that train
    together only one is `active`; the others write nothing.
    """

    def __init__(self, workdir: Path, step: int, active: bool = True):
        self._workdir, self._active = workdir, active
        if not active:
            return
        _drop_rows(workdir / "metrics.jsonl", step)
        _drop_rows(workdir / "timing.jsonl", step)
        (workdir / "events").mkdir(exist_ok=True)
        # Not a SummaryWriter: its thread holds events back for minutes, and when it fails it hangs the run.
        self._events = EventsWriter(str(workdir / "events" / "events"))
        if step:  # TensorBoard drops what an earlier file has from here on
            self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._active:
            return
        self._events.close()
        rows = read_rows(self._workdir / "metrics.jsonl")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (self._workdir / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, step: int, metrics: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """Appends one row of each kind, which a crash of this program cannot take back."""
        if not self._active:
            return
        _append_row(self._workdir / "metrics.jsonl", {"step": step, **drop_infinite(metrics)})
        if timing:
            _append_row(self._workdir / "timing.jsonl", {"step": step, **timing})
        shown = {name: value for name, value in {**metrics, **(timing or {})}.items() if math.isfinite(value)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in shown.items()]
        self._write_event(step, summary=Summary(value=scalars))

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        self._events.flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file; a last line that was cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def drop_infinite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics for JSON, which has no infinity and no NaN: None in their place."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    replace_file(path, f"{json.dumps(value, indent=2)}\n".encode())


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file in one step, so that a reader or a crash never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def describe_versions() -> dict[str, Any]:
    """Python, packages, devices and the git commit of the code, for the record."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        git = "unknown"
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **found,
        "git": git.strip(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "platform": platform.platform(),
    }


def _append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _drop_rows(path: Path, step: int) -> None:
    if path.exists():
        rows = (json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step)
        replace_file(path, "".join(rows).encode())
