"""Questions about a text whose right answer is in it: needles, pairs, chains of variables, and frequencies of words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from sparsejax.errors import InputError
from sparsejax.loaded import LoadedModel

KEYS = (
    "Amsterdam", "Berlin", "Cairo", "Delhi", "Edinburgh", "Florence", "Geneva", "Havana", "Istanbul", "Jakarta",
    "Kyoto", "Lima", "Madrid", "Nairobi", "Oslo", "Prague",
)  # fmt: skip
SENTENCE = " The code of {key} is {value}."
QUESTION = " The code of {key} is"
VALUES = range(1000, 10_000)  # values of needles
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
SYLLABLES = len(CONSONANTS) * len(VOWELS)
COMMON = 10  # occurrences of a common word
WIDTH = 8  # hexadecimal digits of the keys and values of pairs


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and possible continuations.

    Attributes:
      prompt: Ids [t].
      candidates: Ids of the continuations, the right one first.
      evidence: Positions in the prompt of the sentence that holds the answer.
    """

    prompt: Int[np.ndarray, " t"]
    candidates: list[Int[np.ndarray, " c"]]
    evidence: Int[np.ndarray, " e"]

    @property
    def length(self) -> int:
        """Tokens of the prompt and of its longest continuation."""
        return len(self.prompt) + max(map(len, self.candidates))


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Questions about a sentence in a text: needles of different keys, one of which is asked for.

    Attributes:
      model: The model, whose tokenizer encodes the sentences.
      text: Ids of the text.
      sentence: A needle, with {key} and {value}.
      question: The end of the prompt, with {key}.
      candidates: Number of values that are ranked: those of the needles first, then others.

    Raises:
      InputError: A template lacks a field.
    """

    model: LoadedModel
    text: Int[np.ndarray, " n"]
    sentence: str
    question: str
    candidates: int

    def __post_init__(self) -> None:
        for name, fields in (("sentence", ("{key}", "{value}")), ("question", ("{key}",))):
            for field in fields:
                if field not in getattr(self, name):
                    raise InputError(name, f"{getattr(self, name)!r} has no {field}")
        if self.candidates > len(VALUES):
            raise InputError("candidates", f"{self.candidates} is above {len(VALUES)}")

    def build(self, length: int, depth: float, needles: int, seed: int) -> Question:
        """Returns a question of `length` tokens; equal seeds give equal keys and values.

        Args:
          length: Tokens of the prompt and of the longest candidate.
          depth: Fraction of the haystack before the needle that is asked for.
          needles: Number of needles; the others are at random depths.
          seed: Seed of keys, values, depths and the part of the text.

        Raises:
          InputError: There are more needles than keys, or the length has no room for them or exceeds the text.
        """
        if needles > len(KEYS):
            raise InputError("needles", f"{needles} is above {len(KEYS)}, the number of keys")
        rng = np.random.default_rng(seed)
        keys = rng.choice(KEYS, needles, replace=False)
        values = rng.choice(np.array(VALUES), max(self.candidates, needles), replace=False).tolist()
        sentences = [
            self._encode(self.sentence.replace("{key}", key).replace("{value}", str(value)))
            for key, value in zip(keys, values, strict=False)
        ]
        question = self._encode(self.question.replace("{key}", keys[0]))
        candidates = [self._encode(f" {value}") for value in values[: max(self.candidates, needles)]]
        fixed = [*sentences, question, max(candidates, key=len)]
        prefix, hay = cut_haystack(self.model, self.text, length, fixed, rng)
        depths = rng.integers(len(hay) + 1, size=needles)
        depths[0] = round(depth * len(hay))
        order = np.argsort(depths, kind="stable")
        context, starts = hide(hay, [sentences[index] for index in order], depths[order])
        start = len(prefix) + starts[list(order).index(0)]
        return Question(np.concatenate([prefix, context, question]), candidates, start + np.arange(len(sentences[0])))

    def _encode(self, text: str) -> np.ndarray:
        return self.model.tokenizer.encode(text.encode()).astype(np.int32)


def cut_haystack(
    model: LoadedModel, text: np.ndarray, length: int, fixed: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids with which a text begins, and a random part of `text` that leaves room for the `fixed` ids.

    Raises:
      InputError: The length has no room for them, or exceeds the text.
    """
    prefix = np.asarray(model.source.prefix(model.tokenizer), np.int32)
    size = len(prefix) + sum(map(len, fixed))
    if length < size:
        raise InputError("lengths", f"{length} is below the {size} tokens of the needles and the question")
    if length - size > len(text):
        raise InputError("lengths", f"{length} exceeds the {len(text)} tokens of the text")
    start = int(rng.integers(len(text) - (length - size) + 1))
    return prefix, np.asarray(text[start : start + length - size], np.int32)


