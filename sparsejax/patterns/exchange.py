"""What the shards of a sequence exchange under a pattern: which keys each shard reads of the others.

Shards are contiguous. Keys travel in tiles of the layout, so that every list follows from the pattern alone. A key tile
travels in one of three ways, and the plan with the fewest bytes is chosen:

  * by hops: shard c sends tiles to shard c + d. Windows read the last tiles of their neighbours (a halo); random tiles
    and lists of blocks read a few tiles of some shards;
  * pinned: tiles that almost every shard reads, as those of sinks and globals, are broadcast;
  * gathered: if that is no more, every shard reads all of them. The late half of the queries of shard c is then
    exchanged with that of shard n - 1 - c, so that causal attention is equal work for all shards.

Query tiles that read almost all shards, as those of bidirectional globals, are pinned too: their queries are broadcast,
every shard attends to the keys that it holds, and the parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from sparsejax.patterns.base import Pattern
from sparsejax.patterns.layout import TileLayout

PINNED = 0.75  # fraction of the other shards that must read a tile, or be read by one, before it can be pinned
UNEVEN = 1.1  # largest ratio of the live tiles of the busiest shard to the mean, without the exchange of queries
UNEVEN_HOPS = 1.4  # the same for hops that send as much as an all-gather, after which queries can be exchanged
TARGET = 64  # tokens of a tile: at most this many, if a shard has a divisor from a quarter of it on


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """The tiles that shards exchange, and the live tiles of each shard. Tiles are numbered in the whole sequence.

    Attributes:
      shards: Number of shards, n.
      tile: Tokens per tile; a shard holds `rows` tiles of queries and of keys.
      rows: Tiles per shard, r.
      gathered: Whether every shard reads all key tiles.
      swapped: Number of query tiles at the end of a shard that the mirrored shard computes.
      hops: Tiles that shard c sends to shard c + d, by d: int32 [n, m], counted from its first tile, -1 where padded.
      pinned_keys: Key tiles that are broadcast, int32 [p].
      pinned_queries: Query tiles that are broadcast, int32 [q].
      layout: The live tiles of the whole sequence.
      ring: Whether gathered keys travel from shard to shard instead, and are swapped as the queries are: then the work
        of all shards is equal in every step.
    """

    shards: int
    tile: int
    rows: int
    gathered: bool
    swapped: int
    hops: Mapping[int, np.ndarray]
    pinned_keys: np.ndarray
    pinned_queries: np.ndarray
    layout: TileLayout
    ring: bool = False

    @property
    def kind(self) -> str:
        """The exchange in a few words, such as "halo + pinned"."""
        kinds = []
        if self.gathered:
            kinds.append(("ring" if self.ring else "all-gather") + " with mirror swap" * bool(self.swapped))
        if self.hops:
            kinds.append("halo" if self._is_halo else "tiles")
        if len(self.pinned_keys) or len(self.pinned_queries):
            kinds.append("pinned")
        return " + ".join(kinds) or "none"

    @property
    def _is_halo(self) -> bool:
        """Whether every hop sends the tiles next to the border that it crosses, of equal number for all shards."""
        for hop, sent in self.hops.items():
            senders = range(max(0, -hop), min(self.shards, self.shards - hop))
            end = sent.shape[1]
            expected = np.arange(self.rows - end, self.rows) if hop > 0 else np.arange(end)
            if any(list(sent[c]) != list(expected) for c in senders):
                return False
        return True

    @property
    def queries(self) -> np.ndarray:
        """The query tiles that each shard computes, int32 [n, r], without regard to pinned ones."""
        tiles = np.arange(self.shards * self.rows, dtype=np.int32).reshape(self.shards, self.rows)
        if self.swapped:
            tiles[:, self.rows - self.swapped :] = tiles[::-1, self.rows - self.swapped :]
        return tiles

    @property
    def keys(self) -> np.ndarray:
        """The key tiles in the order in which a shard holds them after the exchange, int32 [n, slots], or -1."""
        n, r = self.shards, self.rows
        tiles = np.arange(n * r, dtype=np.int32).reshape(n, r)
        if self.gathered:
            return np.tile(tiles.ravel(), (n, 1))
        slots = [tiles, np.tile(self.pinned_keys, (n, 1))]
        for hop, sent in self.hops.items():
            source = np.arange(n) - hop
            inside = (source >= 0) & (source < n)
            received = sent[np.clip(source, 0, n - 1)]
            slots.append(np.where(inside[:, None] & (received >= 0), received + source[:, None] * r, -1))
        return np.concatenate(slots, axis=1).astype(np.int32)

    def live(self) -> list[list[np.ndarray]]:
        """The slots of the live key tiles of each query tile of `queries`, by shard; none of a pinned query tile."""
        starts, columns = self.layout.starts, self.layout.columns
        pinned = set(self.pinned_queries.tolist())
        lists = []
        for queries, keys in zip(self.queries, self.keys, strict=True):
            slot = np.full(self.shards * self.rows, -1, np.int32)
            order = np.arange(len(keys), dtype=np.int32)[::-1]  # of equal tiles the first slot is used
            slot[keys[order][keys[order] >= 0]] = order[keys[order] >= 0]
            empty = columns[:0]
            lists.append([slot[empty if i in pinned else columns[starts[i] : starts[i + 1]]] for i in queries.tolist()])
        return lists

    def visits(self, step: int) -> list[list[np.ndarray]]:
        """The live key tiles of each query tile of `queries`, by shard, in step `step` of a ring.

        Shard c then holds the key tiles `queries[c - step]`, in whose positions the tiles are.
        """
        starts, columns, lists = self.layout.starts, self.layout.columns, []
        for queries, held in zip(self.queries, np.roll(self.queries, step, axis=0), strict=True):
            slot = np.full(self.shards * self.rows, -1, np.int32)
            slot[held] = np.arange(self.rows, dtype=np.int32)
            live = [slot[columns[starts[i] : starts[i + 1]]] for i in queries.tolist()]
            lists.append([slots[slots >= 0] for slots in live])
        return lists

    def live_pinned(self) -> list[list[np.ndarray]]:
        """The key tiles that each shard holds of each pinned query tile, counted from its first tile, by shard."""
        starts, columns = self.layout.starts, self.layout.columns
        rows = [columns[starts[i] : starts[i + 1]] for i in self.pinned_queries.tolist()]
        return [[row[row // self.rows == c] - c * self.rows for row in rows] for c in range(self.shards)]

    @property
    def tiles_per_shard(self) -> np.ndarray:
        """Number of live tiles that each shard computes, int64 [n]."""
        ordinary = [sum(map(len, rows)) for rows in self.live()]
        pinned = [sum(map(len, rows)) for rows in self.live_pinned()]
        return np.array(ordinary) + np.array(pinned)

    @property
    def key_tokens(self) -> int:
        """Tokens whose keys and values a shard receives: of all-gather or ring, hops and broadcasts."""
        gathered = (self.shards - 1) * self.rows if self.gathered else 0
        return self.tile * (gathered + sum(sent.shape[1] for sent in self.hops.values()) + len(self.pinned_keys))


def choose_tile(tokens: int) -> int:
    """Tokens per tile of a shard of `tokens`: a divisor near `TARGET`, if possible of two tiles or more."""
    divisors = [tile for tile in range(1, tokens + 1) if tokens % tile == 0]
    small = [tile for tile in divisors if TARGET // 4 <= tile <= min(TARGET, max(tokens // 2, TARGET // 4))]
    return small[-1] if small else next((tile for tile in divisors if tile > TARGET // 4), tokens)


@functools.lru_cache(maxsize=256)
def plan_exchange(pattern: Pattern, length: int, shards: int, ring: bool = False, tile: int | None = None) -> Exchange:
    """The exchange with the fewest tiles for `length` tokens, which `shards` divides, under a pattern of one head.

    Args:
      pattern: The pattern.
      length: Tokens of the sequence.
      shards: Number of shards.
      ring: Whether keys that would be gathered travel from shard to shard.
      tile: Tokens per tile, a divisor of those of a shard; defaults to `choose_tile`.
    """
    if ring:
        plan = plan_exchange(pattern, length, shards, tile=tile)
        return dataclasses.replace(plan, ring=plan.gathered)
    tile = tile or choose_tile(length // shards)
    rows = length // shards // tile
    layout = pattern.layout(length, length, (tile, tile))
    assert isinstance(layout, TileLayout)
    read = np.zeros((shards * rows, shards), bool)  # which shards a query tile reads
    read[layout.rows, layout.columns // rows] = True
    others = read.sum(axis=1) - read[np.arange(shards * rows), np.arange(shards * rows) // rows]
    wide = np.flatnonzero(others >= max(2, PINNED * (shards - 1))).astype(np.int32)
    none = np.zeros(0, np.int32)
    options = [_plan(layout, shards, rows, tile, queries) for queries in ([none, wide] if len(wide) else [none])]
    options = [plan for plan in options if not plan.gathered] or options[:1]
    return min(options, key=_cost)


def _cost(plan: Exchange) -> int:
    """Tiles that a shard receives; a broadcast of a query tile also returns its output."""
    return plan.key_tokens // plan.tile + len(plan.pinned_keys) + 4 * len(plan.pinned_queries)


def _plan(layout: TileLayout, shards: int, rows: int, tile: int, pinned_queries: np.ndarray) -> Exchange:
    """The cheapest exchange of keys with these query tiles pinned."""
    ordinary = ~np.isin(layout.rows, pinned_queries)
    reads = np.zeros((shards, shards * rows), bool)  # which shards read a key tile
    reads[layout.rows[ordinary] // rows, layout.columns[ordinary]] = True
    owner = np.arange(shards * rows) // rows
    reads[owner, np.arange(shards * rows)] = False
    popular = np.flatnonzero(reads.sum(axis=0) >= max(2, PINNED * (shards - 1))).astype(np.int32)
    plans = []
    for pinned in [popular[:0], popular] if len(popular) else [popular]:
        rest = reads.copy()
        rest[:, pinned] = False
        hops = _list_hops(rest, shards, rows)
        plans.append(Exchange(shards, tile, rows, False, 0, hops, pinned, pinned_queries, layout))
    best = min(plans, key=_cost)
    gathered = Exchange(shards, tile, rows, True, 0, {}, popular[:0], popular[:0], layout)
    counts = layout.degrees.reshape(shards, rows).sum(axis=1)
    uneven = counts.max() / max(counts.mean(), 1)
    if _cost(best) < _cost(gathered) or (_cost(best) == _cost(gathered) and uneven <= UNEVEN_HOPS):
        return best
    if uneven <= UNEVEN:
        return gathered
    return dataclasses.replace(gathered, swapped=rows // 2)


def _list_hops(reads: np.ndarray, shards: int, rows: int) -> dict[int, np.ndarray]:
    """The tiles that each shard sends by hop, see `Exchange.hops`."""
    hops = {}
    for hop in sorted(range(1 - shards, shards), key=lambda hop: (abs(hop), -hop)):
        senders = [c for c in range(shards) if 0 <= c + hop < shards]
        lists = {c: np.flatnonzero(reads[c + hop, c * rows : (c + 1) * rows]) for c in senders if hop}
        widest = max(map(len, lists.values()), default=0)
        if widest:
            sent = np.full((shards, widest), -1, np.int32)
            for c, tiles in lists.items():
                sent[c, : len(tiles)] = tiles
            hops[hop] = sent
    return hops
