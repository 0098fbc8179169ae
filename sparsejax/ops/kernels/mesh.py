"""Kernels on a mesh. The compiler cannot partition a Pallas kernel, so each device runs it on its own shard."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from sparsejax.ops.call import AttentionCall
from sparsejax.ops.sequence import device_axes


def run_on_mesh(run: Callable[[AttentionCall], tuple[Array, Array]], call: AttentionCall) -> tuple[Array, Array]:
    """`run(call)` under `shard_map`: each device of the current mesh (`jax.set_mesh`) computes its rows and heads.

    The computation is replicated over mesh axes that do not divide the rows or the heads, and over `HEAD_AXIS`
    if the pattern differs between heads.
    """
    leaves, structure = jax.tree.flatten(call.selection)  # [b or 1, ...], [b, scopes, ...]
    scopes = [x.shape[1] for x in leaves if x.ndim > 2 and x.shape[1] > 1]
    axes = device_axes(call.q.shape[0], math.gcd(call.k.shape[2], *scopes) if call.pattern.heads is None else 1)
    if axes is None:
        return run(call)
    rows, heads = axes.rows, axes.heads
    qkv = PartitionSpec(rows, None, heads)
    specs = {"q": qkv, "k": qkv, "v": qkv, "sink_logits": PartitionSpec(heads)}
    specs["segments"] = (PartitionSpec(rows),) * 2
    arrays = {name: getattr(call, name) for name in specs if getattr(call, name) is not None}
    chosen = [
        PartitionSpec(rows if len(x) > 1 else None, heads if x.ndim > 2 and x.shape[1] > 1 else None) for x in leaves
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
