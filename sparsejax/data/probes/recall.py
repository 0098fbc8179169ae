"""Recall: what followed a token when it was seen before?"""

from dataclasses import dataclass

import numpy as np

from sparsejax.data.probes.example import Example, Probe, ask_again, open_stream, require

BLANK = 0


@dataclass(frozen=True)
class Mqar(Probe):
    """Multi-query associative recall: key-value pairs, then each key once more, at which its value is asked for.

        inputs   k1 v1 k2 v2  .  .  k2  .  .  .  k1  .
        answers                     v2           v1

    Zoology (arXiv:2312.04927). Keys are drawn without replacement from the lower half of the vocabulary (token 0 is
    the blank), values from the upper half. The part behind the pairs is cut into spaces of two tokens; those with the
    queries are drawn without replacement with p(g) ~ g ** (a - 1), g = 1, 2, ..., for the keys in order.

    Outcome: attention solves it at every length from 64 to 512 with a width of 64; gated convolutions and recurrences
    need a width, or a state, that grows with the number of pairs. Report accuracy by distance: most queries come
    soon after the pairs, so that a short window looks better than it is.
    """

    length: int = 64  # even
    pairs: int = 4
    vocab: int = 8192
    gap_power: float = 0.01  # a; 1: all spaces are equally likely
    random_non_queries: bool = False  # any token instead of blanks; it may then repeat a key. On in the paper's code

    def __post_init__(self):
        require(self, pairs=1, length=4 * self.pairs, vocab=2 * self.pairs + 2)
        if self.length % 2:
            raise ValueError(f"length must be even, got {self.length}")

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, half, pairs = open_stream(seed, index, validation), self.vocab // 2, np.arange(self.pairs)
        keys = rng.choice(half - 1, self.pairs, replace=False) + 1
        values = rng.choice(self.vocab - half, self.pairs, replace=False) + half
        # The first arrivals of independent clocks come in the order of weighted draws without replacement.
        spaces = np.arange(1, self.length // 2 - self.pairs + 1)
        clocks = rng.standard_exponential(len(spaces)) * spaces ** (1 - self.gap_power)
        places = 2 * (self.pairs + np.argsort(clocks, kind="stable")[: self.pairs])
        blank = rng.integers(self.vocab, size=self.length) if self.random_non_queries else BLANK
        inputs = np.full(self.length, blank, np.int32)
        inputs[2 * pairs], inputs[2 * pairs + 1], inputs[places] = keys, values, keys
        return ask_again(inputs, places, 2 * pairs + 1)


@dataclass(frozen=True)
class InductionHeads(Probe):
    """Random tokens, among them once a trigger; the last token is the trigger again: what followed it?

    Mamba (arXiv:2312.00752), section 4.1.2 and appendix E.1, after H3 (arXiv:2212.14052). The trigger is the last
    token of the vocabulary.

    Outcome: of models with two layers trained at 256 tokens, Mamba stays perfect up to a million tokens; attention,
    with whatever positions, solves it up to about twice the length it was trained at.
    """

    length: int = 256
    vocab: int = 16

    def __post_init__(self):
        require(self, length=3, vocab=2)

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, last = open_stream(seed, index, validation), self.length - 1
        inputs = rng.integers(self.vocab - 1, size=self.length, dtype=np.int32)
        place = rng.integers(last - 1)
        inputs[[place, last]] = self.vocab - 1
        return ask_again(inputs, np.array([last]), np.array([place + 1]))
