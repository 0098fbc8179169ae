"""Kernels on a mesh: the compiler cannot split them, so that each device runs one on its sequences and heads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from sparsejax.ops.call import AttentionCall

HEAD_AXES = ("tensor",)  # mesh axes that heads are spread over; sequences are over all others


def run_on_mesh(run: Callable[[AttentionCall], tuple[Array, Array]], call: AttentionCall) -> tuple[Array, Array]:
    """`run(call)`, by each device of the mesh in use (`jax.set_mesh`) on its own part.

    Axes that do not divide the sequences or the heads compute the same on all their devices; so does the axis of the
    heads where they have patterns of their own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    auto = [axis for axis in auto if mesh.shape[axis] > 1]
    if not auto:
        return run(call)
    heads = [axis for axis in auto if axis in HEAD_AXES and call.pattern.heads is None]
    heads = _fitting(mesh, heads, call.k.shape[2])
    sequences = _fitting(mesh, [axis for axis in auto if axis not in HEAD_AXES], call.q.shape[0])
    whole = PartitionSpec(sequences, None, heads)
    specs = {"q": whole, "k": whole, "v": whole, "sink_logits": PartitionSpec(heads)}
    specs["segments"] = (PartitionSpec(sequences),) * 2
    arrays = {name: getattr(call, name) for name in specs if getattr(call, name) is not None}
    spread = jax.shard_map(
        lambda arrays: run(dataclasses.replace(call, **arrays)),
        in_specs=({name: specs[name] for name in arrays},),
        out_specs=(whole, whole),
        axis_names=set(auto),
        check_vma=False,
    )
    return spread(arrays)


def device_kind() -> str:
    """Of the devices that is compiled for: those of the mesh in use, or the machine's."""
    return (_abstract_device() or jax.devices()[0]).device_kind


def core_count() -> int | None:
    """Multiprocessors of such a device, if it is a GPU of which that is known."""
    abstract = _abstract_device()
    told = None if abstract is None else abstract.num_cores
    return told or getattr(jax.devices()[0], "core_count", None)


def _abstract_device():
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def _fitting(mesh, axes: list[str], size: int) -> tuple[str, ...] | None:
    """The first axes that together divide the size."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return tuple(axes) or None
