"""Mixtures: the rows of several sources by weight, in an order that is a function of the number of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

import numpy as np

from sparsejax.data.rows import Batch, RowReader, Rows

Part = tuple[np.ndarray, Batch]  # positions of rows in a batch, int64 [k], and the rows


class MixtureOrder:
    """The order in which a mixture draws from its sources, without randomness and with exact proportions.

    Of the first n rows, source i has `weights[i] / sum(weights) * n` up to less than the number of sources. The order
    of two sources is a Sturmian word; that of more is one of the first source and the order of the others.

    Args:
      weights: Weight per source; a source of weight 0 is never drawn.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        # Share of each source in the rows that the sources before it leave.
        self._shares = [(i, weight / sum(exact[i:])) for i, weight in enumerate(exact) if weight]

    def locate(self, number: int) -> tuple[int, int]:
        """Returns the source of row `number` of the mixture, and the number of the row in this source."""
        for source, share in self._shares:
            before = number * share.numerator // share.denominator
            if (number + 1) * share.numerator // share.denominator > before:
                return source, before
            number -= before
        raise AssertionError("the last share is 1")

    def split(self, numbers: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns the positions in `numbers` [b], and the numbers in the source, of the rows of each source."""
        located = np.array([self.locate(number) for number in numbers.tolist()], np.int64).reshape(-1, 2)
        parts = {source: np.flatnonzero(located[:, 0] == source) for source in np.unique(located[:, 0]).tolist()}
        return {source: (positions, located[positions, 1]) for source, positions in parts.items()}


def join_rows(parts: Sequence[Part], fields: Mapping[str, np.dtype], count: int, length: int) -> Batch:
    """Joins rows of several sources into a batch.

    Args:
      parts: The rows of each source and their positions in the batch.
      fields: dtype of each field of the batch.
      count: Number of rows.
      length: Tokens per row.

    Returns:
      The batch. A row whose source has no segments is one segment.
    """
    batch = {name: np.zeros((count, length), dtype) for name, dtype in fields.items()}
    for positions, rows in parts:
        filled = dict(rows)
        if "segments" in fields and "segments" not in rows:
            shape = rows["inputs"].shape
            filled |= {"segments": np.ones(shape, np.int32), "positions": np.broadcast_to(np.arange(length), shape)}
        for name, values in filled.items():
            batch[name][positions] = values
    return cast(Batch, batch)


class MixedReader:
    """A reader of the rows of several readers in the order of a mixture.

    Args:
      readers: The readers by name, in the order of the weights.
      order: The order.
      fields: See `join_rows`.
      length: Tokens per row.
    """

    def __init__(
        self, readers: Mapping[str, RowReader], order: MixtureOrder, fields: Mapping[str, np.dtype], length: int
    ):
        self._readers, self._order, self._fields, self._length = readers, order, fields, length

    def draw(self, numbers: np.ndarray) -> Batch:
        """Returns the rows with these numbers, int64 [b]; see `RowReader`."""
        readers = list(self._readers.values())
        split = self._order.split(numbers).items()
        parts = [(positions, readers[source].draw(rows)) for source, (positions, rows) in split]
        return join_rows(parts, self._fields, len(numbers), self._length)

    def get_state(self) -> dict[str, Any]:
        """Returns the states of the readers that have one, by name."""
        states = {name: reader.get_state() for name, reader in self._readers.items()}
        return {name: state for name, state in states.items() if state}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues with the states of the readers."""
        for name, reader_state in state.items():
            self._readers[name].set_state(reader_state)


class Joined:
    """The rows of several sources, one source after another.

    Args:
      sources: Rows of one length.
    """

    def __init__(self, sources: Sequence[Rows]):
        self._sources, self.length = sources, sources[0].length
        self._stops = np.cumsum([len(rows) for rows in sources])
        self.fields: dict[str, np.dtype] = {}
        for rows in sources:
            first = rows.take(np.zeros(1, np.int64))
            self.fields |= {name: values.dtype for name, values in first.items()}  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return int(self._stops[-1])

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the batch of the rows with these indices, int64 [b]; -1 is a row of padding with weights 0."""
        owner = np.searchsorted(self._stops, rows, side="right")
        parts = []
        for index, source in enumerate(self._sources):
            positions = np.flatnonzero((owner == index) & (rows >= 0))
            if len(positions):
                parts.append((positions, source.take(rows[positions] - (self._stops[index] - len(source)))))
        return join_rows(parts, self.fields, len(rows), self.length)

    def counts(self) -> dict[str, int | float]:
        """No statistics; those of the sources have them."""
        return {}
