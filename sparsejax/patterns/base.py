"""The base class of all patterns.

A pattern defines which keys each query may attend to. It is a small frozen value, written once; the mask, the tile
layout, the pair count, the receptive field, the decode cache and the text form are derived from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, TypeAlias

import numpy as np

from sparsejax.errors import InputError
from sparsejax.patterns.layout import TileGrid, TileLayout, build_layout, count_pairs, list_edges
from sparsejax.patterns.spans import Bounds

FOREVER = np.iinfo(np.int64).max
MAX_POSITION = 2**30  # the sum of two positions fits the int32 of a compiled program, where overflow is silent

Positions: TypeAlias = Any  # integers: int, np.ndarray or jax.Array, also traced
Mask: TypeAlias = Any  # booleans of the broadcast shape of the positions, in their array library
Counts: TypeAlias = Any  # integers of that shape
Edges: TypeAlias = tuple[np.ndarray, np.ndarray]


class PatternError(InputError):
    """An invalid pattern: a bad argument, patterns that do not combine, or text that does not parse."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which keys each query attends to.

    Positions count from 0 for queries and for keys; the lengths `t` (queries) and `s` (keys) are in tokens.

    A new pattern is a frozen dataclass whose fields are the arguments of its text form. It defines:

      * `name`: its name in the text form; the decorator `patterns.register` adds it.
      * `allows`: the mask.
      * `bounds`: the tiles that it touches and fills; `from_ranges` covers patterns whose rows are intervals.
      * `signature`, optional: what distinguishes its tiles. The default examines every undecided tile; a pattern that
        repeats itself returns less, and then equal tiles are examined once.
      * `last_query`, optional: until when a key must be cached. By default keys are cached forever.
      * `lookahead`, optional: how far past its own position a query attends. By default without limit.
      * `check`, optional: what does not fit a sequence length.
      * `check_pattern` of `sparsejax.patterns.testing` compares all of these with the mask.
    """

    name: ClassVar[str]
    operators: ClassVar[dict[str, Callable[..., Pattern]]] = {}  # by sign; defined in algebra.py

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Pattern.__repr__  # type: ignore[method-assign]  # or `dataclass` generates another one

    # The definition of a pattern.

    def allows(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Mask:
        """Whether query position `q` attends to key position `k`.

        Args:
          q: Integer positions, NumPy or jax.numpy (also traced), broadcastable with `k`.
          k: Integer positions.
          t: Number of queries. Required only by patterns that count from the end.
          s: Number of keys. Required only by patterns that count from the end or depend on the number of keys.

        Returns:
          Booleans of the broadcast shape, with a leading axis `h` if the pattern differs between heads.
        """
        raise NotImplementedError

    def counts(self, q: Positions, k: Positions, t: int | None = None, s: int | None = None) -> Counts:
        """Multiplicity of key `k` among the keys of query `q`: 0 or 1, or more inside `multiset`."""
        return self.allows(q, k, t, s) * 1

    def bounds(self, grid: TileGrid) -> Bounds:
        """The live tiles of the grid (with some allowed pair) and the full tiles (with only allowed pairs)."""
        raise NotImplementedError

    def signature(self, grid: TileGrid, q0: np.ndarray, k0: np.ndarray) -> list[np.ndarray]:
        """Integers that determine the pairs of a tile.

        Tiles of equal shape with equal signatures must hold the same pairs, relative to their first query and key.

        Args:
          grid: The tiles.
          q0: First query of each tile, int64 [n].
          k0: First key of each tile, int64 [n].

        Returns:
          Arrays int64 [n]. The positions themselves are always valid.
        """
        return [q0, k0]

    def last_query(self, k: np.ndarray) -> np.ndarray:
        """The last query that attends to key `k`, int64 [n], or `FOREVER`.

        The result may be an upper bound, which only enlarges the decode cache.
        """
        return np.full_like(k, FOREVER)

    def lookahead(self) -> float:
        """Upper bound on `k - q` over all allowed pairs; `math.inf` without a limit."""
        return math.inf

    def check(self, t: int, s: int) -> None:
        """Raises PatternError if the pattern refers to positions that `t` queries and `s` keys do not have."""

    # Derived views.

    @property
    def heads(self) -> int | None:
        """Number of heads that the pattern distinguishes; None if all heads share it."""
        return None

    @property
    def repeats(self) -> bool:
        """Whether a key can count more than once in the softmax; see `multiset`."""
        return False

    def for_head(self, index: int) -> Pattern:
        """The pattern of one head."""
        return self

    def by_head(self) -> tuple[Pattern, ...]:
        """The pattern of each head; of length 1 if all heads share it."""
        return (self,) if self.heads is None else tuple(self.for_head(i) for i in range(self.heads))

    def dense(self, t: int, s: int | None = None) -> np.ndarray:
        """The mask as bool [t, s], or [h, t, s] with heads. The oracle, for small inputs."""
        s = t if s is None else s
        return np.asarray(self.allows(np.arange(t)[:, None], np.arange(s)[None, :], t, s))

    def layout(
        self, t: int, s: int | None = None, tile: tuple[int, int] = (128, 128)
    ) -> TileLayout | tuple[TileLayout, ...]:
        """The live tiles, exact, in time and memory proportional to their number.

        Args:
          t: Number of queries.
          s: Number of keys; defaults to `t`.
          tile: Queries and keys of a tile.

        Returns:
          A TileLayout, or one per head if the pattern differs between heads (equal heads share theirs).

        Raises:
          PatternError: A length is negative or a tile is empty.
        """
        layouts = self.layouts(t, s, tile)
        return layouts[0] if self.heads is None else layouts

    def layouts(self, t: int, s: int | None = None, tile: tuple[int, int] = (128, 128)) -> tuple[TileLayout, ...]:
        """`layout` as a tuple, of length 1 if all heads share the pattern."""
        s = _check_lengths(t, s)
        if min(tile) < 1:
            raise PatternError("tile", f"{tuple(tile)} contains a size below 1")
        return tuple(build_layout(pattern, t, s, (tile[0], tile[1])) for pattern in self.by_head())

    def pairs(self, t: int, s: int | None = None) -> int:
        """The exact number of allowed (query, key) pairs, summed over the heads that the pattern distinguishes."""
        s = _check_lengths(t, s)
        return sum(count_pairs(pattern, t, s) for pattern in self.by_head())

    def edges(self, t: int, s: int | None = None) -> Edges | tuple[Edges, ...]:
        """The allowed (query, key) pairs, in time proportional to the live tiles.

        A pair is listed as often as it counts; see `multiset`.

        Args:
          t: Number of queries.
          s: Number of keys; defaults to `t`.

        Returns:
          Queries and keys, int32 [pairs] each, sorted by query and then by key, or one such pair of arrays per head
          if the pattern differs between heads (equal heads share theirs).

        Raises:
          PatternError: A length is negative.
        """
        s = _check_lengths(t, s)
        build = functools.cache(lambda pattern: list_edges(pattern, t, s))
        edges = tuple(build(pattern) for pattern in self.by_head())
        return edges[0] if self.heads is None else edges

    def tiles(self, t: int, s: int | None = None, tile: tuple[int, int] = (128, 128)) -> tuple[int, int]:
        """Number of live tiles and of all tiles, summed over the heads that the pattern distinguishes."""
        layouts = self.layouts(t, s, tile)
        return sum(len(x.columns) for x in layouts), sum(x.grid.rows * x.grid.columns for x in layouts)

    @property
    def digest(self) -> str:
        """A short stable identifier: the first 12 hexadecimal digits of the SHA-256 of the text form."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    def _combine(self, sign: str, other: object) -> Pattern:
        return self.operators[sign](self, other) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: Pattern) -> Pattern:
        return self._combine("&", other)

    def __or__(self, other: Pattern) -> Pattern:
        return self._combine("|", other)

    def __sub__(self, other: Pattern) -> Pattern:
        return self._combine("-", other)

    def __repr__(self) -> str:
        return f"patterns.parse({str(self)!r})"

    def _repr_svg_(self) -> str:
        """The picture that a notebook shows; see `drawing.picture`."""
        from sparsejax.patterns import drawing

        return drawing.picture(self)

    def __str__(self) -> str:
        arguments, skipped = [], False
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                skipped = True
            else:
                arguments.append(f"{field.name}=" * (skipped or field.kw_only is True) + format_value(value))
        return f"{self.name}({', '.join(arguments)})" if dataclasses.fields(self) else self.name


