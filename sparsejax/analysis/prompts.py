"""Questions about a text whose right answer is in it: a needle in a haystack, and one of many pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
        prefix = np.asarray(self.model.source.prefix(self.model.tokenizer), np.int32)
        fixed = len(prefix) + sum(map(len, sentences)) + len(question) + max(map(len, candidates))
        room = length - fixed
        if room < 0:
            raise InputError("lengths", f"{length} is below the {fixed} tokens of the needles and the question")
        if room > len(self.text):
            raise InputError("lengths", f"{length} exceeds the {len(self.text)} tokens of the text")
        start = int(rng.integers(len(self.text) - room + 1))
        hay = np.asarray(self.text[start : start + room], np.int32)
        depths = rng.integers(room + 1, size=needles)
        depths[0] = round(depth * room)
        parts, taken, at = [prefix], 0, 0
        for index in np.argsort(depths, kind="stable"):
            parts += [hay[taken : depths[index]], sentences[index]]
            taken = int(depths[index])
            if index == 0:
                at = sum(map(len, parts)) - len(sentences[0])
        prompt = np.concatenate([*parts, hay[taken:], question])
        return Question(prompt, candidates, at + np.arange(len(sentences[0])))

    def _encode(self, text: str) -> np.ndarray:
        return self.model.tokenizer.encode(text.encode()).astype(np.int32)


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
