"""Bijections between the tensors of a checkpoint and the parameters of a model.

A parameter is named by its path in the unrolled model, such as `layers.3.mixer.query.weight`. The maps only rearrange
numbers, so they apply to gradients as well as to weights. Functions take `source`, the name or prefix in the
checkpoint, and `target`, the path or prefix in the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A bijection between some tensors and some parameters.

    Attributes:
      tensors: Names of the tensors.
      parameters: Paths of the parameters.
      load: Converts the tensors to the parameters.
      store: Converts the parameters to the tensors.
      is_table: Whether the tensors are tables of integers.
    """

    tensors: tuple[str, ...]
    parameters: tuple[str, ...]
    load: Callable[[Arrays], Arrays]
    store: Callable[[Arrays], Arrays]
    is_table: bool = False


def identity(source: str, target: str) -> TensorMap:
    """A parameter stored unchanged."""
    return TensorMap((source,), (target,), list, list)


def table(source: str, target: str) -> TensorMap:
    """A table of integers, which float32 holds exactly."""
    return TensorMap((source,), (target,), list, list, is_table=True)


def transposed(source: str, target: str) -> TensorMap:
    """A matrix stored as [out, in] for the parameter [in, out]."""
    return TensorMap((source,), (target,), _transpose, _transpose)


def reshaped(source: str, target: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> TensorMap:
    """A parameter of shape `shape` stored with the shape `stored`."""

    def load(arrays: Arrays) -> Arrays:
        if arrays[0].shape != stored:
            raise ValueError(f"expected {list(stored)}")
        return [arrays[0].reshape(shape)]

    return TensorMap((source,), (target,), load, lambda arrays: [arrays[0].reshape(stored)])


def split(source: str, targets: Sequence[str], sizes: Sequence[int]) -> TensorMap:
    """A tensor that concatenates parameters of these sizes along its first axis; matrices are transposed."""
    return split_groups(source, targets, 1, sizes)


def split_groups(source: str, targets: Sequence[str], groups: int, sizes: Sequence[int]) -> TensorMap:
    """A tensor of `groups` groups along its first axis, such as heads, each of which is like a tensor of `split`."""

    def load(arrays: Arrays) -> Arrays:
        (array,), size = arrays, groups * sum(sizes)
        if len(array) != size:
            raise ValueError(f"expected {size} rows, got {len(array)}")
        parts = np.split(array.reshape(groups, -1, *array.shape[1:]), np.cumsum(sizes)[:-1], axis=1)
        return _transpose([part.reshape(-1, *array.shape[1:]) for part in parts])

    def store(arrays: Arrays) -> Arrays:
        parts = [array.reshape(groups, -1, *array.shape[1:]) for array in _transpose(arrays)]
        joined = np.concatenate(parts, axis=1)
        return [joined.reshape(-1, *joined.shape[2:])]

    return TensorMap((source,), tuple(targets), load, store)


def split_last(source: str, targets: Sequence[str], sizes: Sequence[int], swapped: bool = False) -> TensorMap:
    """A tensor that concatenates parameters of these sizes along its last axis; the last two may be swapped."""

    def swap(arrays: Arrays) -> Arrays:
        return [array.swapaxes(-1, -2) for array in arrays] if swapped else arrays

    def load(arrays: Arrays) -> Arrays:
        (array,) = swap(arrays)
        if array.shape[-1] != sum(sizes):
            raise ValueError(f"expected an axis of {sum(sizes)}")
        return np.split(array, np.cumsum(sizes)[:-1], axis=-1)

    return TensorMap((source,), tuple(targets), load, lambda arrays: swap([np.concatenate(arrays, axis=-1)]))


def stacked(sources: Iterable[str], target: str) -> TensorMap:
    """Tensors of one shape, such as those of the experts, stacked in one parameter; matrices are transposed."""

    def load(arrays: Arrays) -> Arrays:
        return [np.stack(_transpose(arrays))]

    return TensorMap(tuple(sources), (target,), load, lambda arrays: _transpose(list(arrays[0])))


def interleaved(source: str, targets: Sequence[str]) -> TensorMap:
    """A tensor whose last axis alternates between several parameters."""

    def load(arrays: Arrays) -> Arrays:
        if arrays[0].shape[-1] % len(targets):
            raise ValueError(f"expected a last axis divisible by {len(targets)}")
        return [arrays[0][..., i :: len(targets)] for i in range(len(targets))]

    def store(arrays: Arrays) -> Arrays:
        return [np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)]

    return TensorMap((source,), tuple(targets), load, store)


def _transpose(arrays: Arrays) -> Arrays:
    return [array.T for array in arrays]