def require(pattern: Pattern, **minimums: int) -> None:
    """Checks that fields of a pattern are integers between their minimum and 2**30."""
    for field, minimum in minimums.items():
        require_integer(f"{pattern.name}.{field}", getattr(pattern, field), minimum)


def require_integer(argument: str, value: object, minimum: int, maximum: int = MAX_POSITION) -> None:
    """Checks that a value is an integer between `minimum` and `maximum`; int32 positions overflow beyond 2**30.

    Raises:
      PatternError: The value is not; the message names `argument`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        shown = repr(value) if isinstance(value, str) else format_value(value)
        raise PatternError(argument, f"{shown} is not an integer >= {minimum}")
    if value > maximum:
        raise PatternError(argument, f"{value} exceeds {'2**30' if maximum == MAX_POSITION else maximum}")


def array_module(*arrays: Positions) -> ModuleType:
    """The array library of the arrays: NumPy, or jax.numpy if one of them belongs to it."""
    modules = [a.__array_namespace__() for a in arrays if hasattr(a, "__array_namespace__")]
    return next((m for m in modules if m is not np), np)


def _check_lengths(t: int, s: int | None) -> int:
    """The number of keys, which defaults to that of the queries."""
    for argument, length in (("t", t), ("s", t if s is None else s)):
        if length < 0:
            raise PatternError(argument, f"{length} is negative")
        if length > MAX_POSITION:
            raise PatternError(argument, f"{length} exceeds 2**30")
    return t if s is None else s


def format_value(value: object) -> str:
    """A value as the text form writes it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(format_value, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
