"""Sequences that are sharded over a mesh axis: each shard holds contiguous tokens.

An op asks `shard_count()`; above 1 it runs under `map_shards`, where it sees the tokens of its shard and exchanges what
it needs with explicit collectives over `AXIS`. All other mesh axes stay with the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Int, PyTree

AXIS = "sequence"
HEAD_AXIS = "tensor"  # mesh axis over which heads or channels are sharded, and no tokens


def compiler_axes() -> dict[str, int]:
    """Sizes of the axes of the current mesh (`jax.set_mesh`) over which the compiler partitions arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in kinds if kind == AxisType.Auto}


class DeviceAxes(NamedTuple):
    """Axes of the current mesh that the compiler would partition."""

    names: set[str]  # with those of size 1: Mosaic kernels need every axis to be manual
    rows: tuple[str, ...] | None  # those over which rows of a batch are sharded
    heads: tuple[str, ...] | None  # those over which heads or channels are


def device_axes(rows: int, heads: int) -> DeviceAxes | None:
    """The axes that divide the rows and the heads; None if the compiler has nothing to partition."""
    mesh, auto = jax.sharding.get_abstract_mesh(), list(compiler_axes())
    if not auto or mesh.size == 1:
        return None
    by_row, by_head = ([axis for axis in auto if (axis == HEAD_AXIS) == of_head] for of_head in (False, True))
    return DeviceAxes(set(auto), _dividing_axes(mesh, by_row, rows), _dividing_axes(mesh, by_head, heads))


