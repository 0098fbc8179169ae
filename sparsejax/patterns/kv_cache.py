"""What a decoder must keep: the cache slots of a pattern, derived from who may still look at a key."""

from __future__ import annotations

import numpy as np

from sparsejax.patterns.base import FOREVER, Pattern


def plan_cache(pattern: Pattern, length: int) -> tuple[np.ndarray, int]:
    """The cache slot of every key position, and how many slots there are.

    Keys that some query arbitrarily far ahead may look at (sinks, globals, everything under `causal`) are
    pinned, each in a slot of its own. The others share a ring just long enough that a key is overwritten only
    after the last query that may look at it.

    Args:
      pattern: any pattern; with heads, one slot table serves all of them.
      length: number of positions that will be decoded, prompt included.

    Returns:
      int32 [length] slots, and the number of slots.
    """
    keys = np.arange(length, dtype=np.int64)
    last = pattern.last_query(keys)
    pinned = last == FOREVER
    count = int(pinned.sum())
    lifetime = int((last - keys + 1)[~pinned].max(initial=0))
    ring = min(max(lifetime, 1), length - count) if count < length else 0
    rank = np.cumsum(~pinned) - 1  # among the keys that share the ring
    slots = np.where(pinned, np.cumsum(pinned) - 1, count + rank % max(ring, 1))
    return slots.astype(np.int32), count + ring
