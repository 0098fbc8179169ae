"""Where arrays live: the mesh, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparsejax.config import ConfigError, ShardingConfig

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis. Axes not named here, and those that the mesh axis does not divide,
# are replicated.
RULES = {"vocab": "tensor", "width": "fsdp", "heads": "tensor", "ff": "tensor", "inner": "tensor", "experts": "tensor"}


def initialize_distributed(place: str) -> None:
    """Joins the processes that train together, before anything else is done with devices.

    Args:
      place: "auto" where Slurm, MPI, Kubernetes or a TPU pod tells who they are; else "HOST:PORT,INDEX/COUNT": where
        the first of them listens, and which of how many this one is.

    Raises:
      ConfigError: a place that cannot be read, no such cluster, or processes that do not come.
    """
    found = re.fullmatch(r"([^,]+:\d+),(\d+)/(\d+)", place)
    if place != "auto" and (found is None or not int(found[2]) < int(found[3])):
        raise ConfigError(f"--distributed: must be auto or HOST:PORT,INDEX/COUNT, got {place!r}")
    given = (
        {"coordinator_address": found[1], "process_id": int(found[2]), "num_processes": int(found[3])} if found else {}
    )
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--distributed={place}: {error}") from error


def is_coordinator() -> bool:
    """Whether this process is the one that writes and speaks for all that train together."""
    return jax.process_index() == 0


def make_mesh(config: ShardingConfig) -> Mesh:
    """The mesh of all devices; one device is a 1 x 1 x 1 mesh.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices, others = jax.device_count(), config.fsdp * config.tensor
    data = devices // others if config.data == -1 else config.data
    if data * others != devices:
        raise ConfigError(
            f"sharding: data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} does not make up the"
            f" {devices} devices there are"
        )
    # Auto axes: the compiler places intermediate arrays (make_mesh would default to Explicit).
    return jax.make_mesh((data, config.fsdp, config.tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Which of how many equal runs of a batch's rows this process has to read."""
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    start = min(place[0].start or 0 for place in places)
    stop = max(rows if place[0].stop is None else place[0].stop for place in places)
    return start // (stop - start), rows // (stop - start)


def parameter_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """A NamedSharding for each parameter, by `RULES`.

    Args:
      mesh: the mesh.
      shapes: parameters or their shapes, as a tree.
      axes: the same tree with a tuple of logical axis names for each parameter.
    """

    def shard(leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        places = [RULES.get(name) for name in names]
        fits = [p if p and n % mesh.shape[p] == 0 else None for n, p in zip(leaf.shape, places, strict=True)]
        fits = [None if p in fits[:i] else p for i, p in enumerate(fits)]  # a mesh axis splits an array once
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(shard, shapes, axes)
