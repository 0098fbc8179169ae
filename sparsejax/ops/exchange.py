"""Attention over a sharded sequence: shards exchange the keys that the pattern lets them read, and attend to those.

What travels follows from the pattern, see `sparsejax.patterns.exchange`. The keys and values of a hop are one
`ppermute`; broadcasts are sums over the shards, of which one is not zero. Gradients travel backwards along the same
ways. Keys that all shards read are gathered, or travel in a ring if the implementation is "ring". A shard attends with
"gather" or with a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from sparsejax.errors import InputError
from sparsejax.ops import gather, ring
from sparsejax.ops.call import AttentionCall, by_pattern
from sparsejax.ops.kernels.lists import ShardedTiles
from sparsejax.ops.selection import Selection
from sparsejax.ops.sequence import (
    AXIS,
    divides,
    gather_shards,
    map_queries,
    map_shards,
    shard_count,
    shard_index,
    shift,
)
from sparsejax.ops.softmax import log_sum
from sparsejax.patterns import Pattern
from sparsejax.patterns.exchange import Exchange, plan_exchange

TILED = "auto", "gather", "ring", "tpu", "gpu"  # implementations that attend to lists of tiles
NOWHERE = np.iinfo(np.int32).max // 2  # index of a tile whose result is dropped

Tiles = Shaped[Array, "b _ tile ..."]  # how many tiles, and which features, differs between arrays


class Kernel(NamedTuple):
    """A kernel that attends to the tiles of a shard.

    Attributes:
      run: Maps the call of a shard, queries and keys per tile, and the live tiles of all shards to the output and the
        log-sum-exp.
      choose_tile: The best tile for a pattern over a number of queries and keys, of sides to choose from.
      sides: Sides of tiles, in tokens.
    """

    run: Callable[[AttentionCall, tuple[int, int], ShardedTiles], tuple[Array, Array]]
    choose_tile: Callable[[Pattern, int, int, Sequence[int]], tuple[int, int]]
    sides: tuple[int, ...]

    def list_sides(self, tokens: int) -> tuple[int, ...]:
        """The sides that divide the tokens of a shard, if possible into two tiles or more."""
        dividing = tuple(side for side in self.sides if tokens % side == 0)
        return tuple(side for side in dividing if tokens > side) or dividing


def applies(call: AttentionCall, impl: str) -> bool:
    """Whether the call is for a whole sequence that is sharded, and shards exchange the keys of a pattern.

    The compiler partitions "dense" and "segment".

    Raises:
      InputError: The shards do not divide the sequence, or the implementation does not attend to tiles.
    """
    (t, s), shards = (call.q.shape[1], call.k.shape[1]), shard_count()
    if shards == 1 or t != s or call.q_offset or call.selection is not None or impl in ("dense", "segment"):
        return False
    if impl not in TILED:
        raise InputError("impl", f"{impl!r} does not exchange keys between {shards} shards of a sequence; use 'auto'")
    if t % shards:
        raise InputError("q", f"{t} tokens cannot be split evenly over the {shards} shards of the sequence")
    return True


def gathers(call: AttentionCall) -> bool:
    """Whether the call is for a whole sequence that is sharded, and its queries chose among the keys of all shards."""
    return call.selection is not None and not call.q_offset and divides(call.q.shape[1])


def run_selected(
    call: AttentionCall, run: Callable[[AttentionCall], tuple[Array, Array | None]]
) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"] | None]:
    """Output and log-sum-exp of attention to chosen keys, by a function of the call of a shard.

    Keys and values are gathered: which of them a shard reads is known only when the program runs.
    """
    selection, (q_ids, k_ids) = call.selection, (None, None) if call.segments is None else call.segments
    assert selection is not None

    def attend(queries: tuple[Any, ...], keys: tuple[Any, ...], held: tuple[Any, ...]) -> tuple[Array, Array | None]:
        (q, q_ids, groups), (k, v, k_ids), (blocks, sink, slopes) = queries, keys, held
        segments = None if q_ids is None else (q_ids, k_ids)
        arrays = {"q": q, "k": k, "v": v, "segments": segments, "sink_logits": sink, "alibi_slopes": slopes}
        chosen = Selection(jnp.moveaxis(groups, 1, 2), blocks)
        return run(dataclasses.replace(call, **arrays, selection=chosen, shard_of=call.q.shape[1]))

    queries, keys = (call.q, q_ids, jnp.moveaxis(selection.groups, 2, 1)), (call.k, call.v, k_ids)
    return map_queries(attend, queries, keys, (selection.blocks, call.sink_logits, call.alibi_slopes))


def unsupported_in_ring(call: AttentionCall) -> str | None:
    """Why "ring" cannot compute the call on one shard, or None."""
    if call.selection is not None:
        return "keys that the data select do not travel in a ring"
    return gather.unsupported_reason(call)


def run(
    call: AttentionCall, in_ring: bool, kernel: Kernel | None
) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    """Output and log-sum-exp of a whole sequence; see `attend`.

    Args:
      call: The call.
      in_ring: Whether keys that would be gathered travel in a ring, which no kernel reads.
      kernel: What attends to the keys of a shard, apart from pinned queries; None for "gather".
    """
    return by_pattern(call, functools.partial(_run_pattern, in_ring=in_ring, kernel=kernel))


class Arrays(NamedTuple):
    """The arrays of a shard, in tiles."""

    q: Tiles
    k: Tiles
    v: Tiles
    q_segments: Tiles | None
    k_segments: Tiles | None

    @property
    def keys(self) -> tuple[Tiles, Tiles, Tiles | None]:
        """Everything that travels with a key."""
        return self.k, self.v, self.k_segments


def _run_pattern(
    call: AttentionCall, in_ring: bool, kernel: Kernel | None
) -> tuple[Float[Array, "b t h value"], Float[Array, "b t h"]]:
    (b, t, h), shards, tile = call.q.shape[:3], shard_count(), None
    if kernel is not None:
        tile, _ = kernel.choose_tile(call.pattern, t, t, kernel.list_sides(t // shards))
    plan = plan_exchange(call.pattern, t, shards, in_ring, tile)
    segments = (None, None) if call.segments is None else call.segments

    def attend(arrays: tuple, per_head: tuple) -> tuple[Array, Array]:
        tiles = Arrays(*(None if x is None else x.reshape(b, plan.rows, plan.tile, *x.shape[2:]) for x in arrays))
        out, lse = _attend_shard(plan, call, kernel, tiles, *per_head)
        return out.reshape(b, -1, *out.shape[3:]), lse.reshape(b, -1, h)

    out, lse = map_shards(attend, (call.q, call.k, call.v, *segments), (call.sink_logits, call.alibi_slopes))
    return out.astype(call.q.dtype), lse


def _attend_shard(
    plan: Exchange,
    call: AttentionCall,
    kernel: Kernel | None,
    arrays: Arrays,
    sink: Array | None,
    slopes: Array | None,
) -> tuple[Float[Array, "b rows tile h value"], Float[Array, "b rows tile h"]]:
    """Output and log-sum-exp of the queries of a shard."""
    (q,), (k, v, k_segments) = _swap(plan, (arrays.q,)), _collect(plan, arrays.keys)
    (q_segments,) = (None,) if arrays.q_segments is None else _swap(plan, (arrays.q_segments,))
    gathered = Arrays(q, k, v, q_segments, k_segments)
    if plan.ring:
        out, lse = _attend_ring(plan, call, gathered, sink, slopes)
    elif kernel is not None:
        local = _local_call(call, gathered, sink, slopes)
        results = kernel.run(local, (plan.tile, plan.tile), _list_tiles(plan))
        out, lse = (x.reshape(*q.shape[:3], *x.shape[2:]) for x in results)
    else:
        lists = _group(plan.live(), plan.queries, plan.keys)
        out, lse = _attend(plan, call, gathered, lists, sink, slopes)
    results = _swap(plan, (out, lse)) if call.return_lse else (*_swap(plan, (out,)), lse)  # an unused one stays
    if len(plan.pinned_queries):
        results = _merge_pinned(plan, call, arrays, sink, slopes, results)
    return results


def _attend(
    plan: Exchange, call: AttentionCall, arrays: Arrays, lists: gather.Lists, sink: Array | None, slopes: Array | None
) -> tuple[Array, Array]:
    """Attention of the query tiles of a shard to the key tiles that it holds."""
    length = plan.shards * plan.rows * plan.tile
    call = _local_call(call, arrays, sink, slopes)
    return gather.attend_tiles(call, plan.tile, lists, (True,) * len(lists.groups), (length, length))


def _local_call(call: AttentionCall, arrays: Arrays, sink: Array | None, slopes: Array | None) -> AttentionCall:
    """The call of the tiles of a shard."""
    q, k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in arrays[:3])
    segments = None
    if arrays.q_segments is not None and arrays.k_segments is not None:
        segments = tuple(x.reshape(x.shape[0], -1) for x in arrays[3:])
    return dataclasses.replace(call, q=q, k=k, v=v, segments=segments, sink_logits=sink, alibi_slopes=slopes)


@functools.lru_cache(maxsize=64)
def _list_tiles(plan: Exchange) -> ShardedTiles:
    """The live tiles of all shards."""
    starts, live = plan.layout.starts, plan.live()
    rows = [np.repeat(np.arange(plan.rows), [len(slots) for slots in lists]) for lists in live]
    columns = [np.concatenate(lists) for lists in live]
    indices = [
        np.concatenate([starts[i] + np.arange(len(slots)) for i, slots in zip(queries, lists, strict=True)])
        for queries, lists in zip(plan.queries.tolist(), live, strict=True)
    ]
    return ShardedTiles(plan.layout, (plan.rows, plan.keys.shape[1]), rows, columns, indices)


def _attend_ring(
    plan: Exchange, call: AttentionCall, arrays: Arrays, sink: Array | None, slopes: Array | None
) -> tuple[Array, Array]:
    """Attention of the query tiles of a shard to the key tiles of all shards, which visit it in turn."""
    q, k, v, q_segments, k_segments = arrays
    segments = None if q_segments is None or k_segments is None else (q_segments, k_segments)
    per_head = (None if x is None else x.astype(call.dtype) for x in (sink, slopes))
    length = plan.shards * plan.rows * plan.tile
    static = gather.TilePlan.of_call(call, plan.tile, (), (length, length))
    return ring.attend_ring(static, q, k, v, *per_head, segments, _list_visits(plan))


def _list_visits(plan: Exchange) -> ring.Visits:
    """The tiles of this shard in each step of a ring.

    After the first step the tiles of a row are cut into runs, so that all shards have as many in every step: of causal
    attention with a mirror swap, a shard has half of the tiles of each row, or all tiles of half of the rows.
    """
    n, r = plan.shards, plan.rows
    first = _group(plan.visits(0), plan.queries, plan.queries)
    later = [plan.visits(step) for step in range(1, n)]
    degrees = np.array([[[len(live) for live in rows] for rows in shards] for shards in later])
    sizes = sorted({-(-r // parts) for parts in (1, 2, 4)}, reverse=True)
    counts = [int((-(-degrees // size)).sum(axis=-1).max()) for size in sizes]
    count, size = min(zip(counts, sizes, strict=True), key=lambda option: option[0] * option[1])
    rows = np.full((n, n - 1, count), NOWHERE, np.int32)
    columns = np.full((n, n - 1, count, size), -1, np.int32)
    for step, shards in enumerate(later):
        for shard, lists in enumerate(shards):
            runs = [(row, live[i : i + size]) for row, live in enumerate(lists) for i in range(0, len(live), size)]
            for i, (row, live) in enumerate(runs):
                rows[shard, step, i] = row
                columns[shard, step, i, : len(live)] = live
    held = np.stack([np.roll(plan.queries, step, axis=0) for step in range(n)], axis=1)
    return ring.Visits(first.groups, (_of_shard(rows), _of_shard(columns)), _of_shard(plan.queries), _of_shard(held))


def _group(live: list[list[np.ndarray]], queries: np.ndarray, keys: np.ndarray) -> gather.Lists:
    """The lists of this shard, in groups of equal size on all shards.

    Args:
      live: Key tiles of each query tile, by shard, in positions of `keys`.
      queries: Number of each query tile in the sequence, [n, rows].
      keys: Number of each key tile in the sequence, [n, slots].
    """
    degrees = np.array([[len(columns) for columns in rows] for rows in live])
    groups, low = [], -1
    for high in gather.split_degrees(degrees.ravel()):
        members = [np.flatnonzero((row > low) & (row <= high)) for row in degrees]
        count = max(map(len, members))
        rows = np.full((len(live), count), NOWHERE, np.int32)
        columns = np.full((len(live), count, max(high, 1)), -1, np.int32)
        for shard, indices in enumerate(members):
            rows[shard, : len(indices)] = indices
            for i, row in enumerate(indices):
                columns[shard, i, : degrees[shard, row]] = live[shard][row]
        groups.append((_of_shard(rows), _of_shard(columns)))
        low = high
    return gather.Lists(tuple(groups), _of_shard(queries), _of_shard(keys))


def _of_shard(table: np.ndarray) -> Array:
    """The entry of this shard in a table [n, ...]."""
    return jnp.asarray(table)[shard_index()]


def _swap(plan: Exchange, arrays: tuple[Tiles, ...]) -> tuple[Tiles, ...]:
    """Exchanges the last query tiles with the mirrored shard; its own inverse."""
    if not plan.swapped:
        return arrays
    kept = plan.rows - plan.swapped
    mirror = [(c, plan.shards - 1 - c) for c in range(plan.shards)]
    return tuple(jnp.concatenate([x[:, :kept], jax.lax.ppermute(x[:, kept:], AXIS, mirror)], axis=1) for x in arrays)


def _collect(plan: Exchange, arrays: tuple[Tiles | None, ...]) -> tuple[Tiles | None, ...]:
    """The key tiles that a shard reads, in the order of `Exchange.keys`; in a ring those with which it begins."""
    if plan.ring:
        k, v, segments = arrays
        k, v = _swap(plan, (k, v))
        return k, v, None if segments is None else _swap(plan, (segments,))[0]
    packed, unpack = _pack(arrays)
    parts = []
    for x in packed:
        if plan.gathered:
            parts.append(gather_shards(x))
            continue
        slots = [x, _broadcast(plan, x, plan.pinned_keys)]
        slots += [shift(x[:, _of_shard(np.maximum(sent, 0))], hop) for hop, sent in plan.hops.items()]
        parts.append(jnp.concatenate(slots, axis=1))
    return unpack(parts)


def _pack(arrays: tuple[Tiles | None, ...]):
    """Keys and values side by side, so that they travel together, and the function that separates them."""
    k, v, segments = arrays
    packed = [jnp.concatenate([k, v], axis=-1), *([] if segments is None else [segments])]

    def unpack(parts: list[Tiles]) -> tuple[Tiles | None, ...]:
        keys, values = jnp.split(parts[0], [k.shape[-1]], axis=-1)
        return keys, values, None if segments is None else parts[1]

    return packed, unpack


def _broadcast(plan: Exchange, x: Tiles, tiles: np.ndarray) -> Tiles:
    """Tiles of the sequence that one shard holds each, on all shards."""
    if not len(tiles):
        return x[:, :0]
    held = jnp.asarray(tiles // plan.rows) == shard_index()
    mine = x[:, jnp.asarray(tiles % plan.rows)]
    return jax.lax.psum(jnp.where(held.reshape(-1, *[1] * (x.ndim - 2)), mine, 0), AXIS)


def _merge_pinned(
    plan: Exchange,
    call: AttentionCall,
    arrays: Arrays,
    sink: Array | None,
    slopes: Array | None,
    results: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Replaces the results of pinned query tiles: every shard attends to the keys that it holds, parts are merged."""
    tiles, n, r = plan.pinned_queries, plan.shards, plan.rows
    sink = None if sink is None else jnp.where(shard_index() == 0, sink, -jnp.inf)  # it counts once
    q = _broadcast(plan, arrays.q, tiles)
    segments = None if arrays.q_segments is None else _broadcast(plan, arrays.q_segments, tiles)
    keys = np.arange(n * r, dtype=np.int32).reshape(n, r)
    lists = _group(plan.live_pinned(), np.tile(tiles, (n, 1)), keys)
    out, lse = _attend(plan, call, arrays._replace(q=q, q_segments=segments), lists, sink, slopes)
    largest = jax.lax.pmax(jax.lax.stop_gradient(lse), AXIS)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weight = jnp.exp(lse - largest)
    total = jax.lax.psum(weight, AXIS)
    out = jax.lax.psum(out * weight[..., None], AXIS) / jnp.where(total == 0, 1.0, total)[..., None]
    merged = out, log_sum(largest, total)
    held = np.where(tiles // r == np.arange(n)[:, None], tiles % r, NOWHERE)
    return tuple(x.at[:, _of_shard(held)].set(y, mode="drop") for x, y in zip(results, merged, strict=True))
