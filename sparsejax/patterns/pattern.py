"""What a pattern is, and how patterns combine: `&`, `|` and `per_head`.

A pattern says which keys each query may look at. It is a small frozen value, written once; the mask, the
tile layout, the pair count, the decode cache and the text form are all derived from it. A new pattern is one
subclass in `library.py` that states `allows`, `bounds`, `last_query` and `lookahead`.
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

from sparsejax.patterns.tiles import Bounds, TileGrid, TileLayout, build_layout, count_pairs


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

    def bounds(self, grid: TileGrid) -> Bounds:
        """Which tiles of the grid hold an allowed pair (live) and which hold only allowed pairs (full)."""
        raise NotImplementedError

    def signature(self, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        """Integers that fix what a tile holds, given its first query and key, each [n].

        Two tiles with equal signatures hold the same pairs, so that each is examined once. The positions
        themselves always serve; a pattern that repeats itself returns less.
        """
        return [q0, k0]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        """The last query that may look at key `k` (int64 [n]); infinity is `patterns.FOREVER`.

        An upper bound is allowed: it only makes a decode cache larger.
        """
        raise NotImplementedError

    def lookahead(self) -> float:
        """How many positions past its own a query may see at most (an upper bound, `math.inf` if unbounded)."""
        raise NotImplementedError

    # What follows from it.

    @property
    def heads(self) -> int | None:
        """Number of heads the pattern distinguishes, or None when all heads share it."""
        return None

    def head(self, index: int) -> Pattern:
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
        build = functools.cache(lambda pattern: build_layout(pattern, t, s, tuple(tile)))
        if self.heads is None:
            return build(self)
        return tuple(build(self.head(i)) for i in range(self.heads))

    def pairs(self, t: int, s: int | None = None) -> int:
        """The exact number of allowed (query, key) pairs, summed over the heads the pattern distinguishes."""
        s = t if s is None else s
        if self.heads is not None:
            return sum(self.head(i).pairs(t, s) for i in range(self.heads))
        layout = self.layout(t, s)
        tiles = layout.rows.astype(np.int64) * layout.grid.columns + layout.columns
        partial, _ = count_pairs(self, layout.grid, tiles[~layout.full])
        height = np.minimum(layout.grid.tile[0], t - layout.rows * layout.grid.tile[0])
        width = np.minimum(layout.grid.tile[1], s - layout.columns * layout.grid.tile[1])
        return int(partial.sum()) + int((height.astype(np.int64) * width)[layout.full].sum())

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

    def __str__(self) -> str:
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        for field in reversed(dataclasses.fields(self)):
            if field.default is dataclasses.MISSING or values[-1] != field.default:
                break
            values.pop()
        shown = ", ".join(str(list(v)) if isinstance(v, tuple) else str(v) for v in values)
        return f"{self.name}({shown})" if dataclasses.fields(self) else self.name


@dataclasses.dataclass(frozen=True)
class _Combination(Pattern):
    """Several patterns joined; nested joins of the same kind are flattened, so that equal texts are equal values."""

    terms: tuple[Pattern, ...]

    @classmethod
    def of(cls, *terms: Pattern) -> Pattern:
        """The terms joined; PatternError if they are for different numbers of heads."""
        flat = [part for term in terms for part in (term.terms if type(term) is cls else (term,))]
        heads = {term.heads for term in flat} - {None}
        if len(heads) > 1:
            raise PatternError(f"patterns for {' and '.join(map(str, sorted(heads)))} heads do not combine")
        return cls(tuple(flat))

    @property
    def heads(self) -> int | None:
        return next((term.heads for term in self.terms if term.heads is not None), None)

    def head(self, index: int) -> Pattern:
        return self if self.heads is None else type(self).of(*(term.head(index) for term in self.terms))

    def signature(self, q0, k0):
        return [part for term in self.terms for part in term.signature(q0, k0)]


class And(_Combination):
    """What all terms allow."""

    name: ClassVar[str] = "and"

    def allows(self, q, k, t=None, s=None):
        return functools.reduce(operator.and_, (term.allows(q, k, t, s) for term in self.terms))

    def bounds(self, grid):
        return functools.reduce(operator.and_, (term.bounds(grid) for term in self.terms))

    def last_query(self, k):
        return functools.reduce(np.minimum, (term.last_query(k) for term in self.terms))

    def lookahead(self):
        return min(term.lookahead() for term in self.terms)

    def __str__(self):
        return " & ".join(f"({term})" if isinstance(term, Or) else str(term) for term in self.terms)


class Or(_Combination):
    """What any term allows."""

    name: ClassVar[str] = "or"

    def allows(self, q, k, t=None, s=None):
        return functools.reduce(operator.or_, (term.allows(q, k, t, s) for term in self.terms))

    def bounds(self, grid):
        return functools.reduce(operator.or_, (term.bounds(grid) for term in self.terms))

    def last_query(self, k):
        return functools.reduce(np.maximum, (term.last_query(k) for term in self.terms))

    def lookahead(self):
        return max(term.lookahead() for term in self.terms)

    def __str__(self):
        return " | ".join(f"({term})" if isinstance(term, And) else str(term) for term in self.terms)


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

    def head(self, index: int) -> Pattern:
        return self.patterns[index]

    def allows(self, q, k, t=None, s=None):
        masks = [p.allows(q, k, t, s) for p in self.patterns]
        return _array_module(q, k).stack(masks)

    def last_query(self, k):
        return functools.reduce(np.maximum, (p.last_query(k) for p in self.patterns))

    def lookahead(self):
        return max((p.lookahead() for p in self.patterns), default=-math.inf)

    def __str__(self):
        return f"per_head({', '.join(map(str, self.patterns))})"


def per_head(*patterns: Pattern) -> PerHead:
    """One pattern for each query head."""
    return PerHead(tuple(patterns))


def _array_module(*arrays: Any) -> ModuleType:
    """NumPy, or the array module (jax.numpy) that one of the arrays belongs to."""
    modules = [a.__array_namespace__() for a in arrays if hasattr(a, "__array_namespace__")]
    return next((m for m in modules if m is not np), np)
