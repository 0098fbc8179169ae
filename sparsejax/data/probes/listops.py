"""ListOps: nested operations on lists of digits, to be computed."""

from dataclasses import dataclass

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.probes.example import Example, Probe, ask_at_end, open_stream, require

OPERATORS = ("MIN", "MAX", "MED", "SM")  # SM: the sum modulo 10; tokens 10 to 13, behind the digits
FIRST_OPERATOR, CLOSE, PADDING = 10, 14, 15
VOCAB = 16
OPERATOR_SHARE = 0.25
MOST_DRAWS = 100_000  # of trees for one example; LRA's lengths take about ten


@dataclass(frozen=True)
class ListOps(Probe):
    """An expression such as [MAX 2 9 [MIN 4 7 ] 0 ], whose value, a digit, is asked for at its last token.

    Long Range Arena (arXiv:2011.04006), section 2.2.1, after arXiv:1804.06028. A node is an operator with probability
    1/4 above `max_depth` and a digit otherwise; an operator has 2 to `max_args` arguments, all numbers equally
    likely. MED of an even number of arguments is the mean of the two in the middle, rounded down. Trees are drawn
    until one has more than `min_length` and fewer than `length` tokens, an operator counting 2 (its bracket closes).
    The published generator has no seed and drops trees it has drawn before; here examples come in the order of their
    index, and only short ones ever repeat.

    Outcome (LRA's table 1, 10 classes): Transformer 36.4 %, BigBird 36.1 %, Longformer 35.6 %, local attention 15.8 %;
    S4 59.6 % (arXiv:2111.00396).
    """

    length: int = 2000
    min_length: int = 500
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self):
        require(self, min_length=0, length=self.min_length + 2, max_depth=1, max_args=2)
        longest = _longest(self.max_depth, self.max_args, self.min_length)
        if longest <= self.min_length:
            raise ValueError(f"min_length must be below {longest}, the longest for this max_depth and max_args")

    @property
    def vocab(self) -> int:
        return VOCAB

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng = open_stream(seed, index, validation)
        for _ in range(MOST_DRAWS):
            arguments, size = _draw_arguments(rng, self.max_depth, self.max_args, self.length)
            if self.min_length < size < self.length:
                break
        else:
            raise DataError(f"data.probe.min_length: none of {MOST_DRAWS} trees drawn is between it and length")
        symbols = [
            np.where(n, rng.integers(FIRST_OPERATOR, CLOSE, len(n)), rng.integers(10, size=len(n))) for n in arguments
        ]
        return ask_at_end(_write(arguments, symbols), _compute(arguments, symbols), self.length, PADDING)


# A tree is a list of its depths from the root on; each is an array over the nodes there, children in the order of their
# parents: how many arguments a node has (0: a digit), and its symbol.


def _draw_arguments(
    rng: np.random.Generator, max_depth: int, max_args: int, enough: int
) -> tuple[list[np.ndarray], int]:
    """Numbers of arguments, depth by depth, and the tokens of the tree; given up once there are `enough`."""
    depths, nodes, size = [], 1, 0
    while nodes and size < enough:
        arguments = np.zeros(nodes, np.int64)
        if len(depths) + 1 < max_depth:
            inner = rng.random(nodes) <= OPERATOR_SHARE
            arguments[inner] = rng.integers(2, max_args + 1, np.count_nonzero(inner))
        depths.append(arguments)
        size += nodes + np.count_nonzero(arguments)
        nodes = arguments.sum()
    return depths, size


def _write(depths: list[np.ndarray], symbols: list[np.ndarray]) -> np.ndarray:
    """The tokens of a tree, in the order of reading."""
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
            # A child starts behind its parent's first token and the siblings before it.
            shift = starts[inner] + 1 - before[_first_children(arguments)]
            starts = before + np.repeat(shift, arguments[inner])
    return tokens


def _compute(depths: list[np.ndarray], symbols: list[np.ndarray]) -> int:
    """The value of a tree."""
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
    """Where, one depth below, the children of each operator start."""
    return (np.cumsum(arguments) - arguments)[arguments > 0]


def _longest(max_depth: int, max_args: int, enough: int) -> int:
    """Tokens of the largest tree, or some number above `enough`."""
    longest = 1
    for _ in range(max_depth - 1):
        longest = 2 + max_args * longest
        if longest > enough:
            break
    return longest
