"""Metrics and versions that a run records in its workdir."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from sparsejax.metrics import finite_or_none
from sparsejax.train.histograms import Histogram, append_histograms
from sparsejax.train.loggers import Logger, TensorBoard, open_loggers
from sparsejax.workdir import Workdir, append_row, read_last_row, read_rows, replace_file

PACKAGES = ("sparsejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy")


class Writers:
    """Writes metrics as rows, to loggers and, at the end, as a table; a context manager.

    Measurements that depend on the clock go to another file, so that two equal runs write equal metrics. Rows after
    `step`, from which the run resumes, are dropped, because the run writes them again. Of several processes that train
    together only one is `active`; the others write nothing.

    Args:
      workdir: The files.
      step: Step from which the run resumes, or 0.
      active: Whether this process writes.
      log_to: Names of the loggers.
      settings: Configuration of the run, for the loggers.

    Attributes:
      last_step: Step of the last row of metrics, or None.
    """

    last_step: int | None = None

    def __init__(
        self,
        workdir: Workdir,
        step: int,
        active: bool = True,
        log_to: tuple[str, ...] = ("tensorboard",),
        settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        self._workdir, self._active = workdir, active
        if not active:
            return
        self._logged = read_last_row(workdir.metrics).get("step", 0)
        self._loggers = open_loggers(log_to, workdir, settings, step)
        for path in (workdir.metrics, workdir.timing, workdir.histograms):
            _drop_rows(path, step)
        self.last_step = read_last_row(workdir.metrics).get("step")

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._active:
            return
        for logger in self._loggers:
            logger.close()
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
        for logger in self._loggers_of(step):
            logger.write(step, finite)

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Appends the histograms of a step."""
        if not self._active:
            return
        append_histograms(self._workdir, step, histograms)
        for logger in self._loggers_of(step):
            logger.write_histograms(step, histograms)

    def _loggers_of(self, step: int) -> list[Logger]:
        """The loggers that lack a step: a service keeps the steps of a killed run that the resumed run repeats."""
        return [logger for logger in self._loggers if step >= self._logged or isinstance(logger, TensorBoard)]


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
        rows = (json.dumps(row) + "\n" for row in read_rows(path, {"step": int}) if row["step"] <= step)
        replace_file(path, "".join(rows).encode())