def linear(source: str, target: str, bias: bool = False) -> list[TensorMap]:
    """A linear layer."""
    weight = transposed(f"{source}.weight", f"{target}.weight")
    return [weight, identity(f"{source}.bias", f"{target}.bias")] if bias else [weight]


def linears(source: str, target: str, names: dict[str, str], bias: bool = False) -> list[TensorMap]:
    """Several linear layers, by their names in the checkpoint -> in the model."""
    return [part for a, b in names.items() for part in linear(f"{source}.{a}", f"{target}.{b}", bias)]


def split_linear(source: str, targets: Sequence[str], sizes: Sequence[int], bias: bool = False) -> list[TensorMap]:
    """Linear layers of these output sizes, stored as a single one."""
    maps = [split(f"{source}.weight", [f"{target}.weight" for target in targets], sizes)]
    return [*maps, split(f"{source}.bias", [f"{target}.bias" for target in targets], sizes)] if bias else maps


def split_conv(source: str, targets: Sequence[str], sizes: Sequence[int], bias: bool) -> list[TensorMap]:
    """Depthwise convolutions of these numbers of channels, stored as a single one, [channels, 1, taps]."""
    ends = np.cumsum(sizes)[:-1]

    def load(arrays: Arrays) -> Arrays:
        if arrays[0].ndim != 3 or len(arrays[0]) != sum(sizes):
            raise ValueError(f"expected [{sum(sizes)}, 1, taps]")
        return [part[:, 0].T for part in np.split(arrays[0], ends)]

    def store(arrays: Arrays) -> Arrays:
        return [np.expand_dims(np.concatenate([array.T for array in arrays]), 1)]

    maps = [TensorMap((f"{source}.weight",), tuple(f"{target}.weight" for target in targets), load, store)]
    return [*maps, split(f"{source}.bias", [f"{target}.bias" for target in targets], sizes)] if bias else maps


def norm(source: str, target: str, bias: bool = False) -> list[TensorMap]:
    """An RMSNorm or LayerNorm."""
    scale = identity(f"{source}.weight", f"{target}.scale")
    return [scale, identity(f"{source}.bias", f"{target}.bias")] if bias else [scale]


QKV = {"q": "query", "k": "key", "v": "value"}


def attention(source: str, target: str, bias: bool = False, out_bias: bool = False) -> list[TensorMap]:
    """The projections of attention, under the names of most families."""
    projections = linears(source, target, {f"{short}_proj": name for short, name in QKV.items()}, bias)
    return [*projections, *linear(f"{source}.o_proj", f"{target}.out", out_bias)]


def qk_norms(source: str, target: str) -> list[TensorMap]:
    """The norms of queries and keys."""
    return [*norm(f"{source}.q_norm", f"{target}.query_norm"), *norm(f"{source}.k_norm", f"{target}.key_norm")]


def gated_mlp(source: str, target: str, bias: bool = False) -> list[TensorMap]:
    """A gated MLP, under the names of most families."""
    return linears(source, target, {f"{name}_proj": name for name in ("gate", "up", "down")}, bias)


def pre_norms(source: str, target: str, mlp: str = "post_attention_layernorm") -> list[TensorMap]:
    """The norms before a layer's mixer and before its feed-forward part, the latter stored as `mlp`."""
    return [
        *norm(f"{source}.input_layernorm", f"{target}.mixer_residual.before"),
        *norm(f"{source}.{mlp}", f"{target}.mlp_residual.before"),
    ]


def experts(
    source: str, target: str, count: int, names: Sequence[str | None] = ("gate_proj", "up_proj", "down_proj")
) -> list[TensorMap]:
    """The matrices of `count` experts; `names` are those of gate (or None), up and down in the checkpoint."""
    return [
        stacked([f"{source}.{i}.{name}.weight" for i in range(count)], f"{target}.{matrix}")
        for name, matrix in zip(names, ("gate", "up", "down"), strict=True)
        if name is not None
    ]


def mixtral_experts(source: str, target: str, count: int) -> list[TensorMap]:
    """Experts and their router, under the names of Mixtral."""
    router = linear(f"{source}.gate", f"{target}.router")
    return [*router, *experts(f"{source}.experts", target, count, names=("w1", "w3", "w2"))]


def embedding_and_head(tied: bool, embedding: str = "model.embed_tokens", norm: str = "model.norm") -> list[TensorMap]:
    """The embedding, the last norm, and the head unless it is tied."""
    maps = [identity(f"{embedding}.weight", "embedding.tokens"), identity(f"{norm}.weight", "norm.scale")]
    return maps if tied else [*maps, transposed("lm_head.weight", "head.weight")]


def tied_head(tied: bool) -> tuple[str, ...]:
    """Pattern of a tied head, which some checkpoints store although it equals the embedding."""
    return (r"lm_head\.weight",) if tied else ()
