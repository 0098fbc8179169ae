"""The model of an analysis at one length, and its text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sparsejax import patterns
from sparsejax.data import Batch, Dataset
from sparsejax.data.rows import Windows
from sparsejax.errors import InputError
from sparsejax.inference.evaluation import DeviceBatch, read_context
from sparsejax.layers import Context
from sparsejax.loaded import LoadedModel
from sparsejax.model import Functional
from sparsejax.patterns import receptive_field


class Subject:
    """A model that is built for one length.

    Attributes:
      length: Tokens per sequence, n.
      config: The configuration of the model.
      functional: The model.
      parameters: Its parameters.
    """

    def __init__(self, model: LoadedModel, length: int, argument: str = "data.length"):
        model.require_positions(length, argument)
        self.config, multiple = model.source.at_length(model.config, length)
        if length % multiple:
            raise InputError(argument, f"{length} is not a multiple of {multiple}, as {model.source.kind} needs")
        self.config.check(length)
        self.length, self.parameters = length, model.parameters
        self.functional, self._extras = Functional(self.config), model.source.extras

    def context(self, batch: DeviceBatch) -> Context:
        """Returns what layers know about a batch."""
        return dataclasses.replace(read_context(batch), extras=self._extras)

    @functools.cached_property
    def connectivity(self) -> tuple[patterns.Pattern, ...]:
        """The pattern of each layer."""
        return tuple(pattern for _, pattern in self.config.connectivity)

    def field(self, position: int, depth: int | None = None) -> Bool[np.ndarray, " n"]:
        """Returns which inputs can influence an output after `depth` layers, by default all of them."""
        return _trace(self.connectivity[:depth], self.length, position)

    def reach(self, depth: int | None = None) -> int:
        """Returns the largest distance between the last output and an input that can influence it."""
        position = self.length - 1
        return position - int(np.flatnonzero(self.field(position, depth))[0])


@functools.lru_cache(maxsize=4096)
def _trace(layers: tuple[patterns.Pattern, ...], n: int, position: int) -> np.ndarray:
    return receptive_field.trace(layers, n, position)[0]


def require_single_text(dataset: Dataset) -> None:
    """Raises InputError if the data are a mixture."""
    if dataset.sources:
        raise InputError("data.files", f"is empty, but the data mix {', '.join(dataset.sources)}; name one text")


def choose_windows(dataset: Dataset, count: int, argument: str = "windows") -> Int[np.ndarray, " w"]:
    """Returns the indices of up to `count` whole windows of the validation text, evenly spaced.

    Raises:
      InputError: `count` is below 1, or the text is shorter than a window.
    """
    if count < 1:
        raise InputError(argument, f"{count} is below 1")
    rows, total = dataset.held_out, len(dataset.held_out)
    if dataset.corpus is not None and isinstance(rows, Windows):
        tokens = len(dataset.corpus.held_out.tokens)
        total = (tokens - 1) // rows.length
        if not total:
            raise InputError("data.length", f"{rows.length} is not below the {tokens} tokens of the text")
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def take_inputs(dataset: Dataset, rows: Sequence[int]) -> DeviceBatch:
    """Returns windows of the text, without what only a loss needs."""
    batch: Batch = dataset.held_out.take(np.asarray(rows, np.int64))
    names = ("inputs", "segments", "positions")
    return {name: batch[name] for name in names if name in batch}  # type: ignore[return-value, literal-required]


def spread(count: int, most: int) -> list[int]:
    """Returns up to `most` of the numbers 1 to `count`, evenly spaced, with the last."""
    return sorted({round(number) for number in np.linspace(count, 1, min(count, most))})


def require_options(options: Any, bounds: Mapping[str, float]) -> None:
    """Raises InputError about the first option, or element of a tuple, that is below its bound."""
    for name, least in bounds.items():
        values = getattr(options, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value < least:
                raise InputError(name, f"{value} is below {least}")
