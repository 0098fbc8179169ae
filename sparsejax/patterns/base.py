"""What a pattern is, and how patterns combine: `&`, `|`, `-`, `shift` and `per_head`.

A pattern says which keys each query may look at. It is a small frozen value, written once; the mask, the
tile layout, the pair count, the decode cache and the text form are all derived from it. A new pattern is one
subclass in `library.py` that states `allows` and `bounds`, and `last_query` and `lookahead` if it has any.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import operator
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from sparsejax.patterns.layout import Bounds, TileGrid, TileLayout, build_layout, count_pairs, list_pairs

FOREVER = np.iinfo(np.int64).max
FARTHEST = 2**30  # sums of two positions stay within the int32 of a compiled program, where overflow is silent


class PatternError(ValueError):
    """A pattern that cannot be: a bad argument, a bad combination, or text that does not parse."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Who may look at whom. Subclasses are frozen dataclasses whose fields are the arguments of the text form.

    Positions count from 0, for queries and keys alike; lengths `t` (queries) and `s` (keys) are in tokens.
    """

    name: ClassVar[str]

    # What each pattern states of itself.

    def allows(self, q: Any, k: Any, t: int | None = None, s: int | None = None) -> Any:
        """Whether query position `q` may look at key position `k`.

        Args:
          q: integer positions, NumPy or jax.numpy (traced ones too), broadcastable with `k`.
          k: integer positions.
          t: number of queries; needed only by patterns that count from the end.
          s: number of keys; likewise.

        Returns:
          Booleans of the broadcast shape; a pattern with heads puts a leading axis `h` before it.
        """
        raise NotImplementedError

    def counts(self, q: Any, k: Any, t: int | None = None, s: int | None = None) -> Any:
        """How often query `q` has key `k` among its keys: `allows` as integers, or more inside of `multiset`."""
        return self.allows(q, k, t, s) * 1

    def bounds(self, grid: TileGrid) -> Bounds:
        """Which tiles of the grid hold an allowed pair (live) and which hold only allowed pairs (full)."""
        raise NotImplementedError

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        """Integers that fix what a tile of the grid holds, given its first query and key, each [n].

        Two tiles with equal signatures hold the same pairs, so that each is examined once. The positions
        themselves always serve; a pattern that repeats itself returns less.
        """
        return [q0, k0]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        """The last query that may look at key `k` (int64 [n]); infinity is `patterns.FOREVER`.

        An upper bound is allowed: it only makes a decode cache larger.
        """
        return np.full_like(k, FOREVER)

    def lookahead(self) -> float:
        """How many positions past its own a query may see at most (an upper bound, `math.inf` if unbounded)."""
        return math.inf

    def check(self, t: int, s: int) -> None:
        """Raises PatternError if the pattern means something that `t` queries and `s` keys do not have."""

    # What follows from it.

    @property
    def heads(self) -> int | None:
        """Number of heads the pattern distinguishes, or None when all heads share it."""
        return None

    @property
    def repeats(self) -> bool:
        """Whether a key may count more than once in the softmax, see `multiset`."""
        return False

    def for_head(self, index: int) -> Pattern:
        """The pattern of one head."""
        return self

    def dense(self, t: int, s: int | None = None) -> np.ndarray:
        """The mask as np.bool_ [t, s]; [h, t, s] for a pattern with heads. The oracle: for small inputs."""
        s = t if s is None else s
        return np.asarray(self.allows(np.arange(t)[:, None], np.arange(s)[None, :], t, s))

    def layout(
        self, t: int, s: int | None = None, tile: tuple[int, int] = (128, 128)
    ) -> TileLayout | tuple[TileLayout, ...]:
        """The live tiles, exactly, in time and memory proportional to their number.

        Args:
          t: number of queries.
          s: number of keys, `t` if not given.
          tile: queries and keys of a tile.

        Returns:
          A TileLayout; for a pattern with heads a tuple of one for each head (equal heads share theirs).

        Raises:
          PatternError: a length below 0 or a tile size below 1.
        """
        s = t if s is None else s
        if t < 0 or s < 0 or min(tile) < 1:
            raise PatternError(f"layout needs lengths >= 0 and tiles >= 1, got t={t}, s={s}, tile={tile}")
        if self.heads is None:
            return build_layout(self, t, s, tuple(tile))
        return tuple(build_layout(self.for_head(i), t, s, tuple(tile)) for i in range(self.heads))

    def pairs(self, t: int, s: int | None = None) -> int:
        """The exact number of allowed (query, key) pairs, summed over the heads the pattern distinguishes."""
        s = t if s is None else s
        if self.heads is not None:
            return sum(self.for_head(i).pairs(t, s) for i in range(self.heads))
        return _count_pairs(self, t, s)

    def edges(
        self, t: int, s: int | None = None
    ) -> tuple[np.ndarray, np.ndarray] | tuple[tuple[np.ndarray, np.ndarray], ...]:
        """The allowed (query, key) pairs themselves, in time proportional to the live tiles.

        A pair that counts more than once, see `multiset`, is listed as often.

        Args:
          t: number of queries.
          s: number of keys, `t` if not given.

        Returns:
          Queries and keys, int32 [pairs] each, sorted by query and then by key; for a pattern with heads a tuple
          of such a pair for each head (equal heads share theirs).

        Raises:
          PatternError: a length below 0.
        """
        build = functools.cache(lambda pattern: _list_edges(pattern, t, t if s is None else s))
        if self.heads is None:
            return build(self)
        return tuple(build(self.for_head(i)) for i in range(self.heads))

    def tiles(self, t: int, s: int | None = None, tile: tuple[int, int] = (128, 128)) -> tuple[int, int]:
        """How many tiles are live, and how many there are, summed over the heads the pattern distinguishes."""
        layouts = self.layout(t, s, tile)
        layouts = (layouts,) if self.heads is None else layouts
        return sum(len(one.columns) for one in layouts), sum(one.grid.rows * one.grid.columns for one in layouts)

    @property
    def digest(self) -> str:
        """A short stable name of the pattern: 12 hexadecimal digits of its text form's SHA-256."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    def __and__(self, other: Pattern) -> Pattern:
        return And.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Or.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __sub__(self, other: Pattern) -> Pattern:
        return Minus.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __str__(self) -> str:
        shown, skipped = [], False
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                skipped = True
            else:
                shown.append(f"{field.name}=" * (skipped or field.kw_only) + _show(value))
        return f"{self.name}({', '.join(shown)})" if dataclasses.fields(self) else self.name


