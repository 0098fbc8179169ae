"""Byte n-gram models: the baseline that a model must beat to have learnt more than short contexts."""

import numpy as np


def witten_bell(train: np.ndarray, text: np.ndarray, order: int) -> np.ndarray:
    """Probability of every byte of `text` under Witten-Bell n-grams estimated on `train`.

    With h the k bytes before c:  P_k(c | h) = (N(h, c) + T(h) P_{k-1}(c | h')) / (N(h) + T(h)).  N(h, c) is the count
    of h followed by c, N(h) its sum over c, and T(h) the number of distinct bytes that follow h. h' is h without its
    first byte, and P_{-1} = 1/256. P_k = P_{k-1} where h never occurs in `train` or starts before `text`.

    Args:
      train: uint8 [n].
      text: uint8 [m].
      order: Length of the longest context in bytes, 0 to 7.

    Returns:
      float64 [order + 1, m], where row k is P_k.
    """
    probability = np.full((order + 1, len(text)), 1 / 256)
    for k in range(min(order + 1, len(train))):
        ngrams, counts = np.unique(_pack(train, k + 1), return_counts=True)
        contexts, first, types = np.unique(ngrams >> 8, return_index=True, return_counts=True)
        queries, shorter = _pack(text, k + 1), probability[k, k:]
        totals = _look_up(queries >> 8, contexts, np.add.reduceat(counts, first))
        followers = _look_up(queries >> 8, contexts, types)
        mixed = (_look_up(queries, ngrams, counts) + followers * shorter) / np.maximum(totals + followers, 1)
        probability[k:, k:] = np.where(totals > 0, mixed, shorter)  # rows above k back off to row k
    return probability


def _pack(text: np.ndarray, width: int) -> np.ndarray:
    """Every `width`-gram as one big-endian uint64: [max(0, n - width + 1)]."""
    count = max(0, len(text) - width + 1)
    packed = np.zeros(count, np.uint64)
    for i in range(width):
        packed = packed << 8 | text[i : i + count]
    return packed


def _look_up(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Value of each query, 0 for a query that is not a key; `keys` are sorted and not empty."""
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], 0)
