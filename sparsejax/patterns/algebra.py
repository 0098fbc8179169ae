"""Patterns made of patterns: `&`, `|`, `-`, `multiset`, `shift` and `per_head`."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import ClassVar

import numpy as np

from sparsejax.patterns.base import (
    FOREVER,
    MAX_POSITION,
    Counts,
    Mask,
    Pattern,
    PatternError,
    Positions,
    array_module,
    require,
)
from sparsejax.patterns.layout import TileGrid
from sparsejax.patterns.spans import Bounds


@dataclasses.dataclass(frozen=True)
class Combination(Pattern):
    """Joined patterns. Nested joins of the same kind are flattened, so that equal texts are equal values."""

    terms: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise PatternError(self.name, "takes one or more patterns")

    @classmethod
    def of(cls, *terms: Pattern) -> Pattern:
        """The joined terms.

        Raises:
          PatternError: The terms distinguish different numbers of heads.
        """
        _check_heads(terms)
        flat = (
            part for term in terms for part in (term.terms if isinstance(term, cls) and type(term) is cls else (term,))
        )
        return cls(tuple(flat))

    @property
    def heads(self) -> int | None:
        return next((term.heads for term in self.terms if term.heads is not None), None)

    @property
    def repeats(self) -> bool:
        return any(term.repeats for term in self.terms)

    def for_head(self, index: int) -> Pattern:
        return self if self.heads is None else type(self).of(*(term.for_head(index) for term in self.terms))

    def check(self, t: int, s: int) -> None:
        for term in self.terms:
            term.check(t, s)

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return [part for term in self.terms for part in term.signature(grid, q0, k0)]


def _check_heads(terms: tuple[Pattern, ...]) -> None:
    heads = sorted({term.heads for term in terms if term.heads is not None})
    if len(heads) > 1:
        raise PatternError("heads", f"patterns of {' and '.join(map(str, heads))} heads do not combine")


class And(Combination):
    """The pairs that all terms allow."""

    name: ClassVar[str] = "and"

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return functools.reduce(operator.and_, (term.allows(q, k, t, s) for term in self.terms))

    def counts(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Counts:
        return functools.reduce(operator.mul, (term.counts(q, k, t, s) for term in self.terms))

    def bounds(self, grid: TileGrid) -> Bounds:
        return functools.reduce(operator.and_, (term.bounds(grid) for term in self.terms))

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return functools.reduce(np.minimum, (term.last_query(k) for term in self.terms))

    def lookahead(self) -> float:
        return min(term.lookahead() for term in self.terms)

    def __str__(self) -> str:
        return " & ".join(f"({term})" if type(term) is Or else str(term) for term in self.terms)


class Or(Combination):
    """The pairs that any term allows."""

    name: ClassVar[str] = "or"

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return functools.reduce(operator.or_, (term.allows(q, k, t, s) for term in self.terms))

    def counts(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Counts:
        largest = array_module(q, k).maximum
        return functools.reduce(largest, (term.counts(q, k, t, s) for term in self.terms))

    def bounds(self, grid: TileGrid) -> Bounds:
        return functools.reduce(operator.or_, (term.bounds(grid) for term in self.terms))

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return functools.reduce(np.maximum, (term.last_query(k) for term in self.terms))

    def lookahead(self) -> float:
        return max(term.lookahead() for term in self.terms)

    def __str__(self) -> str:
        return " | ".join(f"({term})" if isinstance(term, And) else str(term) for term in self.terms)


class Multiset(Or):
    """The pairs that any term allows; a key that m terms allow counts m times in the softmax.

    The released BigBird code lists tiles without removing duplicates.
    """

    name: ClassVar[str] = "multiset"

    @property
    def repeats(self) -> bool:
        return True

    def counts(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Counts:
        return functools.reduce(operator.add, (term.counts(q, k, t, s) for term in self.terms))

    def __str__(self) -> str:
        return f"multiset({', '.join(map(str, self.terms))})"


class Minus(Combination):
    """The pairs that the first term allows and no other term allows."""

    name: ClassVar[str] = "minus"

    @classmethod
    def of(cls, *terms: Pattern) -> Pattern:
        # Only the first term can be flattened: a - (b - c) differs from a - b - c.
        first = terms[0].terms if isinstance(terms[0], cls) else terms[:1]
        _check_heads(terms)
        return cls((*first, *terms[1:]))

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        masks = [term.allows(q, k, t, s) for term in self.terms]
        return masks[0] & (functools.reduce(operator.or_, masks[1:]) ^ True)  # ~ is wrong for a plain bool

    def counts(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Counts:
        return self.terms[0].counts(q, k, t, s) * self.allows(q, k, t, s)

    def bounds(self, grid: TileGrid) -> Bounds:
        first, *others = (term.bounds(grid) for term in self.terms)
        return first & ~functools.reduce(operator.or_, others)

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return self.terms[0].last_query(k)

    def lookahead(self) -> float:
        return self.terms[0].lookahead()

    def __str__(self) -> str:
        first, *others = self.terms
        texts = [f"({first})" if type(first) in (And, Or) else str(first)]
        texts += [f"({term})" if type(term) in (And, Or, Minus) else str(term) for term in others]
        return " - ".join(texts)


@dataclasses.dataclass(frozen=True)
class Moved(Pattern):
    """A pattern with its queries or its keys moved by a number of positions."""

    pattern: Pattern
    by: int

    @property
    def heads(self) -> int | None:
        return self.pattern.heads

    @property
    def repeats(self) -> bool:
        return self.pattern.repeats

    def for_head(self, index: int) -> Pattern:
        return dataclasses.replace(self, pattern=self.pattern.for_head(index))


@dataclasses.dataclass(frozen=True)
class Shift(Moved):
    """A pattern shifted `by` keys back: query q attends to key k where `pattern` allows (q, k + `by`).

    `shift(causal, 1)` is strictly causal. Keys from outside the sequence do not exist.
    """

    name: ClassVar[str] = "shift"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise PatternError("shift.pattern", f"{self.pattern!r} is not a pattern")
        require(self, by=-MAX_POSITION)
        if _largest_shift(self) > MAX_POSITION:
            raise PatternError("shift.by", f"nested shifts by {_largest_shift(self)} exceed 2**30")

    def check(self, t: int, s: int) -> None:
        self.pattern.check(t, s)

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return self.pattern.allows(q, k + self.by, t, s) & self._exists(k + self.by, s)

    def counts(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Counts:
        return self.pattern.counts(q, k + self.by, t, s) * self._exists(k + self.by, s)

    def _exists(self, k: Positions, s: int | None) -> Mask:
        if self.by <= 0:
            return k >= 0
        if s is None:
            raise PatternError("s", f"required by {self}, which depends on the number of keys")
        return k < s

    def bounds(self, grid: TileGrid) -> Bounds:
        return self.pattern.bounds(grid.shift(self.by))

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        shifted = grid.shift(self.by)
        first, stop = shifted.existing_keys
        # How much of the tile lies before the first existing key and after the last.
        outside = [np.minimum(k0 + self.by - first, 0), np.maximum(k0 + self.by + grid.tile[1] - stop, 0)]
        return self.pattern.signature(shifted, q0, k0 + self.by) + outside

    def last_query(self, k: np.ndarray) -> np.ndarray:
        k = k + self.by
        return np.where(k < 0, -1, self.pattern.last_query(np.maximum(k, 0)))

    def lookahead(self) -> float:
        return self.pattern.lookahead() - self.by


def _largest_shift(pattern: Pattern) -> int:
    """The largest sum of nested shifts in a pattern, in either direction."""
    if isinstance(pattern, Shift):
        return abs(pattern.by) + _largest_shift(pattern.pattern)
    parts = pattern.terms if isinstance(pattern, Combination) else ()
    return max(map(_largest_shift, pattern.patterns if isinstance(pattern, PerHead) else parts), default=0)


@dataclasses.dataclass(frozen=True)
class OffsetQueries(Moved):
    """The rows of a pattern from query `by` on: query q attends as query q + `by` of `pattern`.

    The sequence that `pattern` describes ends with the last key or the last query, whichever is later. `ops.attend`
    makes this pattern of its `q_offset`; it has no text form.
    """

    name: ClassVar[str] = "offset_queries"

    def check(self, t: int, s: int) -> None:
        self.pattern.check(max(t + self.by, s), s)

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return self.pattern.allows(q + self.by, k, self._length(t, s), s)

    def counts(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Counts:
        return self.pattern.counts(q + self.by, k, self._length(t, s), s)

    def _length(self, t: int | None, s: int | None) -> int | None:
        return None if t is None or s is None else max(t + self.by, s)

    def bounds(self, grid: TileGrid) -> Bounds:
        return self.pattern.bounds(self._move(grid))

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        return self.pattern.signature(self._move(grid), q0 + self.by, k0)

    def _move(self, grid: TileGrid) -> TileGrid:
        return grid.offset_queries(self.by, max(grid.t + self.by, grid.s))

    def last_query(self, k: np.ndarray) -> np.ndarray:
        last = self.pattern.last_query(k)
        return np.where(last == FOREVER, last, np.maximum(last - self.by, -1))

    def lookahead(self) -> float:
        return self.pattern.lookahead() + self.by


@dataclasses.dataclass(frozen=True)
class PerHead(Pattern):
    """One pattern per query head, in order: `per_head(window(31), window(255))`."""

    name: ClassVar[str] = "per_head"
    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.patterns or any(p.heads is not None for p in self.patterns):
            raise PatternError("per_head", "takes one or more patterns that contain no per_head")

    @property
    def heads(self) -> int:
        return len(self.patterns)

    def for_head(self, index: int) -> Pattern:
        return self.patterns[index]

    def check(self, t: int, s: int) -> None:
        for pattern in self.patterns:
            pattern.check(t, s)

    @property
    def repeats(self) -> bool:
        return any(pattern.repeats for pattern in self.patterns)

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        return array_module(q, k).stack([p.allows(q, k, t, s) for p in self.patterns])

    def counts(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Counts:
        return array_module(q, k).stack([p.counts(q, k, t, s) for p in self.patterns])

    def last_query(self, k: np.ndarray) -> np.ndarray:
        return functools.reduce(np.maximum, (p.last_query(k) for p in self.patterns))

    def lookahead(self) -> float:
        return max((p.lookahead() for p in self.patterns), default=-math.inf)

    def __str__(self) -> str:
        return f"per_head({', '.join(map(str, self.patterns))})"


def per_head(*patterns: Pattern) -> PerHead:
    """One pattern per query head."""
    return PerHead(tuple(patterns))


Pattern.operators.update({"&": And.of, "|": Or.of, "-": Minus.of})
