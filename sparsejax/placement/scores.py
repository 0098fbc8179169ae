"""Scores of placements on held-out text, layer by layer, so that placements share the layers that they begin with."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.analysis.prompts import QUESTION, SENTENCE, Haystack
from sparsejax.analysis.subject import choose_windows
from sparsejax.config import ModelConfig
from sparsejax.data import Dataset
from sparsejax.errors import InputError
from sparsejax.inference.evaluation import DeviceBatch, read_context, token_losses
from sparsejax.layers import Context, Layer
from sparsejax.model import Functional
from sparsejax.placement.choices import Choices, with_pattern
from sparsejax.placement.search import Placement

ROWS = 4  # sequences per call of a layer
KEPT_BYTES = 2**30  # of outputs of layers that further placements may begin with


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a placement reaches.

    Attributes:
      loss: Mean loss of the scored tokens of the data, in nats.
      retrieval_loss: Mean loss of the answers of the questions, in nats; None without questions.
      retrieval: Share of the questions all of whose tokens are the most likely ones; None without questions.
    """

    loss: float
    retrieval_loss: float | None = None
    retrieval: float | None = None

    def combine(self, weight: float) -> float:
        """The loss plus `weight` times that of the questions."""
        return self.loss + weight * (self.retrieval_loss or 0.0)


