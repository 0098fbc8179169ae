"""Packing of documents into rows of one length."""

from __future__ import annotations

import numpy as np


def pack(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: places the largest item first, each in the fullest row that can still hold it.

    Args:
      sizes: int64 [p], each from 1 to `capacity`.
      capacity: Tokens per row.

    Returns:
      The row of each item, int64 [p]. Rows are numbered in the order of their first items.
    """
    rows = np.empty(len(sizes), np.int64)
    full = np.flatnonzero(sizes == capacity)
    rows[full] = np.arange(len(full))
    count = len(full)
    order = np.argsort(-sizes, kind="stable")[len(full) :]
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free capacity
    open_mask = 0  # bit i is set if a row with free capacity i exists
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = open_mask >> size << size
        if fitting:
            free = (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                open_mask ^= 1 << free
        else:
            free, row, count = capacity, count, count + 1
        rows[item] = row
        if free > size:
            open_rows[free - size].append(row)
            open_mask |= 1 << (free - size)
    return _number_by_first(rows)


def _number_by_first(rows: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[inverse]
