"""Attention in a ring of shards (arXiv:2310.01889): keys travel from shard to shard, and none holds them all.

In step i shard c attends to the keys of shard c - i and merges the result with that of the steps before by their
log-sum-exp. Meanwhile it sends these keys on. The backward pass sends them round once more, and with them their
gradients, to which every shard adds its share.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.ops import gather
from sparsejax.ops.derivatives import with_derivatives
from sparsejax.ops.sequence import rotate

Keys = tuple[Array, Array, Array | None]  # keys, values and segment ids of a shard, in tiles


class Visits(NamedTuple):
    """The live tiles of a shard, by step.

    Attributes:
      first: Those of its own keys.
      later: Query tiles and their key tiles in each step after the first; a query tile may be listed several times.
      queries: Number of each query tile in the sequence.
      keys: Number of each key tile that it holds in a step.
    """

    first: gather.Groups
    later: tuple[Int[Array, "steps rows"], Int[Array, "steps rows degree"]]
    queries: Int[Array, " rows"]
    keys: Int[Array, "shards rows"]


class Inputs(NamedTuple):
    """The arrays of attention of a shard."""

    q: Float[Array, "b rows tile h d"]
    k: Float[Array, "b rows tile g d"]
    v: Float[Array, "b rows tile g value"]
    sink: Float[Array, " h"] | None
    slopes: Float[Array, " h"] | None
    segments: tuple[Int[Array, "b rows tile"], Int[Array, "b rows tile"]] | None
    visits: Visits

    @property
    def keys(self) -> Keys:
        """What travels."""
        return self.k, self.v, None if self.segments is None else self.segments[1]

    def operands(self, keys: Keys, step: Int[Array, ""] | int, groups: gather.Groups) -> gather.Operands:
        """What a step attends to: these keys, in the tiles of `groups`."""
        k, v, ids = keys
        segments = None if self.segments is None or ids is None else (self.segments[0], ids)
        lists = gather.Lists(groups, self.visits.queries, self.visits.keys[step])
        return gather.Operands(self.q, k, v, self.slopes, segments, lists)


def _plan(plan: gather.TilePlan, groups: gather.Groups) -> gather.TilePlan:
    return dataclasses.replace(plan, masked=(True,) * len(groups))


def _attend_plain(plan: gather.TilePlan, *arrays: Any) -> tuple[Array, Array]:
    """Output and log-sum-exp, of which a sink is the first part."""
    inputs = Inputs(*arrays)
    first, later = inputs.visits.first, inputs.visits.later
    shape = inputs.q.shape[:-1]
    lse = jnp.full(shape, -jnp.inf, plan.dtype) if inputs.sink is None else jnp.broadcast_to(inputs.sink, shape)
    results = jnp.zeros((*shape, inputs.v.shape[-1]), plan.dtype), lse

    def visit(results: tuple[Array, Array], keys: Keys, step: Any, groups: gather.Groups) -> tuple[Array, Array]:
        operands = inputs.operands(keys, step, groups)
        return gather.attend_rows(_plan(plan, groups), results, operands, None, merges=True)

    def pass_on(carry: tuple[Any, Keys], x: tuple[Array, Any]) -> tuple[tuple[Any, Keys], None]:
        results, keys = carry
        return (visit(results, keys, x[0], (x[1],)), rotate(keys)), None

    arriving = rotate(inputs.keys)
    results = visit(results, inputs.keys, 0, first)
    between, last = _split_last(later)
    (results, keys), _ = jax.lax.scan(pass_on, (results, arriving), between)
    return visit(results, keys, *last)


def _split_last(later: tuple[Array, Array]) -> tuple[Any, Any]:
    """The steps between the first and the last with their tiles, and the last step with its group of tiles."""
    steps = jnp.arange(1, len(later[0]) + 1)
    between = steps[:-1], jax.tree.map(lambda x: x[:-1], later)
    return between, (len(steps), (jax.tree.map(lambda x: x[-1], later),))


def _attend_forward(plan: gather.TilePlan, *arrays: Any) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = _attend_plain(plan, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_backward(
    plan: gather.TilePlan, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    """The gradients of keys that travel are complete when they are back on their shard."""
    *arrays, out, lse = residuals
    inputs, sums = Inputs(*arrays), gather.summarize(out, lse, cotangents)
    dq, dk, dv = (jnp.zeros(x.shape, plan.dtype) for x in inputs[:3])

    def visit(dq: Array, of_keys: tuple[Array, Array], keys: Keys, step: Any, groups: gather.Groups) -> Any:
        operands = inputs.operands(keys, step, groups)
        dq, *of_keys = gather.differentiate_rows(_plan(plan, groups), (dq, *of_keys), operands, sums)
        return dq, tuple(of_keys)

    def pass_on(carry: tuple[Array, Any, Keys], x: tuple[Array, Any]) -> tuple[tuple[Array, Any, Keys], None]:
        dq, of_keys, keys = carry
        dq, of_keys = visit(dq, of_keys, keys, x[0], (x[1],))
        return (dq, rotate(of_keys), rotate(keys)), None

    arriving = rotate(inputs.keys)
    dq, local = visit(dq, (dk, dv), inputs.keys, 0, inputs.visits.first)
    between, last = _split_last(inputs.visits.later)
    (dq, of_keys, keys), _ = jax.lax.scan(pass_on, (dq, (dk, dv), arriving), between)
    dq, of_keys = visit(dq, of_keys, keys, *last)
    dk, dv = jax.tree.map(jnp.add, local, rotate(of_keys))
    d_sink = None if inputs.sink is None else gather.differentiate_sink(inputs.sink, sums)
    gradients = (d.astype(x.dtype) for d, x in zip((dq, dk, dv), inputs[:3], strict=True))
    return *gradients, d_sink, None, None, None


attend_ring = with_derivatives(_attend_forward, _attend_backward, _attend_plain)
