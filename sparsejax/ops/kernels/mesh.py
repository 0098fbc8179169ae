"""Attention on a mesh, where the compiler cannot partition it: each device attends for its own rows and heads.

It cannot partition a Pallas kernel at all. Attention to selected keys loops over rows, sorts and gathers, for which it
would replicate the rows of all devices.
"""

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


def run_on_mesh(
    run: Callable[[AttentionCall], tuple[Array, Array | None]], call: AttentionCall
) -> tuple[Array, Array | None]:
    """`run(call)` under `shard_map`: each device of the current mesh (`jax.set_mesh`) computes its rows and heads.

    The computation is replicated over mesh axes that do not divide the rows or the heads, and over `HEAD_AXIS`
    if the pattern differs between heads.
    """
    leaves, structure = jax.tree.flatten(call.selection)  # [b or 1, ...], [b, scopes, ...]
    scopes = [x.shape[1] for x in leaves if x.ndim > 2 and x.shape[1] > 1]
    h, g = call.q.shape[2], call.k.shape[2]
    divided = h if g == 1 else g  # every device needs the only key/value head
    axes = device_axes(call.q.shape[0], math.gcd(divided, *scopes) if call.pattern.heads is None else 1)
    if axes is None:
        return run(call)
    rows, heads = axes.rows, axes.heads
    by_head, of_keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, None, None if g == 1 else heads)
    specs = {
        "q": by_head,
        "k": of_keys,
        "v": of_keys,
        "sink_logits": PartitionSpec(heads),
        "alibi_slopes": PartitionSpec(heads),
    }
    specs["segments"] = (PartitionSpec(rows),) * 2
    arrays = {name: getattr(call, name) for name in specs if getattr(call, name) is not None}
    chosen = [
        PartitionSpec(rows if len(x) > 1 else None, heads if x.ndim > 2 and x.shape[1] > 1 else None) for x in leaves
    ]

    def run_shard(arrays: dict[str, Any], leaves: list[Array]) -> tuple[Array, Array | None]:
        return run(dataclasses.replace(call, **arrays, selection=structure.unflatten(leaves)))

    sharded = jax.shard_map(
        run_shard,
        in_specs=({name: specs[name] for name in arrays}, chosen),
        out_specs=(by_head, by_head),
        axis_names=axes.names,
        check_vma=False,
    )
    return sharded(arrays, leaves)
