"""The patterns a second time, pair by pair in plain Python: what the library is held against."""

import numpy as np

from sparsejax.patterns import And, Causal, Chunk, Full, Globals, Or, Pattern, PerHead, Sink, Window


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
        case Chunk(size):  # no chunk starts between the two
            return not any(x % size == 0 for x in range(min(i, j) + 1, max(i, j) + 1))
        case Sink(n):
            return j in range(n)
        case Globals(ids):
            return i in _places(ids, t) or j in _places(ids, s)
        case And(terms):
            return all(sees(term, i, j, t, s, head) for term in terms)
        case Or(terms):
            return any(sees(term, i, j, t, s, head) for term in terms)
        case PerHead(patterns):
            return sees(patterns[head], i, j, t, s)
        case _:
            raise NotImplementedError(f"define {pattern} here, pair by pair")


def _places(ids: int | tuple[int, ...], length: int) -> set[int]:
    """The positions below `length` that `ids` names, negative ones as in a Python list."""
    if isinstance(ids, int):
        return set(range(min(ids, length)))
    return {range(length)[i] for i in ids if -length <= i < length}
