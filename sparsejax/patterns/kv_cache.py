"""The KV-cache slots of a pattern, derived from the last query that attends to each key."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsejax.patterns.base import FOREVER, Pattern, Positions, array_module


@dataclasses.dataclass(frozen=True, eq=False)
class CachePlan:
    """The cache slot of every key position.

    Attributes:
      slots: Slot of each key, int32 [length].
      count: Number of slots.
      pinned: Number of slots at the start whose key is never overwritten; the others are a ring.
      overwritten: The key that overwrites each key, int32 [length]; `length` for none.
    """

    slots: np.ndarray
    count: int
    pinned: int
    overwritten: np.ndarray
    _keys: np.ndarray  # the pinned keys, then the keys of the ring, each in order
    _ranks: np.ndarray  # number of keys of the ring before each position, int32 [length + 1]

    def held(self, end: Positions) -> Positions:
        """The key in each slot after the keys before position `end` were written, in order; -1 in an empty slot.

        Args:
          end: Integer positions from 0 to `length`, NumPy or jax.numpy, [...].

        Returns:
          Integers [..., count].
        """
        xp, end, ring = array_module(end), end[..., None], self.count - self.pinned
        pinned, others = np.split(self._keys, [self.pinned])
        newest = xp.asarray(self._ranks)[end] - 1  # index of the latest key of the ring
        index = newest - (newest - np.arange(ring)) % max(ring, 1)
        keys = xp.asarray(np.append(others, -1))[xp.maximum(index, 0)]
        return xp.concatenate([xp.where(pinned < end, pinned, -1), xp.where(index >= 0, keys, -1)], -1)


def plan_cache(pattern: Pattern, length: int) -> CachePlan:
    """Assigns a cache slot to every key position.

    Keys to which queries arbitrarily far ahead attend (sinks, globals, everything under `causal`) are pinned, each in
    its own slot. The others share a ring just long enough that a key is overwritten only after the last query that
    attends to it.

    Args:
      pattern: Any pattern. With heads, one plan serves all of them.
      length: Number of positions to decode, including the prompt.
    """
    keys = np.arange(length, dtype=np.int64)
    last = pattern.last_query(keys)
    pinned = last == FOREVER
    count = int(pinned.sum())
    lifetime = int((np.minimum(last, length - 1) - keys + 1)[~pinned].max(initial=0))
    ring = min(max(lifetime, 1), length - count) if count < length else 0
    rank = np.cumsum(~pinned) - 1  # among the keys that share the ring
    slots = np.where(pinned, np.cumsum(pinned) - 1, count + rank % max(ring, 1))
    others, overwritten = keys[~pinned], np.full(length, length)
    overwritten[others[: max(len(others) - ring, 0)]] = others[ring:]
    order, ranks = np.concatenate([keys[pinned], others]), np.concatenate([[0], np.cumsum(~pinned)])
    slots, overwritten, order, ranks = (x.astype(np.int32) for x in (slots, overwritten, order, ranks))
    return CachePlan(slots, count + ring, count, overwritten, order, ranks)
