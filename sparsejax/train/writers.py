"""Metrics and versions that a run records in its workdir."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from sparsejax.metrics import finite_or_none
from sparsejax.workdir import Workdir, append_row, read_last_row, read_rows, replace_file

PACKAGES = ("sparsejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy")


class Writers:
    """Writes metrics as rows, as TensorBoard events and, at the end, as a table; a context manager.

    Measurements that depend on the clock go to another file, so that two equal runs write equal metrics. Rows after
    `step`, from which the run resumes, are dropped, because the run writes them again. Of several processes that train
    together only one is `active`; the others write nothing.

    Attributes:
      last_step: Step of the last row of metrics, or None.
    """

    last_step: int | None = None

    def __init__(self, workdir: Workdir, step: int, active: bool = True):
        self._workdir, self._active = workdir, active
        if not active:
            return
        _drop_rows(workdir.metrics, step)
        _drop_rows(workdir.timing, step)
        self.last_step = read_last_row(workdir.metrics).get("step")
        workdir.events.mkdir(exist_ok=True)
        # A SummaryWriter would keep events back for minutes in a thread, and hang the run when that thread fails.
        self._events = EventsWriter(str(workdir.events / "events"))
        if step:  # TensorBoard then ignores the events of earlier files after this step
            self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._active:
            return
        self._events.close()
        rows = read_rows(self._workdir.metrics)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with self._workdir.metrics_table.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, step: int, metrics: Mapping[str, float | int], timing: Mapping[str, float] | None = None) -> None:
        """Appends a row of metrics and one of measurements, both on disk before the call returns."""
        if not self._active:
            return
        append_row(self._workdir.metrics, {"step": step, **finite_or_none(metrics)})
        self.last_step = step
        if timing:
            append_row(self._workdir.timing, {"step": step, **timing})
        finite = {name: value for name, value in {**metrics, **(timing or {})}.items() if math.isfinite(value)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        self._write_event(step, summary=Summary(value=scalars))

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        self._events.flush()


def describe_versions() -> dict[str, Any]:
    """Returns the versions of Python, of the packages and of the code, and the devices."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        git = "unknown"
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **packages,
        "git": git.strip(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "platform": platform.platform(),
    }


def _drop_rows(path: Path, step: int) -> None:
    if path.exists():
        rows = (json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step)
        replace_file(path, "".join(rows).encode())
