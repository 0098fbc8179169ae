"""Byte n-grams: what a model must beat to have learnt more than which byte follows the last few."""

import numpy as np


def witten_bell(train: np.ndarray, text: np.ndarray, order: int) -> np.ndarray:
    """The probability of every byte of a text under Witten-Bell n-grams counted on another.

    With h the k bytes before c:  P_k(c | h) = (N(h, c) + T(h) P_{k-1}(c | h')) / (N(h) + T(h)).  N(h, c)
    counts the two together, N(h) is its sum over c, T(h) the number of different c seen after h; h' is h
    without its first byte and P_{-1} = 1/256. If h was never seen or starts before the text, P_k = P_{k-1}.

    Args:
      train: uint8 [n].
      text: uint8 [m].
      order: The longest context in bytes, 0 to 7.

    Returns:
      float64 [order + 1, m], row k being P_k.

    """
    probability = np.full((order + 1, len(text)), 1 / 256)
    for k in range(min(order + 1, len(train))):
        pairs, counts = np.unique(_packed(train, k + 1), return_counts=True)
        contexts, first, followers = np.unique(pairs >> 8, return_index=True, return_counts=True)
        asked, shorter = _packed(text, k + 1), probability[k, k:]
        seen = _looked_up(asked >> 8, contexts, np.add.reduceat(counts, first))
        types = _looked_up(asked >> 8, contexts, followers)
        mixed = (_looked_up(asked, pairs, counts) + types * shorter) / np.maximum(seen + types, 1)
        probability[k:, k:] = np.where(seen > 0, mixed, shorter)  # for longer contexts to start from
    return probability


def _packed(text: np.ndarray, width: int) -> np.ndarray:
    """Every run of `width` bytes as one uint64, its first byte highest: [max(0, n - width + 1)]."""
    count = max(0, len(text) - width + 1)
    packed = np.zeros(count, np.uint64)
    for i in range(width):
        packed = packed << 8 | text[i : i + count]
    return packed


def _looked_up(asked: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each key asked for, 0 where there is none; `keys` are sorted and not empty."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