@functools.lru_cache(maxsize=256)
def _count_pairs(pattern: Pattern, t: int, s: int) -> int:
    """Of a pattern that is the same for all heads; kept, as each trace of `attend` asks again."""
    layout = pattern.layout(t, s)
    tiles = layout.rows.astype(np.int64) * layout.grid.columns + layout.columns
    partial, _ = count_pairs(pattern, layout.grid, tiles[~layout.full])
    height = np.minimum(layout.grid.tile[0], t - layout.rows * layout.grid.tile[0])
    width = np.minimum(layout.grid.tile[1], s - layout.columns * layout.grid.tile[1])
    return int(partial.sum()) + int((height.astype(np.int64) * width)[layout.full].sum())


def _list_edges(pattern: Pattern, t: int, s: int) -> tuple[np.ndarray, np.ndarray]:
    queries, keys = list_pairs(pattern, pattern.layout(t, s))
    if not pattern.repeats:
        return queries, keys
    counts = pattern.counts(queries, keys, t, s)
    return np.repeat(queries, counts), np.repeat(keys, counts)


def require(pattern: Pattern, **least: int) -> None:
    """Checks that fields of a pattern are integers, not less than given and not beyond what int32 can add up."""
    for field, low in least.items():
        value = getattr(pattern, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise PatternError(f"{pattern.name}: {field} must be an integer >= {low}, got {value!r}")
        if value > FARTHEST:
            raise PatternError(f"{pattern.name}: {field} must be at most 2**30, got {value}")


def _show(value: Any) -> str:
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True)
class _Combination(Pattern):
    """Several patterns joined; nested joins of the same kind are flattened, so that equal texts are equal values."""

    terms: tuple[Pattern, ...]

    @classmethod
    def of(cls, *terms: Pattern) -> Pattern:
        """The terms joined; PatternError if they are for different numbers of heads."""
        _common_heads(terms)
        return cls(tuple(part for term in terms for part in (term.terms if type(term) is cls else (term,))))

    @property
    def heads(self) -> int | None:
        return next((term.heads for term in self.terms if term.heads is not None), None)

    @property
    def repeats(self) -> bool:
        return any(term.repeats for term in self.terms)

    def for_head(self, index: int) -> Pattern:
        return self if self.heads is None else type(self).of(*(term.for_head(index) for term in self.terms))

    def check(self, t, s):
        for term in self.terms:
            term.check(t, s)

    def signature(self, grid, q0, k0):
        return [part for term in self.terms for part in term.signature(grid, q0, k0)]


