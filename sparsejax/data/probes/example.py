"""What the probes share: their random streams, their checks, and examples put together from places and answers."""

import functools
from typing import Any, Protocol

import numpy as np

Example = dict[str, np.ndarray]  # see Probe.example


class Probe(Protocol):
    """A task whose examples are computed, each from a seed and a number alone; its fields are its configuration.

    Attributes:
      vocab: Number of different tokens. Answers that are no tokens of the input, such as classes, are tokens too:
        class c is token c.
      length: Tokens of an example, t.

    """

    @property
    def vocab(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def held_out(self) -> int | None:
        """Number of different validation examples, if they come from a fixed set, in whose order they then come."""
        return None

    def example(self, seed: int, index: int, validation: bool = False) -> Example:
        """One example, always the same for the same arguments.

        Args:
          seed: Names a stream, from 0 on.
          index: Place in the stream, from 0 on.
          validation: From another stream than that of training with the same seed; where examples come from a
            fixed set, from the part of it that is held out.

        Returns:
          inputs int32 [t]; targets int32 [t], what to predict at a position (of a causal model: from the tokens up
          to it); weights float32 [t], 1 where a prediction counts and 0 elsewhere. Where the answer is repeated
          from the inputs, also distance int32 [t]: how far back at a scored position stands the token whose
          successor is the answer, so that the answer itself stands `distance - 1` back; 0 elsewhere. Of examples that
          may be shorter than t, also segments int32 [t] (1, and 0 for padding) and positions int32 [t].

        """
        ...


def open_stream(seed: int, index: int, validation: bool = False) -> np.random.Generator:
    """The random numbers of one example.

    Philox is counted, not stepped: `seed` and `index` are its key, so that any two examples have different streams,
    and validation starts at a count that training cannot reach.
    """
    if not (0 <= seed < 2**64 and 0 <= index < 2**64):
        raise ValueError(f"seed = {seed} and index = {index} must be at least 0 and below 2 ** 64")
    key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, validation], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def pick(count: int, seed: int, index: int) -> int:
    """Which of a fixed set of `count` a training example is: all of them in each epoch, each in another order."""
    epoch, place = divmod(index, count)
    return int(_shuffle(count, seed, epoch)[place])


@functools.lru_cache(maxsize=4)
def _shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    return open_stream(seed, epoch).permutation(count)


def ask(inputs: np.ndarray, places: Any, answers: Any) -> Example:
    """An example that is scored at `places` [k], where `answers` [k] are to be predicted; inputs [t]."""
    targets, weights = np.zeros(len(inputs), np.int32), np.zeros(len(inputs), np.float32)
    targets[places] = answers
    weights[places] = 1
    return {"inputs": inputs.astype(np.int32, copy=False), "targets": targets, "weights": weights}


def ask_again(inputs: np.ndarray, places: np.ndarray, sources: np.ndarray) -> Example:
    """An example whose answers at `places` [k] stand at `sources` [k] of the inputs [t]; with their distance."""
    distance = np.zeros(len(inputs), np.int32)
    distance[places] = places + 1 - sources
    return ask(inputs, places, inputs[sources]) | {"distance": distance}


def ask_at_end(tokens: np.ndarray, answer: int, length: int, padding: int) -> Example:
    """An example of tokens [n], padded to `length`, whose last one asks for the answer."""
    inputs = np.full(length, padding, np.int32)
    inputs[: len(tokens)] = tokens
    places = np.arange(length, dtype=np.int32)
    inside = places < len(tokens)
    return ask(inputs, len(tokens) - 1, answer) | {"segments": inside.astype(np.int32), "positions": places * inside}


def require(probe: Any, **least: float) -> None:
    """Raises ValueError unless each named field is at least so much."""
    for name, low in least.items():
        if getattr(probe, name) < low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(probe, name)}")


def choose(probe: Any, name: str, *options: str) -> None:
    """Raises ValueError unless the named field is one of the options."""
    if getattr(probe, name) not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(probe, name)!r}")
