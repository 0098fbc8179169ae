"""Documents into windows of one length, without cutting those that fit."""

from __future__ import annotations

import numpy as np


def pack(sizes: np.ndarray, room: int) -> np.ndarray:
    """Best-fit decreasing: the largest first, each into the fullest row that still has room for it.

    Args:
      sizes: int64 [p], each from 1 to `room`.
      room: Of a row.

    Returns:
      int64 [p], the row of each. Rows are numbered in the order of their first pieces.
    """
    rows = np.empty(len(sizes), np.int64)
    full = np.flatnonzero(sizes == room)
    rows[full] = np.arange(len(full))
    count = len(full)
    order = np.argsort(-sizes, kind="stable")[len(full) :]
    open_rows = [[] for _ in range(room + 1)]  # by the room that they have left
    rooms = 0  # bit i: there is a row with room i
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size << size
        if fitting:
            left = (fitting & -fitting).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                rooms ^= 1 << left
        else:
            left, row, count = room, count, count + 1
        rows[piece] = row
        if left > size:
            open_rows[left - size].append(row)
            rooms |= 1 << (left - size)
    return _number_by_first(rows)


def _number_by_first(rows: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[inverse]
