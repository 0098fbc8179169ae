"""The KV-cache slots of a pattern, derived from the last query that attends to each key."""

from __future__ import annotations

import numpy as np

from sparsejax.patterns.base import FOREVER, Pattern


def plan_cache(pattern: Pattern, length: int) -> tuple[np.ndarray, int]:
    """The cache slot of every key position, and the number of slots.

    Keys to which queries arbitrarily far ahead attend (sinks, globals, everything under `causal`) are pinned, each in
    its own slot. The others share a ring just long enough that a key is overwritten only after the last query that
    attends to it.

    Args:
      pattern: Any pattern. With heads, one slot table serves all of them.
      length: Number of positions to decode, including the prompt.

    Returns:
      The slots, int32 [length], and the number of slots.
    """
    keys = np.arange(length, dtype=np.int64)
    last = pattern.last_query(keys)
    pinned = last == FOREVER
    count = int(pinned.sum())
    lifetime = int((np.minimum(last, length - 1) - keys + 1)[~pinned].max(initial=0))
    ring = min(max(lifetime, 1), length - count) if count < length else 0
    rank = np.cumsum(~pinned) - 1  # among the keys that share the ring
    slots = np.where(pinned, np.cumsum(pinned) - 1, count + rank % max(ring, 1))
    return slots.astype(np.int32), count + ring
