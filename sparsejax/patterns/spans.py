"""Sets of tiles as spans of integers, and bounds on the tiles of a pattern.

The tiles of a score matrix are numbered row by row. A set of tiles is then a set of integers, stored as a few
disjoint spans, and the algebra of patterns becomes an algebra of spans: no step touches all `t * s` pairs.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """A set of integers below `limit`: sorted, disjoint, half-open `[start, stop)` rows of an int64 [n, 2]."""

    edges: np.ndarray
    limit: int

    @classmethod
    def union(cls, starts: np.ndarray, stops: np.ndarray, limit: int) -> Spans:
        """The union of any spans `[start, stop)`. Empty spans (`stop <= start`) are dropped."""
        keep = stops > starts
        return cls(cover(starts[keep], stops[keep], depth=1), limit)

    def __and__(self, other: Spans) -> Spans:
        both = np.concatenate([self.edges, other.edges])
        return Spans(cover(both[:, 0], both[:, 1], depth=2), self.limit)

    def __or__(self, other: Spans) -> Spans:
        both = np.concatenate([self.edges, other.edges])
        return Spans(cover(both[:, 0], both[:, 1], depth=1), self.limit)

    def __invert__(self) -> Spans:
        stops = np.append(self.edges[:, 0], self.limit)
        starts = np.insert(self.edges[:, 1], 0, 0)
        return Spans.union(starts, stops, self.limit)

    @property
    def size(self) -> int:
        """Number of integers in the set."""
        return int((self.edges[:, 1] - self.edges[:, 0]).sum())

    def members(self) -> np.ndarray:
        """All integers of the set in ascending order, int64 [n]."""
        lengths = self.edges[:, 1] - self.edges[:, 0]
        before = np.cumsum(lengths) - lengths
        return np.arange(lengths.sum()) + np.repeat(self.edges[:, 0] - before, lengths)


def cover(starts: np.ndarray, stops: np.ndarray, depth: int) -> np.ndarray:
    """The integers that at least `depth` of the spans contain, as sorted disjoint spans, int64 [n, 2]."""
    positions, index = np.unique(np.concatenate([starts, stops]), return_inverse=True)
    change = np.bincount(index[: len(starts)], minlength=len(positions))
    change = change - np.bincount(index[len(starts) :], minlength=len(positions))
    inside = np.cumsum(change) >= depth
    return positions[np.diff(inside, prepend=False)].reshape(-1, 2)


def merge_intervals(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The union of intervals `[start, stop)`, int64 [n], as disjoint intervals that do not touch one another."""
    keep = stop > start
    merged = cover(start[keep], stop[keep], depth=1)
    return merged[:, 0], merged[:, 1]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Lower and upper bounds on the live tiles of a pattern (some allowed pair) and on its full tiles (only such)."""

    live_lower: Spans
    live_upper: Spans
    full_lower: Spans
    full_upper: Spans

    @classmethod
    def exact(cls, live: Spans, full: Spans) -> Bounds:
        """Bounds that leave no tile undecided."""
        return cls(live, live, full, full)

    def __and__(self, other: Bounds) -> Bounds:
        # A tile that both patterns fill is full; a tile that one touches and the other fills is live; a tile that
        # both only touch may still hold no pair of both.
        return Bounds(
            live_lower=(self.live_lower & other.full_lower) | (self.full_lower & other.live_lower),
            live_upper=self.live_upper & other.live_upper,
            full_lower=self.full_lower & other.full_lower,
            full_upper=self.full_upper & other.full_upper,
        )

    def __invert__(self) -> Bounds:
        return Bounds(~self.full_upper, ~self.full_lower, ~self.live_upper, ~self.live_lower)

    def __or__(self, other: Bounds) -> Bounds:
        return ~(~self & ~other)

    def undecided(self) -> Spans:
        """Tiles that the bounds do not prove dead, partial or full."""
        return self.live_upper & (~self.live_lower | (self.full_upper & ~self.full_lower))