def hide(hay: np.ndarray, sentences: Sequence[np.ndarray], depths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inserts sentences into a text before the tokens at ascending `depths`; returns it and where each starts."""
    ends = np.cumsum([len(sentence) for sentence in sentences])
    starts = depths + ends - [len(sentence) for sentence in sentences]
    parts = [part for pair in zip(np.split(hay, depths), [*sentences, hay[:0]], strict=True) for part in pair]
    return np.concatenate(parts), starts


def build_tracking(
    model: LoadedModel, text: np.ndarray, length: int, chains: int, hops: int, candidates: int, seed: int
) -> Question:
    """Returns a question for the variables that have a value, after chains of assignments in a text.

    Variable tracking of RULER (arXiv:2404.06654, section 3). The right continuation lists the variables of a chain in
    the order of their assignments. The others replace some of them by the variables of another chain at the same link.

    Args:
      model: The model, whose tokenizer encodes the assignments.
      text: Ids of the haystack.
      length: Tokens of the prompt and of the longest continuation.
      chains: Number of chains, at least 2.
      hops: Assignments per chain after the first.
      candidates: Largest number of continuations.
      seed: Seed of names, values, depths and the part of the text.

    Raises:
      InputError: The length has no room for the assignments, or exceeds the text.
    """
    rng, links = np.random.default_rng(seed), 1 + hops
    letters = rng.choice(26**3, chains * links, replace=False)
    names = [[chr(65 + i // 676) + chr(65 + i // 26 % 26) + chr(65 + i % 26) for i in row]
             for row in letters.reshape(chains, links)]  # fmt: skip
    values = rng.choice(np.array(VALUES), chains, replace=False)

    def encode(text: str) -> np.ndarray:
        return model.tokenizer.encode(text.encode()).astype(np.int32)

    def name(lists: Sequence[int]) -> np.ndarray:
        return encode(" " + ", ".join(names[chain][link] for link, chain in enumerate(lists)))

    order = rng.permutation(np.repeat(np.arange(chains), links))  # the chain of each assignment
    remaining = [iter(zip(row, [value, *row], strict=False)) for row, value in zip(names, values, strict=True)]
    sentences = [encode(" Let {} = {}.".format(*next(remaining[chain]))) for chain in order]
    question = encode(f" The variables with the value {values[0]} are")
    wrong = rng.choice(np.arange(1, chains**links), min(candidates, chains**links) - 1, replace=False)
    lists = [[0] * links, *(list(np.unravel_index(index, [chains] * links)) for index in wrong)]
    continuations = [name(chosen) for chosen in lists]
    prefix, hay = cut_haystack(model, text, length, [*sentences, question, max(continuations, key=len)], rng)
    context, starts = hide(hay, sentences, np.sort(rng.integers(len(hay) + 1, size=len(sentences))))
    evidence = [
        len(prefix) + start + np.arange(len(sentence))
        for start, sentence, chain in zip(starts, sentences, order, strict=True)
        if chain == 0
    ]
    return Question(np.concatenate([prefix, context, question]), continuations, np.concatenate(evidence))


def build_words(
    model: LoadedModel, length: int, counts: Callable[[int], np.ndarray], question: str, ranked: bool, answers: int,
    candidates: int, seed: int,
) -> Question:  # fmt: skip
    """Returns a question for the most frequent words of a list, in random order and as long as fits.

    Common and frequent words extraction of RULER (arXiv:2404.06654, section 3). The right continuation lists the
    words of the largest counts. The others replace some of them by other words of the list.

    Args:
      model: The model, whose tokenizer encodes the words.
      length: Largest number of tokens of the prompt and of the longest continuation.
      counts: Returns the occurrences of each word, in descending order, of a list of n words.
      question: The end of the prompt.
      ranked: Whether continuations begin with the most frequent word; otherwise with the first of the list.
      answers: Number of words that are asked for.
      candidates: Number of continuations.
      seed: Seed of the words and their order.

    Raises:
      InputError: The length is too short for words of distinct frequencies.
    """

    def build(n: int) -> tuple[str, np.ndarray, list[str]]:
        rng, sizes = np.random.default_rng(seed), counts(n)
        syllables = 2 if len(sizes) <= SYLLABLES**2 else 3
        words = np.array([_spell(i, syllables) for i in rng.choice(SYLLABLES**syllables, len(sizes), replace=False)])
        listed = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        first = np.arange(answers) if ranked else np.array(list(dict.fromkeys(listed[listed < answers])))
        lists = {tuple(first): None}
        others = np.arange(answers, len(sizes))
        while len(lists) < candidates:
            replaced = first.copy()
            which = rng.permutation(answers)[: 1 + rng.integers(answers)]
            replaced[which] = rng.choice(others, len(which), replace=False)
            lists[tuple(replaced)] = None
        return " ".join(words[listed]), listed, [" " + " ".join(words[list(chosen)]) for chosen in lists]

    def encode(n: int) -> Question:
        text, _, continuations = build(n)
        prompt = text + question
        evidence = np.arange(len(model.source.prefix(model.tokenizer)), len(model.encode(text)))
        ids = [model.encode_pair(prompt, continuation)[1] for continuation in continuations]
        return Question(model.encode(prompt), ids, evidence)

    def fits(n: int) -> bool:
        text, _, continuations = build(n)
        return max(len(model.encode(text + question + continuation)) for continuation in continuations) <= length

    def asks(n: int) -> bool:
        """Whether the answer is determined, and there are enough other words for the continuations."""
        top, others = np.split(counts(n), [answers])
        enough = len(others) >= max(answers, -(-(candidates - 1) // answers))
        return enough and top.min() > others.max() and not (ranked and (np.diff(top) == 0).any())

    least = next((n for n in range(answers + 1, length) if asks(n)), length)
    if least == length or not fits(least):
        raise InputError("lengths", f"{length} is too short for {answers} words that are more frequent than others")
    low, high = least, length  # a word has at least one token
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return encode(low)


def count_common(n: int, answers: int) -> np.ndarray:
    """Counts of `answers` common words and of rare ones, of which a common word occurs 10 times as often."""
    return np.concatenate([np.full(answers, COMMON), np.ones(max(n - COMMON * answers, 0), int)])


def count_frequent(n: int, alpha: float) -> np.ndarray:
    """Counts of words of ranks 1, 2, ... in proportion to rank ** -alpha, which add up to n, in descending order."""
    shares = np.arange(1.0, n + 1) ** -alpha
    sizes = np.diff(np.round(np.cumsum(shares) / shares.sum() * n).astype(int), prepend=0)
    return -np.sort(-sizes[sizes > 0])


def _spell(index: int, syllables: int) -> str:
    """The word of a number."""
    parts = [index // SYLLABLES**power % SYLLABLES for power in range(syllables)]
    return "".join(CONSONANTS[part // len(VOWELS)] + VOWELS[part % len(VOWELS)] for part in parts)


def build_pairs(model: LoadedModel, pairs: int, query: int, candidates: int, seed: int) -> Question:
    """Returns a question for the value of one of several keys (arXiv:2307.03172), in lines instead of JSON.

    Args:
      model: The model, whose tokenizer encodes the lines.
      pairs: Number of pairs.
      query: Index of the pair that is asked for.
      candidates: Number of values that are ranked, all of them in the prompt.
      seed: Seed of the keys and values.
    """
    rng = np.random.default_rng(seed)
    words = ["".join(f"{digit:x}" for digit in row) for row in rng.integers(16, size=(2 * pairs, WIDTH))]
    lines = [f"{key}: {value}\n" for key, value in zip(words[:pairs], words[pairs:], strict=True)]
    start, stop = (len(model.encode("".join(lines[:count]))) for count in (query, query + 1))
    others = rng.permutation([index for index in range(pairs) if index != query])[: candidates - 1]
    prompt = "".join(lines) + f"{words[query]}:"
    continuations = [model.encode_pair(prompt, f" {words[pairs + index]}")[1] for index in (query, *others)]
    return Question(model.encode(prompt), continuations, np.arange(start, stop))


def rank(model: LoadedModel, questions: Sequence[Question], batch: int) -> tuple[list[bool], list[float]]:
    """Returns per question whether the right continuation is the most likely one, and its loss in nats per token."""
    pairs = [(question.prompt, candidate) for question in questions for candidate in question.candidates]
    scores, start = model.score(pairs, batch=batch), 0
    hits, losses = [], []
    for question in questions:
        right, *others = scores[start : start + len(question.candidates)]
        start += len(question.candidates)
        hits.append(all(right.log_likelihood > other.log_likelihood for other in others))
        losses.append(-float(right.tokens.mean()))
    return hits, losses
