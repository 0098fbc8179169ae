"""Which tensors of a checkpoint hold which parameters, and how the numbers lie in each: a bijection, piece by piece.

Parameters are named by their path in the unrolled model: `layers.3.mixer.query.weight`. Every piece only moves
numbers, so it carries gradients over as well as weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tensors, and the parameters with the same numbers: `read` makes these of those, `write` those of these."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[[Arrays], Arrays]
    write: Callable[[Arrays], Arrays]


def same(theirs: str, ours: str) -> Piece:
    """A parameter that is stored as it is."""
    return Piece((theirs,), (ours,), list, list)


def transposed(theirs: str, ours: str) -> Piece:
    """A matrix [out, in] there, [in, out] here."""
    return Piece((theirs,), (ours,), _transpose, _transpose)


def reshaped(theirs: str, ours: str, there: tuple[int, ...], here: tuple[int, ...]) -> Piece:
    """A parameter of shape `here` that is stored in shape `there`."""

    def read(arrays: Arrays) -> Arrays:
        if arrays[0].shape != there:
            raise ValueError(f"expected {list(there)}")
        return [arrays[0].reshape(here)]

    return Piece((theirs,), (ours,), read, lambda arrays: [arrays[0].reshape(there)])


def linear(theirs: str, ours: str, bias: bool = False) -> list[Piece]:
    """A linear map with its bias."""
    pieces = [transposed(f"{theirs}.weight", f"{ours}.weight")]
    return [*pieces, same(f"{theirs}.bias", f"{ours}.bias")] if bias else pieces


def split(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Piece:
    """A tensor whose first axis is several parameters in a row: `sizes` of each; matrices are transposed."""
    return split_groups(theirs, ours, 1, sizes)


def split_groups(theirs: str, ours: Sequence[str], groups: int, sizes: Sequence[int]) -> Piece:
    """As `split`, where each of several groups, such as heads, has its part of every parameter in a row."""

    def read(arrays: Arrays) -> Arrays:
        (array,), rows = arrays, groups * sum(sizes)
        if len(array) != rows:
            raise ValueError(f"expected {rows} rows, got {len(array)}")
        parts = np.split(array.reshape(groups, -1, *array.shape[1:]), np.cumsum(sizes)[:-1], axis=1)
        return _transpose([part.reshape(-1, *array.shape[1:]) for part in parts])

    def write(arrays: Arrays) -> Arrays:
        parts = [array.reshape(groups, -1, *array.shape[1:]) for array in _transpose(arrays)]
        whole = np.concatenate(parts, axis=1)
        return [whole.reshape(-1, *whole.shape[2:])]

    return Piece((theirs,), tuple(ours), read, write)


def split_linear(theirs: str, ours: Sequence[str], sizes: Sequence[int], bias: bool = False) -> list[Piece]:
    """A fused linear map with its bias, as `split`."""
    pieces = [split(f"{theirs}.weight", [f"{name}.weight" for name in ours], sizes)]
    return [*pieces, split(f"{theirs}.bias", [f"{name}.bias" for name in ours], sizes)] if bias else pieces


def stack(theirs: Iterable[str], ours: str) -> Piece:
    """Several tensors of one shape, such as one of each expert, as one parameter; matrices are transposed."""

    def read(arrays: Arrays) -> Arrays:
        return [np.stack(_transpose(arrays))]

    return Piece(tuple(theirs), (ours,), read, lambda arrays: _transpose(list(arrays[0])))


def interleaved(theirs: str, ours: Sequence[str]) -> Piece:
    """A tensor whose last axis holds several parameters in turn."""

    def read(arrays: Arrays) -> Arrays:
        if arrays[0].shape[-1] % len(ours):
            raise ValueError(f"expected {len(ours)} parameters in turn")
        return [arrays[0][..., i :: len(ours)] for i in range(len(ours))]

    def write(arrays: Arrays) -> Arrays:
        return [np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)]

    return Piece((theirs,), tuple(ours), read, write)


def _transpose(arrays: Arrays) -> Arrays:
    return [array.T for array in arrays]


def split_conv(theirs: str, ours: Sequence[str], sizes: Sequence[int], bias: bool) -> list[Piece]:
    """One depthwise convolution there, [channels, 1, taps], over what several here have: `sizes` channels of each."""
    ends = np.cumsum(sizes)[:-1]

    def read(arrays: Arrays) -> Arrays:
        if arrays[0].ndim != 3 or len(arrays[0]) != sum(sizes):
            raise ValueError(f"expected [{sum(sizes)}, 1, taps]")
        return [part[:, 0].T for part in np.split(arrays[0], ends)]

    def write(arrays: Arrays) -> Arrays:
        return [np.expand_dims(np.concatenate([array.T for array in arrays]), 1)]

    pieces = [Piece((f"{theirs}.weight",), tuple(f"{name}.weight" for name in ours), read, write)]
    return [*pieces, split(f"{theirs}.bias", [f"{name}.bias" for name in ours], sizes)] if bias else pieces