def _common_heads(terms: tuple[Pattern, ...]) -> None:
    heads = {term.heads for term in terms} - {None}
    if len(heads) > 1:
        raise PatternError(f"patterns for {' and '.join(map(str, sorted(heads)))} heads do not combine")


class And(_Combination):
    """What all terms allow."""

    name: ClassVar[str] = "and"

    def allows(self, q, k, t=None, s=None):
        return functools.reduce(operator.and_, (term.allows(q, k, t, s) for term in self.terms))

    def counts(self, q, k, t=None, s=None):
        return functools.reduce(operator.mul, (term.counts(q, k, t, s) for term in self.terms))

    def bounds(self, grid):
        return functools.reduce(operator.and_, (term.bounds(grid) for term in self.terms))

    def last_query(self, k):
        return functools.reduce(np.minimum, (term.last_query(k) for term in self.terms))

    def lookahead(self):
        return min(term.lookahead() for term in self.terms)

    def __str__(self):
        return " & ".join(f"({term})" if type(term) is Or else str(term) for term in self.terms)


class Or(_Combination):
    """What any term allows."""

    name: ClassVar[str] = "or"

    def allows(self, q, k, t=None, s=None):
        return functools.reduce(operator.or_, (term.allows(q, k, t, s) for term in self.terms))

    def counts(self, q, k, t=None, s=None):
        largest = array_module(q, k).maximum
        return functools.reduce(largest, (term.counts(q, k, t, s) for term in self.terms))

    def bounds(self, grid):
        return functools.reduce(operator.or_, (term.bounds(grid) for term in self.terms))

    def last_query(self, k):
        return functools.reduce(np.maximum, (term.last_query(k) for term in self.terms))

    def lookahead(self):
        return max(term.lookahead() for term in self.terms)

    def __str__(self):
        return " | ".join(f"({term})" if isinstance(term, And) else str(term) for term in self.terms)


class Multiset(Or):
    """What any term allows, as often as terms allow it: a key that m terms allow counts m times in the softmax.

    The released BigBird code lists tiles and does not look whether it has listed one already.
    """

    name: ClassVar[str] = "multiset"

    @property
    def repeats(self):
        return True

    def counts(self, q, k, t=None, s=None):
        return functools.reduce(operator.add, (term.counts(q, k, t, s) for term in self.terms))

    def __str__(self):
        return f"multiset({', '.join(map(str, self.terms))})"


class Minus(_Combination):
    """What the first term allows and none of the others does."""

    name: ClassVar[str] = "minus"

    @classmethod
    def of(cls, *terms):
        # Only the first term may be flattened: a - (b - c) is something else than a - b - c.
        first = terms[0].terms if type(terms[0]) is cls else terms[:1]
        _common_heads(terms)
        return cls((*first, *terms[1:]))

    def allows(self, q, k, t=None, s=None):
        masks = [term.allows(q, k, t, s) for term in self.terms]
        return masks[0] & (functools.reduce(operator.or_, masks[1:]) ^ True)  # ~ would be wrong for a plain bool

    def counts(self, q, k, t=None, s=None):
        return self.terms[0].counts(q, k, t, s) * self.allows(q, k, t, s)

    def bounds(self, grid):
        first, *others = (term.bounds(grid) for term in self.terms)
        return first & ~functools.reduce(operator.or_, others)

    def last_query(self, k):
        return self.terms[0].last_query(k)

    def lookahead(self):
        return self.terms[0].lookahead()

    def __str__(self):
        first, *others = self.terms
        shown = [f"({first})" if type(first) in (And, Or) else str(first)]
        shown += [f"({term})" if type(term) in (And, Or, Minus) else str(term) for term in others]
        return " - ".join(shown)


