"""The interface of probes, their random streams, field checks, and constructors of examples."""

import functools
from typing import Any, Protocol

import numpy as np

from sparsejax.errors import InputError, require_at_least

Example = dict[str, np.ndarray]  # see Probe.example


class Probe(Protocol):
    """A task whose examples are computed from a seed and an index; its fields are its configuration.

    Attributes:
      vocab: Vocabulary size. Answers that are not input tokens, such as classes, are tokens too: class c is token c.
      length: Tokens per example, t.
    """

    @property
    def vocab(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def held_out(self) -> int | None:
        """Number of validation examples if they are a fixed set, read in order; None if they are generated."""
        return None

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        """Returns the example of a seed and an index, always the same.

        Args:
          seed: Seed of the stream, non-negative.
          index: Index in the stream, non-negative.
          validation: Whether to draw from the validation stream or held-out set instead of the training data.

        Returns:
          inputs int32 [t]; targets int32 [t], the token to predict at each position, for a causal model from the
          tokens up to it; weights float32 [t], 1 where a prediction is scored and 0 elsewhere.
          If the answers are copied from the inputs: distance int32 [t], the number of positions from a scored position
          back to the token before the answer, so that the answer is `distance - 1` positions back; 0 elsewhere.
          If examples may be shorter than t: segments int32 [t] (1, and 0 for padding) and positions int32 [t].
        """
        ...


def open_stream(seed: int, index: int, validation: bool = False) -> np.random.Generator:
    """Random number generator of an example.

    Philox is counter-based: `seed` and `index` are its key, so the streams of any two examples differ, and validation
    starts at a counter that training cannot reach.
    """
    for argument, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise InputError(argument, f"{value} is not between 0 and 2 ** 64 - 1")
    key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, validation], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def pick(count: int, seed: int, index: int) -> int:
    """Element of a fixed set of `count` that training example `index` uses; every epoch is a new permutation."""
    epoch, step = divmod(index, count)
    return int(_shuffle(count, seed, epoch)[step])


@functools.lru_cache(maxsize=4)
def _shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    return open_stream(seed, epoch).permutation(count)


def build_example(inputs: np.ndarray, positions: Any, answers: Any) -> Example:
    """Example with inputs [t] whose targets at `positions` [k] are `answers` [k]."""
    targets, weights = np.zeros(len(inputs), np.int32), np.zeros(len(inputs), np.float32)
    targets[positions] = answers
    weights[positions] = 1
    return {"inputs": inputs.astype(np.int32, copy=False), "targets": targets, "weights": weights}


def recall_example(inputs: np.ndarray, positions: np.ndarray, sources: np.ndarray) -> Example:
    """Example with inputs [t] whose targets at `positions` [k] are the inputs at `sources` [k]; includes distances."""
    distance = np.zeros(len(inputs), np.int32)
    distance[positions] = positions + 1 - sources
    return build_example(inputs, positions, inputs[sources]) | {"distance": distance}


def final_example(tokens: np.ndarray, answer: int, length: int, padding: int) -> Example:
    """Example of tokens [n], padded to `length`, whose last token has the target `answer`."""
    inputs = np.full(length, padding, np.int32)
    inputs[: len(tokens)] = tokens
    positions = np.arange(length, dtype=np.int32)
    inside = positions < len(tokens)
    example = build_example(inputs, len(tokens) - 1, answer)
    return example | {"segments": inside.astype(np.int32), "positions": positions * inside}


def require(probe: Any, **minimum: float) -> None:
    """Raises InputError if a field is below its minimum."""
    for name, bound in minimum.items():
        require_at_least(probe, bound, name)


def require_even(probe: Any, name: str) -> None:
    """Raises InputError if a field is odd."""
    if getattr(probe, name) % 2:
        raise InputError(name, f"{getattr(probe, name)} is odd; use an even number")
