"""Recall: the token that followed an earlier occurrence of the current token."""

from dataclasses import dataclass

import numpy as np

from sparsejax.data.probes.example import Example, Probe, open_stream, recall_example, require, require_even

BLANK = 0


@dataclass(frozen=True)
class Mqar(Probe):
    """Multi-query associative recall (MQAR): key-value pairs, then each key again, where its value is the target.

        inputs   k1 v1 k2 v2  .  .  k2  .  .  .  k1  .
        answers                     v2           v1

    Zoology (arXiv:2312.04927). Keys are drawn without replacement from the lower half of the vocabulary (token 0 is
    the blank), values from the upper half. The part after the pairs consists of slots of two tokens; the slots of the
    queries, in the order of the keys, are drawn without replacement with p(g) ~ g ** (a - 1) for slot g = 1, 2, ...

    Published results: attention of width 64 solves every length from 64 to 512; gated convolutions and recurrences
    need a width, or a state, that grows with the number of pairs. Report accuracy by distance: most queries follow
    soon after the pairs, so the average flatters a short window.
    """

    length: int = 64  # tokens per sequence, an even number
    pairs: int = 4  # number of key-value pairs
    vocab: int = 8192  # number of token ids: blank, keys and values
    gap_power: float = 0.01  # exponent a of the distribution of the gaps; with 1, all slots are equally likely
    # fill with random tokens instead of blanks, which may repeat a key; on in the paper's code
    random_non_queries: bool = False

    def __post_init__(self):
        require(self, pairs=1, length=4 * self.pairs, vocab=2 * self.pairs + 2)
        require_even(self, "length")

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, half, pairs = open_stream(seed, index, validation), self.vocab // 2, np.arange(self.pairs)
        keys = rng.choice(half - 1, self.pairs, replace=False) + 1
        values = rng.choice(self.vocab - half, self.pairs, replace=False) + half
        # The order of independent exponential clocks is a weighted draw without replacement.
        slots = np.arange(1, self.length // 2 - self.pairs + 1)
        clocks = rng.standard_exponential(len(slots)) * slots ** (1 - self.gap_power)
        queries = 2 * (self.pairs + np.argsort(clocks, kind="stable")[: self.pairs])
        blank = rng.integers(self.vocab, size=self.length) if self.random_non_queries else BLANK
        inputs = np.full(self.length, blank, np.int32)
        inputs[2 * pairs], inputs[2 * pairs + 1], inputs[queries] = keys, values, keys
        return recall_example(inputs, queries, 2 * pairs + 1)


@dataclass(frozen=True)
class InductionHeads(Probe):
    """Random tokens with one trigger; the last token repeats the trigger, and its successor is the target.

    Mamba (arXiv:2312.00752), section 4.1.2 and appendix E.1, after H3 (arXiv:2212.14052). The trigger is the last
    token of the vocabulary.

    Published results (two layers, trained at 256 tokens): Mamba remains perfect up to a million tokens; attention with
    any position encoding generalises to about twice its training length.
    """

    length: int = 256  # tokens per sequence
    vocab: int = 16  # number of token ids, with the trigger

    def __post_init__(self):
        require(self, length=3, vocab=2)

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, last = open_stream(seed, index, validation), self.length - 1
        inputs = rng.integers(self.vocab - 1, size=self.length, dtype=np.int32)
        trigger = rng.integers(last - 1)
        inputs[trigger] = inputs[last] = self.vocab - 1
        return recall_example(inputs, np.array([last]), np.array([trigger + 1]))
