"""Needles: retrieval of one item from a long input, at a random or fixed depth."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from sparsejax.data.probes.example import Example, Probe, open_stream, recall_example, require
from sparsejax.errors import InputError, require_choice

DIGITS = 10
HEX = 16


@dataclass(frozen=True)
class Passkey(Probe):
    """Numbers hidden in a haystack, each after a name; the end repeats one of the names, whose number is the target.

        filler .. name 4 7 1 1 3 filler .. filler ASK name
        answers                                       4 7 1 1 3

    Passkey retrieval (arXiv:2305.16300): one needle in a repeated sentence. With `needles` above 1 and a random
    haystack, this is the multi-key needle task of RULER (arXiv:2404.06654). Tokens are digits, then names, then
    filler, then ASK. `grid` varies lengths and depths.

    Published results: models with full attention retrieve at any depth within their training length and fail soon
    beyond it; models with a window or a fixed-size state fail outside of their receptive field; more needles are
    harder.
    """

    length: int = 1024  # tokens per sequence: haystack, needles and question
    needles: int = 1  # number of needles with distinct names; all but one are distractors
    digits: int = 5  # digits per number
    names: int = 64  # number of distinct names of needles
    fillers: int = 32  # number of distinct tokens of the haystack
    haystack: str = "repeat"  # "repeat" cycles through the fillers, "random" draws them
    depth: float | None = None  # fraction of the haystack before the target needle, from 0 to 1; none for a random one

    def __post_init__(self):
        require(self, needles=1, digits=1, names=self.needles, fillers=1)
        require(self, length=(1 + self.needles) * (1 + self.digits))
        require_choice(self, "haystack", ("repeat", "random"))
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise InputError("depth", f"{self.depth} is not between 0 and 1")

    @property
    def vocab(self) -> int:
        return DIGITS + self.names + self.fillers + 1

    @property
    def hay(self) -> int:
        """Number of filler tokens."""
        return self.length - (1 + self.needles) * (1 + self.digits)

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, count = open_stream(seed, index, validation), self.needles
        needles = rng.integers(DIGITS, size=(count, 1 + self.digits))
        needles[:, 0] = DIGITS + rng.choice(self.names, count, replace=False)
        depths = rng.integers(self.hay + 1, size=count)  # filler tokens before each needle
        if self.depth is not None:
            depths[0] = round(self.depth * self.hay)
        order = np.argsort(depths, kind="stable")
        hay = np.arange(self.hay) % self.fillers
        if self.haystack == "random":
            hay = rng.integers(self.fillers, size=self.hay)
        context = np.insert(
            hay + DIGITS + self.names, np.repeat(depths[order], 1 + self.digits), needles[order].ravel()
        )
        inputs = np.concatenate([context, [self.vocab - 1], needles[0, :-1]])
        digits = np.arange(self.digits)
        source = depths[0] + np.flatnonzero(order == 0)[0] * (1 + self.digits) + 1
        return recall_example(inputs, self.length - self.digits + digits, source + digits)


def grid(probe: Passkey, lengths: Iterable[int], depths: Iterable[float]) -> dict[tuple[int, float], Passkey]:
    """The probe at each length and depth, for a retrieval heatmap."""
    depths = tuple(depths)
    return {(n, depth): replace(probe, length=n, depth=depth) for n in lengths for depth in depths}


@dataclass(frozen=True)
class KeyValue(Probe):
    """Key-value retrieval: pairs of random hexadecimal numbers, then one of the keys, whose value is the target.

    With `queries` above 1, further keys follow, each after the value of the previous one.

        KEY k1 VALUE v1 KEY k2 VALUE v2 KEY k1 VALUE
        answers                                      v1

    Lost in the Middle (arXiv:2307.03172), section 3: 75, 140 or 300 pairs of 32 digits each, as JSON. Here one token
    replaces the punctuation of JSON. Tokens are 16 digits, then KEY, then VALUE.

    Published results: language models are most accurate for the first and last pairs and least accurate in the middle,
    a U-shaped curve over `query`. Accuracy by distance shows the same curve, so one run with a random `query` measures
    all of it.
    """

    pairs: int = 75  # number of key-value pairs
    digits: int = 32  # digits per key and per value
    query: int | None = None  # index of the first queried pair, from 0; none for a random one
    queries: int = 1  # number of queried pairs, without repetition

    def __post_init__(self):
        require(self, pairs=1, digits=1, queries=1)
        if HEX**self.digits < self.pairs:
            raise InputError("pairs", f"{self.pairs} is above 16 ** digits = {HEX**self.digits}, the number of keys")
        if self.queries > self.pairs:
            raise InputError("queries", f"{self.queries} is above pairs = {self.pairs}")
        if self.query is not None and not 0 <= self.query < self.pairs:
            raise InputError("query", f"{self.query} is not between 0 and pairs - 1 = {self.pairs - 1}")

    @property
    def vocab(self) -> int:
        return HEX + 2

    @property
    def length(self) -> int:
        return (self.pairs + self.queries) * (2 * self.digits + 2) - 1

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, width = open_stream(seed, index, validation), self.digits
        drawn: dict[bytes, None] = {}  # an ordered set of keys
        while len(drawn) < self.pairs:
            drawn |= dict.fromkeys(map(bytes, rng.integers(HEX, size=(self.pairs, width), dtype=np.uint8)))
        keys = np.frombuffer(b"".join([*drawn][: self.pairs]), np.uint8).reshape(self.pairs, width)
        query = int(rng.integers(self.pairs)) if self.query is None else self.query
        values = rng.integers(HEX, size=(self.pairs, width))
        key, value = np.full((self.pairs, 1), HEX), np.full((self.pairs, 1), HEX + 1)
        pairs = np.concatenate([key, keys, value, values], axis=1)
        others = rng.permutation(np.delete(np.arange(self.pairs), query))
        queries = np.concatenate([[query], others])[: self.queries]
        inputs = np.concatenate([pairs.ravel(), pairs[queries].ravel()[:-1]])
        first = np.arange(self.pairs, self.pairs + self.queries) * pairs.shape[1]
        digits = width + 1 + np.arange(width)
        positions, sources = np.add.outer(first, digits), np.add.outer(queries * pairs.shape[1], digits + 1)
        return recall_example(inputs, positions.ravel(), sources.ravel())