def _dividing_axes(mesh, axes: list[str], size: int) -> tuple[str, ...] | None:
    """The longest prefix of `axes` whose product divides `size`."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return tuple(axes) or None


def map_device(
    function: Callable[..., PyTree[Array]], inputs: Sequence[Array], heads: Sequence[int | None], outputs: Any
) -> Any:
    """Runs a function of arrays [b, ...] on the rows and the heads of each device.

    XLA's partitioner does not split every operation on rows: it gathers those of all devices to sort them, to loop over
    them, or to join arrays along them.

    Args:
      function: A function of rows and heads that do not affect one another.
      inputs: Its inputs.
      heads: The axis of the heads, or of the groups of heads, of each input; None for one without.
      outputs: That of each output: a prefix tree of the outputs.
    """
    counts = [x.shape[axis] for x, axis in zip(inputs, heads, strict=True) if axis is not None]
    axes = device_axes(len(inputs[0]), math.gcd(*counts) if counts else 1)
    if axes is None:
        return function(*inputs)

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec(axes.rows) if axis is None else PartitionSpec(axes.rows, *[None] * (axis - 1), axes.heads)

    results = jax.tree.map(spec, outputs, is_leaf=lambda x: x is None)
    specs = tuple(map(spec, heads))
    return jax.shard_map(function, in_specs=specs, out_specs=results, axis_names=axes.names, check_vma=False)(*inputs)


def shard_count() -> int:
    """Number of shards of a sequence on the current mesh; 1 without one, and in `map_shards`."""
    return compiler_axes().get(AXIS, 1)


def map_shards(
    function: Callable[..., PyTree[Array]], sharded: PyTree[Array], replicated: PyTree[Array] = (), outputs: Any = 1
) -> Any:
    """Runs `function(sharded, replicated)` on each shard of the sequence.

    Args:
      function: Sees the tokens of its shard; collectives over `AXIS` reach the others. It must not close over an array
        with a gradient.
      sharded: Arrays [b, t, ...], whose axis 1 is split.
      replicated: Arrays that every shard reads whole. Their gradients are summed over the shards.
      outputs: The axis of tokens of each output, or None if it is equal on all shards: a prefix tree of the outputs.

    Returns:
      The outputs, with the tokens of all shards.
    """

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)

    results = jax.tree.map(spec, outputs, is_leaf=lambda x: x is None)
    return _map_devices(function, sharded, replicated, spec(1), results, {AXIS})


def _map_devices(
    function: Callable[..., Any],
    sharded: PyTree[Array],
    replicated: PyTree[Array],
    spec: PartitionSpec,
    outputs: Any,
    axes: set[str],
) -> Any:
    """`jax.shard_map` of `function(sharded, replicated)` over some axes; inputs of one spec, outputs of several."""
    leaves, structure = jax.tree.flatten((sharded, replicated))
    count = len(jax.tree.leaves(sharded))
    return jax.shard_map(
        lambda *leaves: function(*structure.unflatten(leaves)),
        in_specs=tuple(spec if i < count else PartitionSpec() for i in range(len(leaves))),
        out_specs=outputs,
        axis_names=axes,
        check_vma=False,
    )(*leaves)


def map_queries(
    function: Callable[..., PyTree[Array]], queries: PyTree[Array], keys: PyTree[Array], replicated: PyTree[Array] = ()
) -> PyTree[Array]:
    """Runs `function(queries, keys, replicated)` on the queries of each shard and the keys of all shards.

    Args:
      function: Maps them to arrays [b, t, ...] of the queries. It must not close over an array with a gradient.
      queries: Arrays [b, t, ...].
      keys: Arrays [b, n, ...]. They are gathered; those whose axis 1 the shards do not divide are on every shard.
      replicated: See `map_shards`.

    Returns:
      The results for the queries of all shards.
    """
    leaves, structure = jax.tree.flatten(keys)
    is_split = [leaf.shape[1] % shard_count() == 0 for leaf in leaves]
    split, whole = ([x for x, y in zip(leaves, is_split, strict=True) if y == kind] for kind in (True, False))

    def run(sharded: tuple[PyTree[Array], list[Array]], held: tuple[list[Array], PyTree[Array]]) -> PyTree[Array]:
        (queries, split), (whole, replicated) = sharded, held
        gathered, others = iter(gather_shards(split)), iter(whole)
        keys = structure.unflatten(next(gathered if y else others) for y in is_split)
        return function(queries, keys, replicated)

    return map_shards(run, (queries, split), (whole, replicated))


def gather_shards(x: PyTree[Array]) -> PyTree[Array]:
    """In `map_shards`: the tokens of all shards, of the rows of a device and, in arrays [b, t, ..., h, d], its heads.

    XLA's partitioner replicates what is gathered over every axis that is left to it, so that each device would receive
    the rows and the heads of all devices.
    """

    def run(leaf: Array) -> Array:
        return jax.lax.all_gather(leaf, AXIS, axis=1, tiled=True)

    def gather(leaf: Array) -> Array:
        heads = leaf.ndim - 2 if leaf.ndim > 3 else None
        return map_device(run, (leaf,), (heads,), heads)

    return jax.tree.map(gather, x)


def map_tokens(
    function: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]], tokens: PyTree[Array], replicated: PyTree[Array]
) -> PyTree[Array]:
    """Runs `function(tokens, replicated)` on the tokens of each device, of which no other token changes the results.

    The compiler would gather all tokens if the function sorts or gathers them.

    Args:
      function: Maps arrays of tokens to arrays of tokens. It must not close over an array with a gradient.
      tokens: Arrays [b, t, ...], split over the axes of rows and of the sequence if these divide them.
      replicated: See `map_shards`.

    Returns:
      The results [b, t, ...].
    """
    sizes, (b, t) = compiler_axes(), jax.tree.leaves(tokens)[0].shape[:2]
    rows = tuple(axis for axis in sizes if axis not in (AXIS, HEAD_AXIS))
    columns, counts = (AXIS,) if AXIS in sizes else (), (math.prod(sizes[axis] for axis in rows), shard_count())
    if counts == (1, 1) or b % counts[0] or t % counts[1]:
        return function(tokens, replicated)
    spec = PartitionSpec(rows, columns)
    return _map_devices(function, tokens, replicated, spec, spec, {*rows, *columns})


def shard_index() -> Int[Array, ""]:
    """Index of the shard; only in `map_shards`."""
    return jax.lax.axis_index(AXIS)


def shift(x: PyTree[Array], by: int) -> PyTree[Array]:
    """In `map_shards`: the arrays of the shard `by` earlier, or later if it is negative; zeros where there is none."""
    count = jax.lax.axis_size(AXIS)
    pairs = [(i, i + by) for i in range(count) if 0 <= i + by < count]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, AXIS, pairs) if pairs else jnp.zeros_like(leaf), x)


def rotate(x: PyTree[Array]) -> PyTree[Array]:
    """In `map_shards`: the arrays of the shard before this one; those of the last shard on the first."""
    count = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, AXIS, [(i, (i + 1) % count) for i in range(count)]), x)


def divides(length: int) -> bool:
    """Whether the sequence is sharded, into equal shards."""
    shards = shard_count()
    return shards > 1 and length % shards == 0


def scan_shards(compose: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]], element: PyTree[Array]) -> Any:
    """In `map_shards`: the parallel prefix over the shards of an associative function, in log2(n) exchanges.

    Args:
      compose: Maps an element of earlier shards and one of later shards to that of both.
      element: The element of this shard.

    Returns:
      The element of all earlier shards together, zeros for the first shard, and that of these and this shard together.
    """
    total, by = element, 1
    while by < jax.lax.axis_size(AXIS):
        joined, follows = compose(shift(total, by), total), shard_index() >= by
        total = jax.tree.map(lambda a, b, follows=follows: jnp.where(follows, a, b), joined, total)
        by *= 2
    return shift(total, 1), total


def carry_state(
    decay: Array, added: Array, state: Array, act: Callable[[Array, Array], Array] = jnp.multiply
) -> tuple[Array, Array]:
    """In `map_shards`: the states before and after this shard, of an affine recurrence.

    Args:
      decay: What the positions of this shard do to a state, by `act`.
      added: The state after this shard, from zeros before it.
      state: The state before the first shard.
      act: Applies a decay to a state; composes two decays if both are decays, the later one first.
    """

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return act(second[0], first[0]), act(second[0], first[1]) + second[1]

    (decay_before, before), (decay_after, after) = scan_shards(compose, (decay, added))
    first = jnp.where(shard_index() == 0, state, act(decay_before, state) + before)
    return first, act(decay_after, state) + after
