"""Copying: reproduce tokens of the input."""

from dataclasses import dataclass

import numpy as np

from sparsejax.data.probes.example import Example, Probe, open_stream, recall_example, require, require_even


@dataclass(frozen=True)
class SelectiveCopying(Probe):
    """Data tokens at random positions among noise, followed by as many marks; the targets at the marks are the data.

    Mamba (arXiv:2312.00752), section 4.1.1 and appendix E.1: 16 data tokens among 4,096. Token 0 is noise, the last
    token of the vocabulary is the mark, all others are data.

    Published results (two layers, width 64, 400K steps): S4 18.3 %, S6 97.0 %, Mamba 99.8 %.
    """

    length: int = 4112  # tokens per sequence: noise, data and marks
    tokens: int = 16  # number of data tokens
    vocab: int = 16  # number of token ids: noise, mark and data

    def __post_init__(self):
        require(self, tokens=1, length=2 * self.tokens, vocab=3)

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, context = open_stream(seed, index, validation), self.length - self.tokens
        sources = np.sort(rng.choice(context, self.tokens, replace=False, shuffle=False))
        inputs = np.zeros(self.length, np.int32)
        inputs[sources] = rng.integers(1, self.vocab - 1, self.tokens)
        inputs[context:] = self.vocab - 1
        return recall_example(inputs, np.arange(context, self.length), sources)


@dataclass(frozen=True)
class Duplication(Probe):
    """The sequence 0w0w, where w is a random word of the symbols from 1 up; the targets are the second w.

    Reformer (arXiv:2001.04451), section 5 and Table 2: length 1,024, 127 symbols. Every answer is at distance
    length / 2 - 1. The last position has no target.

    Published results (one layer, width 256, 4 heads, 150K steps): full attention 100 %; LSH attention trained with 4
    rounds and evaluated with 8, 4, 2 and 1 rounds: 100, 99.9, 99.4 and 91.9 %. A model whose receptive field is
    smaller than length / 2 - 1 can only guess.
    """

    length: int = 1024  # tokens per sequence, an even number
    vocab: int = 128  # number of token ids: 0 and the symbols

    def __post_init__(self):
        require(self, length=4, vocab=2)
        require_even(self, "length")

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        half = self.length // 2
        word = open_stream(seed, index, validation).integers(1, self.vocab, half - 1, np.int32)
        inputs = np.concatenate([[0], word, [0], word])
        positions = np.arange(half, self.length - 1)
        return recall_example(inputs, positions, positions + 1 - half)
