"""What a family makes of a config.json, and what families share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsejax import schedule
from sparsejax.config import ModelConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, stack, transposed
from sparsejax.layers import LayerConfig, RopeConfig, RopeScaling


@dataclasses.dataclass(frozen=True)
class Translation:
    """A model in the words of this project.

    Attributes:
      model: the configuration.
      pieces: which tensors hold which parameters.
      keywords: what the model can be called with besides `input_ids`.
      unused: regular expressions of tensors that the model does not use, such as buffers that follow from the rest.
      at_length: for sequences of a length: the configuration, where it depends on it, and the multiple to which they
        are padded. The parameters are the same.
      rotations: what LSH attention hashes with, float [h, d, hashes, buckets / 2].
    """

    model: ModelConfig
    pieces: Sequence[Piece]
    keywords: frozenset[str] = frozenset({"attention_mask"})
    unused: tuple[str, ...] = ()
    at_length: Callable[[int], tuple[ModelConfig, int]] | None = None
    rotations: np.ndarray | None = None


def name_layers(layers: Sequence[tuple[str, LayerConfig]]) -> dict[str, object]:
    """`schedule` and `layers` of a model, from a name and a configuration for each layer in order.

    Layers of one name that are not equal get numbers: `local`, `local_2`, ...
    """
    named: dict[str, LayerConfig] = {}
    names = []
    for name, config in layers:
        variants = [key for key in named if key.rpartition("_")[0] == name or key == name]
        found = next((key for key in variants if named[key] == config), None)
        if found is None:
            found = name if not variants else f"{name}_{len(variants) + 1}"
            named[found] = config
        names.append(found)
    return {"schedule": schedule.write(names), "layers": named}


def read_rope(
    fields: Fields,
    kind: str | None = None,
    base: float = 10_000.0,
    fraction: float = 1.0,
    default: dict[str, Any] | None = None,
) -> RopeConfig:
    """Rotary positions of a config.json.

    Today's files have `rope_parameters`, older ones `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

    Args:
      fields: the file.
      kind: of the layers, such as "full_attention", where `rope_parameters` has an entry for each.
      base: if the file has none.
      fraction: of the head that turns, if the file does not say.
      default: `rope_parameters` of a file that has none.

    Raises:
      CheckpointError: a kind of scaling that is not supported, or a key of it that is not known.
    """
    given = dict(fields.take("rope_parameters", None) or fields.take("rope_scaling", None) or default or {})
    if kind is not None and isinstance(given.get(kind), dict):
        given = dict(given[kind])
    base = float(given.pop("rope_theta", None) or fields.take("rope_theta", None) or base)
    fraction = given.pop("partial_rotary_factor", None) or fields.take("partial_rotary_factor", None) or fraction
    name = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    given = {key: value for key, value in given.items() if value is not None}
    if name not in ROPE_TYPES:
        raise fields.error("rope_type", f"{name!r} is not supported; only {', '.join(ROPE_TYPES)}")
    known = ROPE_TYPES[name]
    for key in given:
        if key not in known and not (key == "original_max_position_embeddings" and name in ("default", "linear")):
            raise fields.error(f"rope_parameters.{key}", f"not known for rope_type {name!r}")
    scaling = None
    if name != "default":
        if name in ("yarn", "llama3"):
            given.setdefault("original_max_position_embeddings", fields.take("max_position_embeddings", None))
        renamed = {known[key]: value for key, value in given.items() if key in known}
        grow = _yarn_factor(renamed.pop("mscale", None), renamed.pop("mscale_all_dim", None), renamed)
        scaling = RopeScaling(kind=name, **(renamed | grow))
    return RopeConfig(base=base, fraction=float(fraction), scaling=scaling)


# rope_type -> what its keys are called here.
ROPE_TYPES = {
    "default": {},
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "fast",
        "beta_slow": "slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "high_freq_factor": "fast",
        "low_freq_factor": "slow",
    },
}


def _yarn_factor(mscale: float | None, mscale_all: float | None, given: dict) -> dict[str, float]:
    """The factor on queries and keys that DeepSeek's two numbers make (arXiv:2405.04434)."""
    if given.get("attention_factor") is not None or not (mscale and mscale_all):
        return {}
    log = 0.1 * math.log(given["factor"])
    return {"attention_factor": (mscale * log + 1) / (mscale_all * log + 1)}


def read_window(fields: Fields, key: str = "sliding_window", default: int | None = None) -> str:
    """A causal window of so many keys, the query's own included; no window if it is null."""
    width = fields.take(key, default)
    return "causal" if width is None else f"causal & window({width - 1})"


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def pieces_of_attention(theirs: str, ours: str, bias: bool = False, out_bias: bool = False) -> list[Piece]:
    """The four projections by the names that most families give them."""
    return [
        *(piece for name in ("q", "k", "v") for piece in linear(f"{theirs}.{name}_proj", f"{ours}.{LONG[name]}", bias)),
        *linear(f"{theirs}.o_proj", f"{ours}.out", out_bias),
    ]


LONG = {"q": "query", "k": "key", "v": "value"}


def pieces_of_gated_mlp(theirs: str, ours: str, bias: bool = False) -> list[Piece]:
    """Gate, up and down."""
    return [piece for n in ("gate", "up", "down") for piece in linear(f"{theirs}.{n}_proj", f"{ours}.{n}", bias)]


def pieces_of_experts(
    theirs: str, ours: str, count: int, names: Sequence[str | None] = ("gate_proj", "up_proj", "down_proj")
) -> list[Piece]:
    """Linear maps of `count` experts: what theirs are called as gate (None: there is none), up and down."""
    return [
        stack([f"{theirs}.{i}.{name}.weight" for i in range(count)], f"{ours}.{part}")
        for name, part in zip(names, ("gate", "up", "down"), strict=True)
        if name is not None
    ]


def pieces_of_ends(tied: bool, embedding: str = "model.embed_tokens", norm: str = "model.norm") -> list[Piece]:
    """Embedding, last norm, and a head of its own if it is not tied."""
    ends = [same(f"{embedding}.weight", "embedding.tokens"), same(f"{norm}.weight", "norm.scale")]
    return ends if tied else [*ends, transposed("lm_head.weight", "head.weight")]


def tied_head(tied: bool) -> tuple[str, ...]:
    """Tensors that are not used: a tied head is stored by some, and is the embedding again."""
    return (r"lm_head\.weight",) if tied else ()


# Entries of `layer_types` -> names in a schedule.
LAYER_NAMES = {"sliding_attention": "local", "full_attention": "full", "linear_attention": "linear"}

OLDER_LAYER_TYPES = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "deepseek_sparse_attention": "indexed_attention",
}


def read_layer_types(
    fields: Fields,
    default: Sequence[str],
    key: str = "layer_types",
    allowed: Sequence[str] = ("sliding_attention", "full_attention"),
) -> list[str]:
    """The kind of each layer, or the family's own order where the file has none."""
    kinds = [OLDER_LAYER_TYPES.get(kind, kind) for kind in fields.take(key, None) or default]
    for kind in kinds:
        if kind not in allowed:
            raise fields.error(key, f"{kind!r} is not supported; only {', '.join(allowed)}")
    if len(kinds) != len(default):
        raise fields.error(key, f"{len(kinds)} entries for {len(default)} layers")
    return kinds
