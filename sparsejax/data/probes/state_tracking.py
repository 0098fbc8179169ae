"""State tracking: the product of all group elements so far."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from sparsejax.data.probes.example import Example, Probe, build_example, open_stream, require
from sparsejax.errors import InputError, require_choice

MAX_SYMBOLS = {"symmetric": 6, "alternating": 6, "cyclic": 1024}  # the multiplication table must fit in memory


@dataclass(frozen=True)
class StateTracking(Probe):
    """The word problem of a group: at every token, predict the product of all elements so far.

    The Illusion of State (arXiv:2404.08819), section 5. Elements are permutations of `symbols` symbols, numbered in
    lexicographic order (0 is the identity) and drawn independently; the state after x1 .. xt applies x1 first and xt
    last. `symmetric` with 5 symbols is S5, `alternating` with 5 is A5, `cyclic` with 60 is Z60, and `cyclic` with 2 is
    the parity of bits (arXiv:2207.02098).

    Published results: an RNN with one layer solves S5 at any length; transformers and Mamba need more layers for
    longer sequences of S5 and A5, but few for Z60. Linear recurrences with negative eigenvalues solve parity at any
    length (arXiv:2411.12537); attention learns parity at training lengths only.
    """

    length: int = 64  # elements per sequence, one per token
    group: str = "symmetric"  # group of permutations
    symbols: int = 5  # number of symbols that the elements of the group permute
    last_only: bool = False  # score only the last token

    def __post_init__(self):
        require(self, length=1, symbols=2)
        require_choice(self, "group", MAX_SYMBOLS)
        if self.symbols > MAX_SYMBOLS[self.group]:
            raise InputError("symbols", f"{self.symbols} is above {MAX_SYMBOLS[self.group]}, the maximum of this group")
        if self.group == "alternating":
            require(self, symbols=3)

    @property
    def vocab(self) -> int:
        return len(_products(self.group, self.symbols))

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        table = _products(self.group, self.symbols)
        inputs = open_stream(seed, index, validation).integers(len(table), size=self.length, dtype=np.int32)
        states = np.fromiter(itertools.accumulate(inputs.tolist(), lambda x, y: table[x][y]), np.int32, self.length)
        positions, answers = (-1, states[-1]) if self.last_only else (slice(None), states)
        return build_example(inputs, positions, answers)


@functools.cache
def _products(group: str, symbols: int) -> list[list[int]]:
    """Multiplication table [n][n] of a group of n elements; entry [x][y] applies x first, then y."""
    if group == "cyclic":
        elements = np.arange(symbols)
        return ((elements[:, None] + elements) % symbols).tolist()
    permutations = [p for p in itertools.permutations(range(symbols)) if group == "symmetric" or _is_even(p)]
    number = {p: i for i, p in enumerate(permutations)}
    return [[number[tuple(y[i] for i in x)] for y in permutations] for x in permutations]


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0
