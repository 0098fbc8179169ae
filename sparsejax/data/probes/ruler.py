"""The synthetic tasks of RULER (arXiv:2404.06654) on tokens instead of words, at any length."""

from dataclasses import dataclass

import numpy as np

from sparsejax.data.probes.example import Example, Probe, build_example, open_stream, recall_example, require
from sparsejax.errors import InputError, require_choice

DIGITS = 10


@dataclass(frozen=True)
class Needles(Probe):
    """Numbers hidden in a haystack after names; the end repeats some names, whose numbers are the targets.

        filler .. a 4 7 filler .. b 1 3 filler .. a 9 2 filler .. ASK a 4 7 9
        answers                                                       4 7 9 2

    The needle tasks of RULER, section 3: single (`keys=1`), multi-key (several `keys`, of which all but the queried
    ones are distractors), multi-value (several `values`, in the order of the haystack) and multi-query (several
    `queries`, each answered before the next is asked). Tokens are digits, then names, then filler, then ASK.

    Published results: most language models solve the single needle at any depth; distractors, several values and
    several queries lower the accuracy as the length grows.
    """

    length: int = 1024  # tokens per sequence: haystack, needles, questions and answers
    keys: int = 4  # number of distinct names of needles
    values: int = 1  # number of needles per name
    queries: int = 1  # number of names that are asked for
    digits: int = 5  # digits per number
    names: int = 64  # number of distinct names
    fillers: int = 32  # number of distinct tokens of the haystack
    haystack: str = "random"  # "repeat" cycles through the fillers, "random" draws them
    depth: float | None = None  # fraction of the haystack before a needle of the first queried name; none: random

    def __post_init__(self):
        require(self, keys=1, values=1, queries=1, digits=1, names=self.keys, fillers=1)
        require_choice(self, "haystack", ("repeat", "random"))
        if self.queries > self.keys:
            raise InputError("queries", f"{self.queries} is above keys = {self.keys}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise InputError("depth", f"{self.depth} is not between 0 and 1")
        require(self, length=self.length - self.hay)

    @property
    def vocab(self) -> int:
        return DIGITS + self.names + self.fillers + 1

    @property
    def hay(self) -> int:
        """Number of filler tokens."""
        needles, answers = self.keys * self.values * (1 + self.digits), self.values * self.digits
        return self.length - needles - self.queries * (2 + answers) + 1

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, size = open_stream(seed, index, validation), 1 + self.digits
        key = np.repeat(np.arange(self.keys), self.values)  # of each needle
        needles = rng.integers(DIGITS, size=(len(key), size))
        needles[:, 0] = DIGITS + rng.choice(self.names, self.keys, replace=False)[key]
        depths = rng.integers(self.hay + 1, size=len(key))  # filler tokens before each needle
        if self.depth is not None:
            depths[0] = round(self.depth * self.hay)
        order = np.argsort(depths, kind="stable")
        key, needles, depths = key[order], needles[order], depths[order]
        hay = np.arange(self.hay) % self.fillers
        if self.haystack == "random":
            hay = rng.integers(self.fillers, size=self.hay)
        context = np.insert(hay + DIGITS + self.names, np.repeat(depths, size), needles.ravel())
        starts = depths + size * np.arange(len(key))
        tokens, positions, sources = [context], [], []
        for query in range(self.queries):
            start = sum(map(len, tokens))
            answer, source = needles[key == query], starts[key == query][:, None] + np.arange(1, size)
            tokens += [[self.vocab - 1], answer[0, :1], answer[:, 1:].ravel()]
            positions.append(start + 1 + np.arange(source.size))
            sources.append(source.ravel())
        return recall_example(np.concatenate(tokens)[:-1], np.concatenate(positions), np.concatenate(sources))


@dataclass(frozen=True)
class VariableTracking(Probe):
    """Chains of assignments in a haystack; the end repeats a value, and the variables that have it are the targets.

        filler .. a = 7 filler .. c = 2 filler .. b = a filler .. d = c filler .. ASK 7 a
        answers                                                                       a b

    Variable tracking of RULER, section 3. The first variable of each chain is assigned a value, and each of the next
    the variable before it. The targets are in the order of their assignments. Tokens are values, then variables, then
    filler, then =, then ASK.

    Published results: accuracy falls with the length and with the number of chains and hops.
    """

    length: int = 1024  # tokens per sequence: haystack, assignments, question and answers
    chains: int = 1  # number of chains, all but one of which are distractors
    hops: int = 4  # assignments per chain after the first
    numbers: int = 64  # number of distinct values
    variables: int = 64  # number of distinct variables
    fillers: int = 32  # number of distinct tokens of the haystack, which are drawn

    def __post_init__(self):
        require(self, chains=1, hops=0, fillers=1, numbers=self.chains, variables=self.chains * (1 + self.hops))
        require(self, length=self.length - self.hay)

    @property
    def vocab(self) -> int:
        return self.numbers + self.variables + self.fillers + 2

    @property
    def hay(self) -> int:
        """Number of filler tokens."""
        return self.length - 3 * self.chains * (1 + self.hops) - 2 - self.hops

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, size = open_stream(seed, index, validation), 1 + self.hops
        values = rng.choice(self.numbers, self.chains, replace=False)
        names = self.numbers + rng.choice(self.variables, (self.chains, size), replace=False)
        assigned = np.concatenate([values[:, None], names[:, :-1]], axis=1)
        equals = np.full_like(names, self.vocab - 2)
        chain = rng.permutation(np.repeat(np.arange(self.chains), size))  # of each statement, in order
        statements = np.empty((chain.size, 3), np.int64)
        for number in range(self.chains):
            statements[chain == number] = np.stack([names, equals, assigned], axis=-1)[number]
        depths = np.sort(rng.integers(self.hay + 1, size=chain.size))
        hay = self.numbers + self.variables + rng.integers(self.fillers, size=self.hay)
        context = np.insert(hay, np.repeat(depths, 3), statements.ravel())
        sources = (depths + 3 * np.arange(chain.size))[chain == 0]
        inputs = np.concatenate([context, [self.vocab - 1, values[0]], names[0, :-1]])
        return recall_example(inputs, len(context) + 1 + np.arange(size), sources)


@dataclass(frozen=True)
class CommonWords(Probe):
    """Words in random order, some of which are common; those are the targets, in the order of their ids.

        5 2 9 5 7 2 5 3 2 .. ASK 2
        answers              2   5

    Common words extraction of RULER, section 3: 10 words that occur 30 times among others that occur 3 times. The
    number of other words grows with the length. Tokens are words, then ASK.

    Published results: most language models fail at lengths at which they retrieve needles.
    """

    length: int = 1024  # tokens per sequence: words, question and answers
    common: int = 10  # number of common words
    repeats: int = 30  # occurrences of a common word
    rare: int = 3  # occurrences of each other word, apart from the last
    words: int = 512  # number of distinct words

    def __post_init__(self):
        require(self, common=1, rare=1, repeats=self.rare + 1, length=self.common * (self.repeats + 1))
        require(self, words=self.common + self._others)

    @property
    def vocab(self) -> int:
        return self.words + 1

    @property
    def _others(self) -> int:
        """Number of words that are not common."""
        return -(-(self.length - self.common * (self.repeats + 1)) // self.rare)

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng, count = open_stream(seed, index, validation), self.length - self.common
        words = rng.choice(self.words, self.common + self._others, replace=False)
        answers = np.sort(words[: self.common])
        listed = np.concatenate([np.repeat(answers, self.repeats), np.repeat(words[self.common :], self.rare)])[:count]
        inputs = np.concatenate([rng.permutation(listed), [self.vocab - 1], answers[:-1]])
        return build_example(inputs, np.arange(count, self.length), answers)


@dataclass(frozen=True)
class FrequentWords(Probe):
    """Words with the frequencies of a zeta distribution; the most frequent are the targets, the first one first.

        5 2 5 7 2 5 3 5 .. ASK 5
        answers            5   2

    Frequent words extraction of RULER, section 3: the word of rank k occurs in proportion to k ** -alpha. Tokens are
    words, then ASK.

    Published results: accuracy falls with the length and as alpha decreases.
    """

    length: int = 1024  # tokens per sequence: words, question and answers
    answers: int = 3  # number of words that are asked for
    alpha: float = 2.0  # exponent of the distribution
    words: int = 512  # number of distinct words

    def __post_init__(self):
        require(self, answers=1, alpha=0, words=self.answers + 1, length=2 * self.answers)
        counts = self._counts
        if (np.diff(counts[: self.answers + 1]) >= 0).any() or counts[self.answers :].max() >= counts[self.answers - 1]:
            problem = f"{self.length} is too short for distinct frequencies with alpha = {self.alpha}"
            raise InputError("length", f"{problem}; increase either")

    @property
    def vocab(self) -> int:
        return self.words + 1

    @property
    def _counts(self) -> np.ndarray:
        """Occurrences of the word of each rank, which add up to the words of a sequence."""
        shares = np.arange(1, self.words + 1) ** -float(self.alpha)
        edges = np.round(np.cumsum(shares) / shares.sum() * (self.length - self.answers)).astype(int)
        return np.diff(edges, prepend=0)

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        rng = open_stream(seed, index, validation)
        words = rng.permutation(self.words)
        listed, answers = rng.permutation(np.repeat(words, self._counts)), words[: self.answers]
        inputs = np.concatenate([listed, [self.vocab - 1], answers[:-1]])
        return build_example(inputs, np.arange(len(listed), self.length), answers)
