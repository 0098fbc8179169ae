"""ListOps: the value of nested operations on lists of digits."""

from dataclasses import dataclass

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.probes.example import Example, Probe, final_example, open_stream, require
from sparsejax.errors import InputError

OPERATORS = ("MIN", "MAX", "MED", "SM")  # tokens 10 to 13, after the digits; SM is the sum modulo 10
FIRST_OPERATOR, CLOSE, PADDING = 10, 14, 15
VOCAB = 16
OPERATOR_SHARE = 0.25
MAX_DRAWS = 100_000  # trees per example; LRA's lengths take about ten


@dataclass(frozen=True)
class ListOps(Probe):
    """An expression such as [MAX 2 9 [MIN 4 7 ] 0 ], whose value, a digit, is predicted at its last token.

    Long Range Arena (arXiv:2011.04006), section 2.2.1, after arXiv:1804.06028. A node above `max_depth` is an operator
    with probability 1/4 and a digit otherwise; an operator has 2 to `max_args` arguments with equal probability. MED
    of an even number of arguments is the mean of the middle two, rounded down. Trees are drawn until one has more
    than `min_length` and fewer than `length` tokens; an operator counts as 2 tokens, with its closing bracket. The
    published generator is unseeded and drops repeated trees; here an example is a function of its seed and index, and
    only short trees ever repeat.

    Published results (LRA, table 1, 10 classes): Transformer 36.4 %, BigBird 36.1 %, Longformer 35.6 %, local
    attention 15.8 %; S4 59.6 % (arXiv:2111.00396).
    """

    length: int = 2000  # tokens per sequence, the exclusive upper bound of a tree
    min_length: int = 500  # exclusive lower bound of the tokens of a tree
    max_depth: int = 10  # maximal depth of a tree
    max_args: int = 10  # maximal number of arguments of an operator

    def __post_init__(self):
        require(self, min_length=0, length=self.min_length + 2, max_depth=1, max_args=2)
        longest = _longest(self.max_depth, self.max_args, self.min_length)
        if longest <= self.min_length:
            raise InputError(
                "min_length", f"{self.min_length} is not below {longest}, the maximum for this max_depth and max_args"
            )

    @property
    def vocab(self) -> int:
        return VOCAB

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng = open_stream(seed, index, validation)
        for _ in range(MAX_DRAWS):
            arguments, size = _draw_arguments(rng, self.max_depth, self.max_args, self.length)
            if self.min_length < size < self.length:
                break
        else:
            raise DataError(
                "data.probe.min_length", f"none of {MAX_DRAWS} trees has a size between it and length; lower min_length"
            )
        symbols = [
            np.where(n, rng.integers(FIRST_OPERATOR, CLOSE, len(n)), rng.integers(10, size=len(n))) for n in arguments
        ]
        return final_example(_write(arguments, symbols), _compute(arguments, symbols), self.length, PADDING)


# A tree is two lists of arrays, one array per depth over its nodes, in the order of their parents: the number of
# arguments of each node (0 for a digit), and its symbol.


def _draw_arguments(
    rng: np.random.Generator, max_depth: int, max_args: int, max_size: int
) -> tuple[list[np.ndarray], int]:
    """Draws the numbers of arguments per depth; returns them and the tree's size in tokens, cut off at `max_size`."""
    depths: list[np.ndarray] = []
    nodes, size = 1, 0
    while nodes and size < max_size:
        arguments = np.zeros(nodes, np.int64)
        if len(depths) + 1 < max_depth:
            inner = rng.random(nodes) <= OPERATOR_SHARE
            arguments[inner] = rng.integers(2, max_args + 1, np.count_nonzero(inner))
        depths.append(arguments)
        size += nodes + int(np.count_nonzero(arguments))
        nodes = int(arguments.sum())
    return depths, size


def _write(depths: list[np.ndarray], symbols: list[np.ndarray]) -> np.ndarray:
    """Tokens of a tree in prefix order."""
    sizes = [(arguments > 0) + 1 for arguments in depths]
    for size, arguments, below in zip(sizes[-2::-1], depths[-2::-1], sizes[:0:-1], strict=True):
        size[arguments > 0] += np.add.reduceat(below, _first_children(arguments))
    tokens = np.empty(sizes[0][0], np.int64)
    starts = np.zeros(1, np.int64)
    for depth, (arguments, size) in enumerate(zip(depths, sizes, strict=True)):
        tokens[starts] = symbols[depth]
        inner = arguments > 0
        tokens[(starts + size - 1)[inner]] = CLOSE
        if inner.any():
            before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
            # A child starts after its parent's first token and its preceding siblings.
            shift = starts[inner] + 1 - before[_first_children(arguments)]
            starts = before + np.repeat(shift, arguments[inner])
    return tokens


def _compute(depths: list[np.ndarray], symbols: list[np.ndarray]) -> int:
    """Value of a tree."""
    values = symbols[-1]
    for arguments, symbol in zip(depths[-2::-1], symbols[-2::-1], strict=True):
        inner = arguments > 0
        first, count = _first_children(arguments), arguments[inner]
        ordered = values[np.lexsort((values, np.repeat(np.arange(len(count)), count)))]
        median = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) // 2
        results = (ordered[first], ordered[first + count - 1], median, np.add.reduceat(values, first) % 10)
        values = symbol.copy()
        values[inner] = np.choose(symbol[inner] - FIRST_OPERATOR, results)
    return int(values[0])


def _first_children(arguments: np.ndarray) -> np.ndarray:
    """Index of the first child of each operator, at the next depth."""
    return (np.cumsum(arguments) - arguments)[arguments > 0]


def _longest(max_depth: int, max_args: int, bound: int) -> int:
    """Size of the largest tree in tokens, or any number above `bound`."""
    longest = 1
    for _ in range(max_depth - 1):
        longest = 2 + max_args * longest
        if longest > bound:
            break
    return longest