class Scorer:
    """Measures placements on windows of the data and on questions about needles in its text.

    Args:
      choices: The placements.
      dataset: The data.
      windows: Largest number of windows of the data.
      questions: Number of questions, whose needles are at evenly spaced depths, in the first text of a mixture; 0 for a
        model without text.
    """

    def __init__(self, choices: Choices, dataset: Dataset, windows: int, questions: int):
        model, self._choices = choices.model, choices
        rows = choose_windows(dataset, windows)
        starts = range(0, len(rows), ROWS)
        self._batches: list[Any] = [dataset.held_out.take(rows[start : start + ROWS]) for start in starts]
        self._text_batches = len(self._batches)
        if questions:
            corpora = [source.corpus for source in dataset.sources.values() or [dataset]]
            text = next((corpus.held_out for corpus in corpora if corpus is not None), None)
            if text is None:
                raise InputError("questions", f"{questions}: {dataset.config.task} has no text to ask about; set 0")
            haystack = Haystack(model, text.tokens, SENTENCE, QUESTION, candidates=1)
            self._batches += _ask(haystack, choices.length, questions)
        self._functional = Functional(model.config)
        self._layers = _Layers(choices)
        embed = jax.jit(self._read_in)
        self._inputs = [embed(model.parameters, batch) for batch in self._batches]
        self._finish = jax.jit(self._read_out)
        self._outputs = _Outputs()

    def measure(self, placement: Placement) -> Scored:
        """Measures a placement."""
        results = [self._run(index, placement) for index in range(len(self._batches))]
        loss, _ = _average(results[: self._text_batches])
        if len(results) == self._text_batches:
            return Scored(loss)
        return Scored(loss, *_average(results[self._text_batches :]))

    def _run(self, index: int, placement: Placement) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss, weight and number of answered sequences of a batch."""
        layers = self._layers.at(placement)
        x, context = self._inputs[index]
        depth = next((d for d in range(len(layers), 0, -1) if (index, layers[:d]) in self._outputs), 0)
        if depth:
            x = self._outputs.get((index, layers[:depth]))
        for layer in range(depth, len(layers)):
            x = self._layers.run(layer, layers[layer], x, context.with_extras(layer=jnp.asarray(layer)))
            self._outputs.add((index, layers[: layer + 1]), x)
        return jax.device_get(self._finish(self._choices.model.parameters, x, self._batches[index]))

    def _read_in(self, parameters: Any, batch: DeviceBatch) -> tuple[Array, Context]:
        return self._bind(parameters).embed(batch["inputs"], self._context(batch))

    def _read_out(self, parameters: Any, x: Array, batch: DeviceBatch) -> tuple[Array, Array, Array]:
        logits = self._bind(parameters).read_out(x, self._context(batch))
        weights = batch["weights"]
        losses = token_losses(logits, batch["targets"], weights)
        hits = (logits.argmax(axis=-1) == batch["targets"]) | (weights == 0)
        return losses.sum(), weights.sum(), hits.all(axis=tuple(range(1, hits.ndim))).astype(jnp.float32)

    def _bind(self, parameters: Any) -> Any:
        return self._functional.bind(parameters)

    def _context(self, batch: DeviceBatch) -> Context:
        return dataclasses.replace(read_context(batch), extras=self._choices.model.source.extras)


class _Layers:
    """The layers of the model under each of their choices. Equal layers share a compiled program."""

    def __init__(self, choices: Choices):
        self._choices, config = choices, choices.model.config
        self._states = [nnx.split(layer)[1] for layer in _unroll(config, choices.model.parameters)]
        self._programs: dict[tuple[int, int], Callable[..., Array]] = {}
        known: dict[str, Callable[..., Array]] = {}
        most = max(map(len, choices.layers.values()))
        for choice in range(most):
            layers = dict(config.layers)
            for index, options in choices.layers.items():
                name = config.names[index]
                layers[name] = with_pattern(layers[name], options[min(choice, len(options) - 1)].pattern)
            changed = dataclasses.replace(config, layers=layers)
            for index, layer in enumerate(_unroll(changed, choices.model.parameters)):
                text = repr(changed.layers[config.names[index]])
                if text not in known:
                    known[text] = _compile(layer)
                self._programs[index, choice] = known[text]

    def at(self, placement: Placement) -> tuple[int, ...]:
        """The choice of every layer, 0 for those that have none."""
        chosen = dict(zip(self._choices.layers, placement, strict=True))
        return tuple(chosen.get(index, 0) for index in range(len(self._states)))

    def run(self, layer: int, choice: int, x: Array, context: Context) -> Array:
        """The output of a layer."""
        return self._programs[layer, choice](self._states[layer], x, context)


def _unroll(config: ModelConfig, parameters: Any) -> list[Layer]:
    return list(Functional(config).bind(parameters).unroll())


def _compile(layer: Layer) -> Callable[..., Array]:
    graph = nnx.split(layer)[0]
    return jax.jit(lambda state, x, context: nnx.merge(graph, state)(x, context)[0])


class _Outputs:
    """The outputs of layers by batch and choices, the oldest of which are forgotten."""

    def __init__(self) -> None:
        self._outputs: collections.OrderedDict[Any, Array] = collections.OrderedDict()
        self._bytes = 0

    def __contains__(self, key: Any) -> bool:
        return key in self._outputs

    def get(self, key: Any) -> Array:
        self._outputs.move_to_end(key)
        return self._outputs[key]

    def add(self, key: Any, x: Array) -> None:
        self._outputs[key] = x
        self._bytes += x.nbytes
        while self._bytes > KEPT_BYTES:
            self._bytes -= self._outputs.popitem(last=False)[1].nbytes


def _ask(haystack: Haystack, length: int, questions: int) -> list[DeviceBatch]:
    """Batches of questions whose answers are scored."""
    shape = (questions, length)
    inputs, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, depth in enumerate(np.linspace(0, 1, questions)):
        question = haystack.build(length + 1, float(depth), 1, seed=row)
        tokens = np.concatenate([question.prompt, question.candidates[0]])[: length + 1]
        inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        weights[row, len(question.prompt) - 1 : len(tokens) - 1] = 1
    pairs = itertools.pairwise([*range(0, questions, ROWS), questions])
    return [
        {"inputs": inputs[a:b], "targets": targets[a:b], "weights": weights[a:b]}  # type: ignore[typeddict-item]
        for a, b in pairs
    ]


def _average(results: Sequence[tuple[Float[np.ndarray, ""], Float[np.ndarray, ""], np.ndarray]]) -> tuple[float, float]:
    """The mean loss and the share of answered sequences of several batches."""
    losses, weights, hits = zip(*results, strict=True)
    return float(np.sum(losses, dtype=np.float64) / np.sum(weights)), float(np.concatenate(hits).mean())
