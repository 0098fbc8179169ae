"""The patterns a second time, pair by pair in plain Python: what the library is held against."""

import math

import numpy as np

from sparsejax.patterns import (
    And,
    Causal,
    Chunk,
    Dilated,
    Fixed,
    Full,
    GlobalKeys,
    GlobalQueries,
    Globals,
    Minus,
    Or,
    Pattern,
    PerHead,
    Prefix,
    Random,
    Shift,
    Sink,
    Strided,
    Tiles,
    Window,
)


def mask(pattern: Pattern, t: int, s: int) -> np.ndarray:
    """Booleans [t, s]; [h, t, s] for a pattern with heads."""
    heads = range(pattern.heads or 1)
    table = [[[sees(pattern, i, j, t, s, head) for j in range(s)] for i in range(t)] for head in heads]
    stacked = np.array(table, bool).reshape(len(heads), t, s)
    return stacked if pattern.heads else stacked[0]


def sees(pattern: Pattern, i: int, j: int, t: int, s: int, head: int = 0) -> bool:
    """Whether query `i` of `t` looks at key `j` of `s`."""
    match pattern:
        case Full():
            return True
        case Causal():
            return j <= i
        case Window(left, right):
            return -left <= j - i <= right
        case Dilated(left, right, stride=stride):
            return j in range(i - left * stride, i + right * stride + 1, stride)
        case Strided(stride):
            return j in range(i % stride, s, stride)
        case Fixed(l, c):
            return any(j in range(end - c, end) for end in range(l, s + l, l))
        case Prefix(n):
            return max(i, j) < n
        case Chunk(size):  # no chunk starts between the two
            return not any(x % size == 0 for x in range(min(i, j) + 1, max(i, j) + 1))
        case Sink(n):
            return j in range(n)
        case Globals(ids):
            return i in _places(ids, t) or j in _places(ids, s)
        case GlobalQueries(ids):
            return i in _places(ids, t)
        case GlobalKeys(ids):
            return j in _places(ids, s)
        case Tiles(rows, tile=tile):
            row, column = (x // (tile or math.ceil(n / len(rows))) for x, n in ((i, t), (j, s)))
            return row < len(rows) and column in rows[row]
        case Random():
            return j // pattern.tile in drawn_tiles(pattern, i // pattern.tile, s)
        case Shift(moved, by):
            return 0 <= j + by < s and sees(moved, i, j + by, t, s, head)
        case Minus(terms):
            first, *others = (sees(term, i, j, t, s, head) for term in terms)
            return first and not any(others)
        case And(terms):
            return all(sees(term, i, j, t, s, head) for term in terms)
        case Or(terms):
            return any(sees(term, i, j, t, s, head) for term in terms)
        case PerHead(patterns):
            return sees(patterns[head], i, j, t, s)
        case _:
            raise NotImplementedError(f"define {pattern} here, pair by pair")


def drawn_tiles(pattern: Random, row: int, s: int) -> list[int]:
    """The key tiles that a query tile has drawn, by Floyd's algorithm over a list of those it may draw."""
    columns = range(pattern.ends, math.ceil(s / pattern.tile) - pattern.ends)
    allowed = [column for column in columns if abs(column - row) >= pattern.apart]
    if pattern.reach is not None:
        allowed = [column for column in allowed if abs(column - row) * pattern.tile <= pattern.reach]
    if len(allowed) <= pattern.r:
        return allowed
    key = int(np.random.SeedSequence([pattern.seed, pattern.layer, pattern.head]).generate_state(1)[0])
    drawn: list[int] = []
    for i, top in enumerate(range(len(allowed) - pattern.r, len(allowed))):
        pick = _mix(row * pattern.r + i + key) % (top + 1)
        drawn.append(top if pick in drawn else pick)
    return [allowed[pick] for pick in drawn]


def _mix(x: int) -> int:
    """MurmurHash3's finaliser."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x %= 2**32
        x = (x ^ x >> shift) * factor
    return x


def _places(ids: int | tuple[int, ...], length: int) -> set[int]:
    """The positions below `length` that `ids` names, negative ones as in a Python list."""
    if isinstance(ids, int):
        return set(range(min(ids, length)))
    return {range(length)[i] for i in ids if -length <= i < length}
