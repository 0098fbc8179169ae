"""Rules by which the parameters of a model are derived from those of another architecture.

The functions of arrays are pure and use NumPy. A rule for mixers maps each parameter of the new mixer that it supplies
to a `Derivation`; the others, such as the gates of a recurrence, must be drawn at random.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from sparsejax.errors import InputError
from sparsejax.layers import AttentionConfig, DeltaConfig, LightningConfig, Mamba2Config, MixerConfig

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Derivation:
    """How a parameter is computed from parameters of the source.

    Attributes:
      rules: Names of the rules; none if the parameter is loaded as it is.
      sources: Paths of the parameters that are read, within the same mixer for a rule for mixers.
      convert: Function of these parameters.
    """

    rules: tuple[str, ...]
    sources: tuple[str, ...]
    convert: Callable[..., Array]


# Arrays.


def repeat_positions(table: Float[Array, "s m"], positions: int, padding: int | None) -> Float[Array, "t m"]:
    """Repeats learned positions until they fill a longer table (Longformer, arXiv:2004.05150, section 5).

    The rows up to `padding`, which RoBERTa reserves, are kept once. A shorter table is cut.

    Args:
      table: Positions of the source.
      positions: Rows of the new table.
      padding: `embedding.padding` of both models.
    """
    first = 0 if padding is None else padding + 1
    rows = np.arange(positions - first) % (len(table) - first)
    return np.concatenate([table[:first], table[first:][rows]])


def grow_vocabulary(weights: Array, vocab: int, axis: int = 0) -> Array:
    """Appends rows for new token ids, each the mean of the present rows (Hewitt 2021, nlp.stanford.edu/~johnhew).

    The mean bounds the change of the other tokens' probabilities, which random rows can make arbitrarily small.

    Args:
      weights: Token embedding, matrix of the head or bias of the head.
      vocab: Number of ids of the new model.
      axis: Axis of the ids.
    """
    mean = weights.mean(axis=axis, keepdims=True, dtype=np.float64).astype(weights.dtype)
    return np.concatenate([weights, mean.repeat(vocab - weights.shape[axis], axis=axis)], axis=axis)


def untie_head(tokens: Float[Array, "v m"]) -> Float[Array, "m v"]:
    """Copies the token embedding, which was the head as well, to a head of its own."""
    return tokens.T


def merge_heads(weights: Array, heads: int, groups: int) -> Array:
    """Averages the heads of each group (grouped-query attention, arXiv:2305.13245, section 2.1).

    Args:
      weights: Matrix or bias, whose last axis holds `heads` heads.
      heads: Number of heads.
      groups: Number of heads of the result.
    """
    split = weights.reshape(*weights.shape[:-1], groups, heads // groups, -1)
    return split.mean(axis=-2, dtype=np.float64).astype(weights.dtype).reshape(*weights.shape[:-1], -1)


def repeat_heads(weights: Array, heads: int, repeats: int) -> Array:
    """Repeats each head, so that attention stays the same with more key and value heads.

    Args:
      weights: Matrix or bias, whose last axis holds `heads` heads.
      heads: Number of heads.
      repeats: Number of adjacent copies of each head.
    """
    split = weights.reshape(*weights.shape[:-1], heads, -1)
    return split.repeat(repeats, axis=-2).reshape(*weights.shape[:-1], -1)


def identity_taps(taps: int, channels: int) -> Float[Array, "w c"]:
    """Returns the taps of a causal convolution that keeps its input."""
    return np.eye(1, taps, taps - 1, dtype=np.float32).T.repeat(channels, axis=1)


# Mixers.


def convert_attention(source: AttentionConfig, target: AttentionConfig) -> dict[str, Derivation]:
    """Attention with another number of key and value heads, or with new global projections.

    `merge_heads` or `repeat_heads` converts keys and values. `global_projections` copies the projections of a layer
    to those of its global tokens (Longformer, arXiv:2004.05150, section 5).

    Raises:
      InputError: The heads differ in another way.
    """
    _require(source, target, heads=source.heads, head_width=source.head_width)
    rules, convert = _fit_heads(source, target.kv_heads)
    derivations: dict[str, Derivation] = {}
    for name in ("weight", "bias"):
        if rules:
            for part in ("key", "value", "key_global", "value_global"):
                derivations[f"{part}.{name}"] = Derivation(rules, (f"{part}.{name}",), convert)
        if not source.global_projections:
            copied = ("global_projections",)
            derivations[f"query_global.{name}"] = Derivation(copied, (f"query.{name}",), _copy)
            for part in ("key", "value"):
                derivations[f"{part}_global.{name}"] = Derivation(copied + rules, (f"{part}.{name}",), convert)
    if rules and source.qk_norm_joint:
        derivations["key_norm.scale"] = Derivation(rules, ("key_norm.scale",), convert)
    return derivations


def attention_to_lightning(source: AttentionConfig, target: LightningConfig) -> dict[str, Derivation]:
    """Copies the projections to queries, keys, values and outputs of linear attention with fixed decay.

    As in "The Mamba in the Llama" (arXiv:2408.15237), section 2.2, for the decay of MiniMax-01 (arXiv:2501.08313).
    Shared key and value heads are repeated, the norm of the output starts as ones, and the gate is that of gated
    attention, if there is one. The rotation and the norms of queries and keys are dropped.

    Raises:
      InputError: The sizes of the heads differ.
    """
    _require(source, target, heads=source.heads, head_width=source.head_width)
    rule = ("attention_to_lightning",)
    return _copy_projections(source, rule) | {"norm.scale": _ones(rule, target.heads * target.head_width)}


def attention_to_delta(source: AttentionConfig, target: DeltaConfig) -> dict[str, Derivation]:
    """Copies the projections to queries, keys, values and outputs of the gated delta rule (arXiv:2412.06464).

    As `attention_to_lightning`; the convolutions start as identities. Decay and beta have no counterpart.

    Raises:
      InputError: The sizes of the heads differ.
    """
    heads, width = source.heads, source.head_width
    _require(source, target, heads=heads, key_heads=heads, key_width=width, value_width=width)
    rule = ("attention_to_delta",)
    taps = Derivation(rule, (), lambda: identity_taps(target.conv, heads * width))
    convolutions = {f"conv_{part}.weight": taps for part in ("query", "key", "value")}
    derivations = _copy_projections(source, rule) | convolutions | {"norm.scale": _ones(rule, target.value_width)}
    if target.rank is not None:  # the gate is a product of two matrices
        derivations.pop("gate.weight", None)
    return derivations


def attention_to_mamba2(source: AttentionConfig, target: Mamba2Config) -> dict[str, Derivation]:
    """Copies values to x, keys to B, queries to C, and the output (The Mamba in the Llama, arXiv:2408.15237, fig. 1).

    As `attention_to_lightning`; the convolutions start as identities. Decays, step sizes and skips have no counterpart.

    Raises:
      InputError: The sizes of the heads differ.
    """
    heads, width = source.heads, source.head_width
    _require(source, target, heads=heads, groups=heads, head_width=width, state=width)
    rule, (_, expand) = ("attention_to_mamba2",), _fit_heads(source, heads)

    def select(key: Array, query: Array) -> Array:
        return np.concatenate([expand(key), query], axis=-1)

    derivations: dict[str, Derivation] = {}
    for name, biased in (("weight", True), ("bias", source.bias)):
        if biased:
            derivations[f"input.{name}"] = Derivation(rule, (f"value.{name}",), expand)
            derivations[f"select.{name}"] = Derivation(rule, (f"key.{name}", f"query.{name}"), select)
            if source.gate:
                derivations[f"gate.{name}"] = Derivation(rule, (f"gate.{name}",), _copy)
    for name, channels in (("conv", target.inner), ("conv_select", 2 * target.groups * target.state)):
        taps = functools.partial(identity_taps, target.conv, channels)
        derivations[f"{name}.weight"] = Derivation(rule, (), taps)
        derivations[f"{name}.bias"] = Derivation(rule, (), functools.partial(np.zeros, channels, np.float32))
    outputs = {f"out.{name}": Derivation(rule, (f"out.{name}",), _copy) for name in ("weight", "bias")}
    return derivations | outputs | {"norm.scale": _ones(rule, target.inner)}


# Rules for mixers by the configs of the source and of the new model.
MIXER_RULES: dict[tuple[type, type], Callable[..., dict[str, Derivation]]] = {
    (AttentionConfig, AttentionConfig): convert_attention,
    (AttentionConfig, LightningConfig): attention_to_lightning,
    (AttentionConfig, DeltaConfig): attention_to_delta,
    (AttentionConfig, Mamba2Config): attention_to_mamba2,
}
# Names of rules, for `init.rules`.
RULES = (
    "repeat_positions", "grow_vocabulary", "untie_head", "merge_heads", "repeat_heads", "global_projections",
    "attention_to_lightning", "attention_to_delta", "attention_to_mamba2",
)  # fmt: skip


def _copy(array: Array) -> Array:
    return array


def _ones(rules: tuple[str, ...], size: int) -> Derivation:
    return Derivation(rules, (), lambda: np.ones(size, np.float32))


def _copy_projections(source: AttentionConfig, rule: tuple[str, ...]) -> dict[str, Derivation]:
    """The matrices of attention, with as many key and value heads as query heads."""
    _, expand = _fit_heads(source, source.heads)
    names = ("query", "out", *(("gate",) if source.gate else ()))
    copies = {f"{name}.weight": Derivation(rule, (f"{name}.weight",), _copy) for name in names}
    return copies | {f"{name}.weight": Derivation(rule, (f"{name}.weight",), expand) for name in ("key", "value")}


def _fit_heads(source: AttentionConfig, heads: int) -> tuple[tuple[str, ...], Callable[[Array], Array]]:
    """The rule, if any, that converts the key and value heads of the source to another number, and its function."""
    old = source.kv_heads
    if old == heads:
        return (), _copy
    if old % heads == 0:
        return ("merge_heads",), lambda array: merge_heads(array, old, heads)
    if heads % old == 0:
        return ("repeat_heads",), lambda array: repeat_heads(array, old, heads // old)
    raise InputError("kv_heads", f"{heads}: neither divides the {old} of the source nor is a multiple of it")


def _require(source: MixerConfig, target: MixerConfig, **sizes: Any) -> None:
    for name, size in sizes.items():
        if getattr(target, name) != size:
            kind = type(source).__name__.removesuffix("Config").lower()
            raise InputError(name, f"{getattr(target, name)}: {kind} of the source has {size}")
