"""The start of a run: its workdir, its records and its state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax import extensions, sharding
from sparsejax.config import ConfigError
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.runtime import PhaseRuntime
from sparsejax.train.state import TrainState, init_state, state_shapes
from sparsejax.train.writers import describe_versions
from sparsejax.workdir import Workdir, read_json, write_json


def find_change(workdir: Path, settings: ConfigDict) -> str | None:
    """Describes the first key in which a run differs from the run of a workdir; None if there is no such key.

    Neither the mesh belongs to the identity of a run, because checkpoints restore onto any mesh, nor the additional
    evaluations at its end.
    """
    if not Workdir(workdir).exists():
        return None
    recorded, requested = configs.complete(read_json(Workdir(workdir).config)), _resolve(settings)
    for config in (recorded, requested):
        config.pop("sharding", None)
        config.get("eval", {}).pop("also", None)
    return configs.difference(recorded, requested)


def claim_workdir(workdir: Workdir, settings: ConfigDict, runtimes: Sequence[PhaseRuntime]) -> None:
    """Records the configuration, the schedule and the data in a workdir that is new or belongs to the same run.

    Raises:
      ConfigError: The workdir belongs to another run, or is a folder of something else.
    """
    if change := find_change(workdir.path, settings):
        raise ConfigError("workdir", f"{workdir.path} belongs to another configuration: {change}")
    if (
        not workdir.exists()
        and workdir.path.exists()
        and any(path.suffix != ".part" for path in workdir.path.iterdir())
    ):
        raise ConfigError("workdir", f"{workdir.path} is not empty and has no {workdir.config.name}")
    if not sharding.is_coordinator():
        return
    workdir.path.mkdir(parents=True, exist_ok=True)
    write_json(workdir.config, _resolve(settings))
    extensions.record(workdir)
    names = runtimes[0].config.model.names
    workdir.schedule.write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))
    write_json(workdir.data, _count_data(runtimes))


def start_state(
    runtimes: Sequence[PhaseRuntime], checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState[Array], grain.DatasetIterator]:
    """Returns the newest state and the batches that follow it; without a checkpoint those of a new run."""
    first, latest = runtimes[0], checkpoints.latest
    if latest is None:
        return init_state(first.model, first.optimizer, first.config.train.seed, mesh), first.train_batches()
    # A checkpoint at the end of a phase holds the iterator of that phase.
    batches = next(runtime for runtime in runtimes if latest <= runtime.phase.stop).train_batches()
    return checkpoints.restore(state_shapes(first.model, first.optimizer, mesh), batches), batches


def record_versions(workdir: Workdir) -> None:
    """Appends the software and the devices of this start, which can differ from those of earlier starts."""
    path, versions = workdir.versions, describe_versions()
    if registered := extensions.describe_versions():
        versions["extensions"] = registered
    write_json(path, [*(read_json(path) if path.exists() else []), versions])


def _resolve(settings: ConfigDict) -> dict[str, Any]:
    """Returns the configuration with the types of JSON."""
    return json.loads(json.dumps(settings.to_dict()))


def _count_data(runtimes: Sequence[PhaseRuntime]) -> dict[str, Any]:
    """Returns the counts of documents and tokens, and those of each phase."""
    phases = {runtime.phase.name: runtime.dataset.counts for runtime in runtimes if runtime.phase.name is not None}
    return runtimes[0].dataset.counts | ({"phases": phases} if phases else {})