@dataclasses.dataclass(frozen=True)
class Shift(Pattern):
    """A pattern moved `by` keys back: query q looks at key k where the pattern lets it look at k + `by`.

    `shift(causal, 1)` is strictly causal. Keys that would come from outside of the sequence are not there.
    """

    name: ClassVar[str] = "shift"
    pattern: Pattern
    by: int

    def __post_init__(self):
        if not isinstance(self.pattern, Pattern):
            raise PatternError(f"shift: pattern must be a pattern, got {self.pattern!r}")
        require(self, by=-FARTHEST)

    @property
    def heads(self):
        return self.pattern.heads

    @property
    def repeats(self):
        return self.pattern.repeats

    def for_head(self, index):
        return Shift(self.pattern.for_head(index), self.by)

    def check(self, t, s):
        self.pattern.check(t, s)

    def allows(self, q, k, t=None, s=None):
        return self.pattern.allows(q, k + self.by, t, s) & self._is_there(k + self.by, s)

    def counts(self, q, k, t=None, s=None):
        return self.pattern.counts(q, k + self.by, t, s) * self._is_there(k + self.by, s)

    def _is_there(self, moved, s):
        if s is None and self.by > 0:
            raise PatternError(f"{self}: which keys there are depends on their number s")
        return (moved >= 0) if self.by <= 0 else (moved < s)

    def bounds(self, grid):
        return self.pattern.bounds(grid.move(self.by))

    def signature(self, grid, q0, k0):
        moved = grid.move(self.by)
        first, stop = moved.keys
        # How much of the tile lies before the first key and after the last.
        outside = [np.minimum(k0 + self.by - first, 0), np.maximum(k0 + self.by + grid.tile[1] - stop, 0)]
        return self.pattern.signature(moved, q0, k0 + self.by) + outside

    def last_query(self, k):
        moved = k + self.by
        return np.where(moved < 0, -1, self.pattern.last_query(np.maximum(moved, 0)))

    def lookahead(self):
        return self.pattern.lookahead() - self.by


@dataclasses.dataclass(frozen=True)
class PerHead(Pattern):
    """A pattern of its own for each query head, in order: `per_head(window(31), window(255))`."""

    name: ClassVar[str] = "per_head"
    patterns: tuple[Pattern, ...]

    def __post_init__(self):
        if not self.patterns or any(p.heads is not None for p in self.patterns):
            raise PatternError("per_head takes one or more patterns that are not per_head themselves")

    @property
    def heads(self) -> int:
        return len(self.patterns)

    def for_head(self, index: int) -> Pattern:
        return self.patterns[index]

    def check(self, t, s):
        for pattern in self.patterns:
            pattern.check(t, s)

    @property
    def repeats(self):
        return any(pattern.repeats for pattern in self.patterns)

    def allows(self, q, k, t=None, s=None):
        return array_module(q, k).stack([p.allows(q, k, t, s) for p in self.patterns])

    def counts(self, q, k, t=None, s=None):
        return array_module(q, k).stack([p.counts(q, k, t, s) for p in self.patterns])

    def last_query(self, k):
        return functools.reduce(np.maximum, (p.last_query(k) for p in self.patterns))

    def lookahead(self):
        return max((p.lookahead() for p in self.patterns), default=-math.inf)

    def __str__(self):
        return f"per_head({', '.join(map(str, self.patterns))})"


def per_head(*patterns: Pattern) -> PerHead:
    """One pattern for each query head."""
    return PerHead(tuple(patterns))


def array_module(*arrays: Any) -> ModuleType:
    """NumPy, or the array module (jax.numpy) that one of the arrays belongs to."""
    modules = [a.__array_namespace__() for a in arrays if hasattr(a, "__array_namespace__")]
    return next((m for m in modules if m is not np), np)
