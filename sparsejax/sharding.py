"""The mesh, and the table from logical axes to mesh axes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sparsejax.config import ConfigError, ShardingConfig
from sparsejax.errors import InputError
from sparsejax.ops import verification
from sparsejax.ops.sequence import AXIS, HEAD_AXIS

MESH_AXES = ("data", "fsdp", AXIS, "tensor")
BATCH_AXES = ("data", "fsdp")

# Mesh axes per logical axis of a parameter: as many of them, from the first on, as divide it. Other axes are
# replicated. Devices that share rows share parameters too, as those of `fsdp` do.
RULES = {
    "vocab": ("tensor",),
    "width": ("fsdp", AXIS),
    "heads": (HEAD_AXIS,),
    "ff": ("tensor",),
    "inner": ("tensor",),
    "experts": ("tensor",),
}


def initialize_distributed(address: str) -> None:
    """Connects the processes that train together; must precede any use of devices.

    Args:
      address: "auto" under Slurm, MPI, Kubernetes or on a TPU pod; else "HOST:PORT,INDEX/COUNT", with the address of
        the coordinator, the index of this process and the number of processes.

    Raises:
      InputError: The address is malformed, or the processes cannot be connected.
    """
    match = re.fullmatch(r"([^,]+:\d+),(\d+)/(\d+)", address)
    if address != "auto" and (match is None or not int(match[2]) < int(match[3])):
        raise InputError("distributed", f"{address!r} is neither auto nor HOST:PORT,INDEX/COUNT")
    cluster: dict[str, Any] = {}
    if match is not None:
        cluster = {"coordinator_address": match[1], "process_id": int(match[2]), "num_processes": int(match[3])}
    try:
        jax.distributed.initialize(**cluster)
    except (ValueError, RuntimeError) as error:
        raise InputError("distributed", f"connecting to {address!r} failed: {error}") from error
    verification.agree()


def is_coordinator() -> bool:
    """Whether this process writes and logs for all processes that train together."""
    return jax.process_index() == 0


def from_coordinator(value: Any) -> Any:
    """Returns the coordinator's `value`, which JSON can hold, in all processes that train together."""
    if jax.process_count() == 1:
        return value
    content = json.dumps(value).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.frombuffer(content[:size].ljust(size), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def gather(value: Any) -> list[Any]:
    """Returns the `value` of each process, which JSON can hold, in all processes that train together."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.int32(len(content))).max())
    padded = np.pad(content, (0, size - len(content)), constant_values=ord(" "))
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def make_mesh(config: ShardingConfig) -> Mesh:
    """Builds the mesh of all devices; a single device is a mesh whose axes have size 1.

    Raises:
      ConfigError: The product of the axes is not the number of devices.
    """
    return arrange_devices(resolve_axes(config, jax.device_count()))


def resolve_axes(config: ShardingConfig, devices: int) -> tuple[int, ...]:
    """Returns the sizes of the axes of a mesh of so many devices, in the order of `MESH_AXES`.

    Raises:
      ConfigError: Their product is not the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    others = config.fsdp * config.sequence * config.tensor
    data = devices // others if config.data == -1 else config.data
    if data * others != devices:
        axes = " x ".join(f"{axis} = {size}" for axis, size in sizes.items())
        raise ConfigError("sharding", f"{axes} is not the number of devices, {devices}{_suggest(config, devices)}")
    return tuple((sizes | {"data": data}).values())


def _suggest(config: ShardingConfig, devices: int) -> str:
    """The nearest mesh that all devices form."""
    fixed = config.fsdp * config.tensor
    if devices % (fixed * config.sequence) == 0:
        return f"; use data = {devices // (fixed * config.sequence)}"
    if devices % fixed:
        return ""
    divisors = [n for n in range(1, devices // fixed + 1) if devices // fixed % n == 0]
    return f"; use data = -1 and sequence = {min(divisors, key=lambda n: abs(n - config.sequence))}"


def arrange_devices(sizes: tuple[int, ...], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of `devices`, by default of all, whose axes have these sizes; an axis may split a physical one."""
    devices = jax.devices() if devices is None else devices
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto axes: the compiler shards intermediate arrays.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def describe(mesh: Mesh | AbstractMesh) -> str:
    """The axes of a mesh and their sizes; that of the sequence only if it is sharded."""
    axes = [axis for axis in MESH_AXES if axis != AXIS or mesh.shape[axis] > 1]
    return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)


def single_device_mesh() -> Mesh:
    """Returns the mesh of the first device."""
    return arrange_devices((1,) * len(MESH_AXES), devices=jax.devices()[:1])


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh over which the arrays of a tree are sharded; None for arrays on one device."""
    placement = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    mesh = placement.mesh if isinstance(placement, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of arrays [b, t, ...]: rows over `data` and `fsdp`, tokens over `sequence`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, AXIS))


def constrain_batch(mesh: Mesh | AbstractMesh) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that keeps an array sharded by `batch_sharding` under `jax.jit`."""
    placement = batch_sharding(mesh)
    return lambda x: jax.lax.with_sharding_constraint(x, placement)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of shards of the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Index and number of the equal ranges of a batch's `rows` of which this process reads one."""
    return _local_range(mesh, BATCH_AXES, rows)


def local_tokens(mesh: Mesh, length: int) -> slice:
    """The tokens of a row of `length` tokens that this process reads."""
    index, count = _local_range(mesh, AXIS, length)
    return slice(index * length // count, (index + 1) * length // count)


def _local_range(mesh: Mesh, axes: str | tuple[str, ...], size: int) -> tuple[int, int]:
    """Index and number of the equal ranges of an array axis, split over mesh axes, of which this process has one."""
    sharded = NamedSharding(mesh, PartitionSpec(axes))
    ranges = [index[0] for index in sharded.addressable_devices_indices_map((size,)).values() if index is not None]
    start = min(span.start or 0 for span in ranges)
    stop = max(size if span.stop is None else span.stop for span in ranges)
    return start // (stop - start), size // (stop - start)


def parameter_shardings(mesh: Mesh | AbstractMesh, shapes: Any, axes: Any) -> Any:
    """Returns a NamedSharding per parameter, by `RULES`.

    Args:
      mesh: The mesh.
      shapes: Tree of parameters or their shapes.
      axes: The same tree with a tuple of logical axis names per parameter.
    """

    def shard(leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        spec: list[str | tuple[str, ...] | None] = []
        free = {axis for axis, count in mesh.shape.items() if count > 1}  # a mesh axis splits an array once
        for size, name in zip(leaf.shape, names, strict=True):
            axes = tuple(axis for axis in RULES.get(name or "", ()) if axis in free)
            while size % math.prod(mesh.shape[axis] for axis in axes):
                axes = axes[:-1]
            free -= set(axes)
            spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(shard, shapes, axes)
