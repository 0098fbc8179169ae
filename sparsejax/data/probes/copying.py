"""Copying: say again what was read."""

from dataclasses import dataclass

import numpy as np

from sparsejax.data.probes.example import Example, Probe, ask_again, open_stream, require


@dataclass(frozen=True)
class SelectiveCopying(Probe):
    """Data tokens at random places among noise, then as many marks, at which the data is to be said in order.

    Mamba (arXiv:2312.00752), section 4.1.1 and appendix E.1: 16 data tokens among 4,096. Token 0 is the noise, the last
    token of the vocabulary the mark, those between are data.

    Outcome (two layers, width 64, 400K steps): S4 18.3 %; with selection, S6 97.0 % and Mamba 99.8 %.
    """

    length: int = 4112  # noise, data and marks together
    tokens: int = 16  # of data
    vocab: int = 16

    def __post_init__(self):
        require(self, tokens=1, length=2 * self.tokens, vocab=3)

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, context = open_stream(seed, index, validation), self.length - self.tokens
        sources = np.sort(rng.choice(context, self.tokens, replace=False, shuffle=False))
        inputs = np.zeros(self.length, np.int32)
        inputs[sources] = rng.integers(1, self.vocab - 1, self.tokens)
        inputs[context:] = self.vocab - 1
        return ask_again(inputs, np.arange(context, self.length), sources)


@dataclass(frozen=True)
class Duplication(Probe):
    """The sequence 0w0w: a random word w of symbols from 1 on, and again; the second one is asked for.

    Reformer (arXiv:2001.04451), section 5 and Table 2: length 1,024, 127 symbols. Every answer stands length / 2 - 1
    back. The last position has nothing to predict.

    Outcome (one layer, width 256, 4 heads, 150K steps): full attention 100 %; trained with LSH attention of 4 rounds
    and evaluated with 8, 4, 2, 1 rounds: 100, 99.9, 99.4, 91.9 %. A model whose reach is below length / 2 - 1
    cannot do better than guess.
    """

    length: int = 1024  # even
    vocab: int = 128

    def __post_init__(self):
        require(self, length=4, vocab=2)
        if self.length % 2:
            raise ValueError(f"length must be even, got {self.length}")

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        half = self.length // 2
        word = open_stream(seed, index, validation).integers(1, self.vocab, half - 1, np.int32)
        inputs = np.concatenate([[0], word, [0], word])
        places = np.arange(half, self.length - 1)
        return ask_again(inputs, places, places + 1 - half)
