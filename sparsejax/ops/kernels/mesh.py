"""Kernels on a mesh. The compiler cannot partition a Pallas kernel, so each device runs it on its own shard."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.sequence import HEAD_AXIS, compiler_axes


class DeviceAxes(NamedTuple):
    """Axes of the current mesh that the compiler would partition."""

    names: set[str]  # with those of size 1: Mosaic kernels need every axis to be manual
    sequences: tuple[str, ...] | None  # those over which sequences are sharded
    heads: tuple[str, ...] | None  # those over which heads or channels are


def device_axes(sequences: int, heads: int) -> DeviceAxes | None:
    """The axes that divide the sequences and the heads; None if the compiler has nothing to partition."""
    mesh, auto = jax.sharding.get_abstract_mesh(), list(compiler_axes())
    if not auto or mesh.size == 1:
        return None
    by_sequence, by_head = ([axis for axis in auto if (axis == HEAD_AXIS) == of_head] for of_head in (False, True))
    return DeviceAxes(set(auto), _dividing_axes(mesh, by_sequence, sequences), _dividing_axes(mesh, by_head, heads))


def run_on_mesh(run: Callable[[AttentionCall], tuple[Array, Array]], call: AttentionCall) -> tuple[Array, Array]:
    """`run(call)` under `shard_map`: each device of the current mesh (`jax.set_mesh`) computes its sequences and heads.

    The computation is replicated over mesh axes that do not divide the sequences or the heads, and over `HEAD_AXIS`
    if the pattern differs between heads.
    """
    leaves, structure = jax.tree.flatten(call.selection)  # [b or 1, ...], [b, scopes, ...]
    scopes = [x.shape[1] for x in leaves if x.ndim > 2 and x.shape[1] > 1]
    axes = device_axes(call.q.shape[0], math.gcd(call.k.shape[2], *scopes) if call.pattern.heads is None else 1)
    if axes is None:
        return run(call)
    sequences, heads = axes.sequences, axes.heads
    qkv = PartitionSpec(sequences, None, heads)
    specs = {"q": qkv, "k": qkv, "v": qkv, "sink_logits": PartitionSpec(heads)}
    specs["segments"] = (PartitionSpec(sequences),) * 2
    arrays = {name: getattr(call, name) for name in specs if getattr(call, name) is not None}
    chosen = [
        PartitionSpec(sequences if len(x) > 1 else None, heads if x.ndim > 2 and x.shape[1] > 1 else None)
        for x in leaves
    ]

    def run_shard(arrays: dict[str, Any], leaves: list[Array]) -> tuple[Array, Array]:
        return run(dataclasses.replace(call, **arrays, selection=structure.unflatten(leaves)))

    sharded = jax.shard_map(
        run_shard,
        in_specs=({name: specs[name] for name in arrays}, chosen),
        out_specs=(qkv, qkv),
        axis_names=axes.names,
        check_vma=False,
    )
    return sharded(arrays, leaves)


def _dividing_axes(mesh, axes: list[str], size: int) -> tuple[str, ...] | None:
    """The longest prefix of `axes` whose product divides `size`."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return tuple(axes) or None
