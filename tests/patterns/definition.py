"""A second definition of every pattern, pair by pair in plain Python: the oracle of the library."""

import math

import numpy as np

from sparsejax.patterns import (
    And,
    BigBirdRandom,
    Causal,
    Chunk,
    Dilated,
    Fixed,
    Full,
    GlobalKeys,
    GlobalQueries,
    Globals,
    Minus,
    Multiset,
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
from sparsejax.patterns.tiled import released_plan


def mask(pattern: Pattern, t: int, s: int) -> np.ndarray:
    """Booleans [t, s]; [h, t, s] for a pattern with heads."""
    heads = range(pattern.heads or 1)
    table = [[[allows(pattern, i, j, t, s, head) for j in range(s)] for i in range(t)] for head in heads]
    stacked = np.array(table, bool).reshape(len(heads), t, s)
    return stacked if pattern.heads else stacked[0]


def count(pattern: Pattern, i: int, j: int, t: int, s: int, head: int = 0) -> int:
    """Multiplicity of key `j` among the keys of query `i`."""

    def part(term: Pattern) -> int:
        return count(term, i, j, t, s, head)

    match pattern:
        case Multiset(terms):
            return sum(map(part, terms))
        case And(terms):
            return math.prod(map(part, terms))
        case Or(terms):
            return max(map(part, terms))
        case Minus(terms):
            return part(terms[0]) * allows(pattern, i, j, t, s, head)
        case PerHead(patterns):
            return count(patterns[head], i, j, t, s)
        case Shift(moved, by):
            return count(moved, i, j + by, t, s, head) if 0 <= j + by < s else 0
        case _:
            return int(allows(pattern, i, j, t, s, head))


def allows(pattern: Pattern, i: int, j: int, t: int, s: int, head: int = 0) -> bool:
    """Whether query `i` of `t` attends to key `j` of `s`."""
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
        case Chunk(size):  # no chunk starts between the two positions
            return not any(x % size == 0 for x in range(min(i, j) + 1, max(i, j) + 1))
        case Sink(n):
            return j in range(n)
        case Globals(ids):
            return i in _positions(ids, t) or j in _positions(ids, s)
        case GlobalQueries(ids):
            return i in _positions(ids, t)
        case GlobalKeys(ids):
            return j in _positions(ids, s)
        case Tiles(rows, tile=tile):
            row, column = (x // (tile or math.ceil(n / len(rows))) for x, n in ((i, t), (j, s)))
            return row < len(rows) and column in rows[row]
        case Random():
            return j // pattern.tile in drawn_tiles(pattern, i // pattern.tile, s)
        case BigBirdRandom():
            return (i // pattern.tile, j // pattern.tile) in released_tiles(pattern, s)
        case Shift(moved, by):
            return 0 <= j + by < s and allows(moved, i, j + by, t, s, head)
        case Minus(terms):
            first, *others = (allows(term, i, j, t, s, head) for term in terms)
            return first and not any(others)
        case And(terms):
            return all(allows(term, i, j, t, s, head) for term in terms)
        case Or(terms) | Multiset(terms):
            return any(allows(term, i, j, t, s, head) for term in terms)
        case PerHead(patterns):
            return allows(patterns[head], i, j, t, s)
        case _:
            raise NotImplementedError(f"no definition of {pattern}")


def drawn_tiles(pattern: Random, row: int, s: int) -> list[int]:
    """The key tiles drawn for a query tile, by Floyd's algorithm over the list of candidates."""
    columns = range(pattern.ends, math.ceil(s / pattern.tile) - pattern.ends)
    candidates = [column for column in columns if abs(column - row) >= pattern.apart]
    if pattern.reach is not None:
        candidates = [column for column in candidates if abs(column - row) * pattern.tile <= pattern.reach]
    if len(candidates) <= pattern.r:
        return candidates
    key = int(np.random.SeedSequence([pattern.seed, pattern.layer, pattern.head]).generate_state(1)[0])
    drawn: list[int] = []
    for i, top in enumerate(range(len(candidates) - pattern.r, len(candidates))):
        pick = _mix(row * pattern.r + i + key) % (top + 1)
        drawn.append(top if pick in drawn else pick)
    return [candidates[pick] for pick in drawn]


def released_tiles(pattern: BigBirdRandom, s: int) -> set[tuple[int, int]]:
    """The pairs (row, column) of a plan, which test_tiled.py compares with recorded draws."""
    tiles = math.ceil(s / pattern.tile)
    key = pattern.tile, pattern.r, pattern.among, pattern.seed, pattern.longest
    plan = released_plan(tiles * pattern.tile, *key)[pattern.head]
    return {(i, j) for i, columns in enumerate(plan, 1) for j in columns if i < tiles}


def _mix(x: int) -> int:
    """The finalizer of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x %= 2**32
        x = (x ^ x >> shift) * factor
    return x


def _positions(ids: int | tuple[int, ...], length: int) -> set[int]:
    """The positions below `length` that `ids` selects; negative ids count from the end."""
    if isinstance(ids, int):
        return set(range(length)[:ids] if ids >= 0 else range(length)[ids:])
    return {range(length)[i] for i in ids if -length <= i < length}
