"""State tracking: what have all the moves so far come to?"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from sparsejax.data.probes.example import Example, Probe, ask, choose, open_stream, require

MOST_SYMBOLS = {"symmetric": 6, "alternating": 6, "cyclic": 1024}  # the group's table has to fit in memory


@dataclass(frozen=True)
class StateTracking(Probe):
    """The word problem of a group: at every token, the product of all elements read so far.

    The Illusion of State (arXiv:2404.08819), section 5. Elements are permutations of `symbols` things, numbered in
    lexicographic order (0 changes nothing), drawn independently; the state after x1 .. xt is "first x1, ..., then xt".
    `symmetric` of 5 is S5, `alternating` of 5 is A5, `cyclic` of 60 is Z60, and `cyclic` of 2 is the parity of bits
    (arXiv:2207.02098).

    Outcome: one layer of an RNN does S5 at any length; transformers and Mamba need more layers the longer the
    sequence, on S5 and A5, whereas Z60 needs few. Linear recurrences whose states may change sign do parity at any
    length (arXiv:2411.12537); attention learns parity at the lengths that it is trained on only.
    """

    length: int = 64
    group: str = "symmetric"  # "symmetric", "alternating", "cyclic"
    symbols: int = 5
    last_only: bool = False  # score the last token only

    def __post_init__(self):
        require(self, length=1, symbols=2)
        choose(self, "group", *MOST_SYMBOLS)
        if self.symbols > MOST_SYMBOLS[self.group]:
            raise ValueError(f"symbols must be at most {MOST_SYMBOLS[self.group]}, got {self.symbols}")
        if self.group == "alternating":
            require(self, symbols=3)

    @property
    def vocab(self) -> int:
        return len(_products(self.group, self.symbols))

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        table = _products(self.group, self.symbols)
        inputs = open_stream(seed, index, validation).integers(len(table), size=self.length, dtype=np.int32)
        states = np.fromiter(itertools.accumulate(inputs.tolist(), lambda x, y: table[x][y]), np.int32, self.length)
        return ask(inputs, -1, states[-1]) if self.last_only else ask(inputs, slice(None), states)


@functools.cache
def _products(group: str, symbols: int) -> list[list[int]]:
    """The table whose entry [x][y] is "first x, then y"; [n][n] for a group of n elements."""
    if group == "cyclic":
        turns = np.arange(symbols)
        return ((turns[:, None] + turns) % symbols).tolist()
    elements = [p for p in itertools.permutations(range(symbols)) if group == "symmetric" or _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    return [[number[tuple(y[i] for i in x)] for y in elements] for x in elements]


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0
