"""Needles: one thing to be found in a long input, at a depth that can be set."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from sparsejax.data.probes.example import Example, Probe, ask_again, choose, open_stream, require

DIGITS = 10
HEX = 16


@dataclass(frozen=True)
class Passkey(Probe):
    """Numbers hidden in a haystack, each behind a name; at the end one of the names is asked for.

        filler .. name 4 7 1 1 3 filler .. filler ASK name
        answers                                       4 7 1 1 3

    Passkey retrieval (arXiv:2305.16300): one needle in a sentence said over and over. With `needles` above 1 and a
    random haystack, the multi-key needles of RULER (arXiv:2404.06654). Tokens are digits, then names, then filler,
    then ASK. `grid` sets lengths and depths.

    Outcome: models with full attention find it anywhere within the length they were trained at and soon fail beyond;
    those with a fixed state or a window fail at depths out of their reach; more needles make it harder.
    """

    length: int = 1024  # haystack, needles and question together
    needles: int = 1  # each with another name; all but one only distract
    digits: int = 5  # of a number
    names: int = 64
    fillers: int = 32  # different tokens of the haystack
    haystack: str = "repeat"  # "repeat": all fillers in order, over and over; "random"
    depth: float | None = None  # the share of the haystack before the needle asked for, 0 to 1; None: random

    def __post_init__(self):
        require(self, needles=1, digits=1, names=self.needles, fillers=1)
        require(self, length=(1 + self.needles) * (1 + self.digits))
        choose(self, "haystack", "repeat", "random")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be between 0 and 1, got {self.depth}")

    @property
    def vocab(self) -> int:
        return DIGITS + self.names + self.fillers + 1

    @property
    def hay(self) -> int:
        """Tokens of filler."""
        return self.length - (1 + self.needles) * (1 + self.digits)

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, count = open_stream(seed, index, validation), self.needles
        needles = rng.integers(DIGITS, size=(count, 1 + self.digits))
        needles[:, 0] = DIGITS + rng.choice(self.names, count, replace=False)
        depths = rng.integers(self.hay + 1, size=count)  # tokens of filler before each
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
        return ask_again(inputs, self.length - self.digits + digits, source + digits)


def grid(probe: Passkey, lengths: Iterable[int], depths: Iterable[float]) -> dict[tuple[int, float], Passkey]:
    """The probe at each length and depth, for a picture of what is found where."""
    depths = tuple(depths)
    return {(n, depth): replace(probe, length=n, depth=depth) for n in lengths for depth in depths}


@dataclass(frozen=True)
class KeyValue(Probe):
    """Key-value retrieval: pairs of random hexadecimal numbers, then one of the keys, whose value is asked for.

        KEY k1 VALUE v1 KEY k2 VALUE v2 KEY k1 VALUE
        answers                                      v1

    Lost in the Middle (arXiv:2307.03172), section 3: 75, 140 or 300 pairs of 32 digits each, as JSON. Here a mark
    stands where JSON has punctuation. Tokens are 16 digits, then KEY, then VALUE.

    Outcome: language models do best with the pair first or last and worst in the middle, a U over `asked`. As
    accuracy by distance shows the same curve, one run with `asked` at random gives it whole.
    """

    pairs: int = 75
    digits: int = 32  # of a key and of a value
    asked: int | None = None  # which pair, from 0 on; None: random

    def __post_init__(self):
        require(self, pairs=1, digits=1)
        if HEX**self.digits < self.pairs:
            raise ValueError(f"pairs must be at most 16 ** digits, as keys differ, got {self.pairs}")
        if self.asked is not None and not 0 <= self.asked < self.pairs:
            raise ValueError(f"asked must be from 0 to {self.pairs - 1}, got {self.asked}")

    @property
    def vocab(self) -> int:
        return HEX + 2

    @property
    def length(self) -> int:
        return self.pairs * (2 * self.digits + 2) + 2 * self.digits + 1

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, width = open_stream(seed, index, validation), self.digits
        drawn: dict[bytes, None] = {}  # keys in the order drawn, each once
        while len(drawn) < self.pairs:
            drawn |= dict.fromkeys(map(bytes, rng.integers(HEX, size=(self.pairs, width), dtype=np.uint8)))
        keys = np.frombuffer(b"".join([*drawn][: self.pairs]), np.uint8).reshape(self.pairs, width)
        asked = int(rng.integers(self.pairs)) if self.asked is None else self.asked
        values = rng.integers(HEX, size=(self.pairs, width))
        key, value = np.full((self.pairs, 1), HEX), np.full((self.pairs, 1), HEX + 1)
        rows = np.concatenate([key, keys, value, values], axis=1)
        inputs = np.concatenate([rows.ravel(), rows[asked, :-1]])
        digits = np.arange(width)
        return ask_again(inputs, self.length - width + digits, asked * rows.shape[1] + width + 2 + digits)
