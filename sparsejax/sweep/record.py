"""What a sweep's folder says of it: `sweep.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsejax.sweep.axes import SweepError
from sparsejax.sweep.runs import Run
from sparsejax.train import find_change, write_json

RECORD = "sweep.json"


def read_record(folder: Path) -> dict[str, Any]:
    """What was asked of a folder: `config`; `sweeps`, as they were given; `runs`, by name, in the order of asking.

    Of each run: `label`, `seed`, `overrides`. Nothing was asked of a folder without a record.
    """
    place = folder / RECORD
    if not place.exists():
        return {"config": None, "sweeps": [], "runs": {}}
    try:
        return json.loads(place.read_text())
    except ValueError as error:
        raise SweepError(f"--workdir: {place} is damaged: {error}") from None


def check_record(folder: Path, config: str, runs: Sequence[Run]) -> None:
    """Refuses a folder of another config, and runs that were started with other settings than the config gives now."""
    recorded = read_record(folder)["config"]
    if recorded is not None and _resolve(recorded) != _resolve(config):
        raise SweepError(f"--workdir: {folder} is a sweep of {recorded}, not of {config}")
    for run in runs:
        if change := find_change(run.workdir(folder), run.settings):
            raise SweepError(f"{run.label}: {run.workdir(folder)} was started with another configuration: {change}")


def write_record(folder: Path, config: str, sweep: str, runs: Sequence[Run]) -> None:
    """Adds runs to what was asked of a folder; the label that a run is given last is the one it has."""
    record = read_record(folder)
    asked = {run.name: {"label": run.label, "seed": run.seed, "overrides": dict(run.overrides)} for run in runs}
    sweeps = record["sweeps"] + [sweep] * (sweep not in record["sweeps"])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"config": config, "sweeps": sweeps, "runs": record["runs"] | asked})


def _resolve(config: str) -> tuple[Path, str]:
    path, _, argument = config.partition(":")
    return Path(path).resolve(), argument
