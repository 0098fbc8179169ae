"""What a family makes of a config.json, and what families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsejax import schedule
from sparsejax.config import ModelConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, same, stack, transposed
from sparsejax.layers import LayerConfig, NormConfig, RopeConfig, RopeScaling, yarn_growth


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


def build_model(
    fields: Fields,
    width: int,
    layers: Sequence[tuple[str, LayerConfig]],
    norm: NormConfig,
    *,
    tied: bool,
    **more: Any,
) -> ModelConfig:
    """The configuration of a model that computes in float32.

    Args:
      fields: the file, for its `vocab_size`.
      width: of the stream.
      layers: a name and a configuration for each layer in order, see `name_layers`.
      norm: before the head.
      tied: whether the head is the embedding's transpose.
      **more: other fields of `ModelConfig`.
    """
    ends = {"vocab": fields.take("vocab_size"), "norm": norm, "tied": tied}
    return ModelConfig(width=width, **name_layers(layers), **ends, dtype="float32", scan=True, **more)


def read_rope(
    fields: Fields, base: float = 10_000.0, fraction: float | None = None, default: dict[str, Any] | None = None
) -> RopeConfig:
    """Rotary positions of a config.json.

    Today's files have `rope_parameters`, older ones `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

    Args:
      fields: the file.
      base: if the file has none.
      fraction: of the head that turns, if the file does not say; None: whole heads do, whatever the file says.
      default: `rope_parameters` of a file that has none.

    Raises:
      CheckpointError: a kind of scaling that is not supported, or a key of it that is missing or not known.
    """
    older = {key: fields.take(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    chosen = find_rope(fields) or default or {}
    return _make_rope(fields, {"rope_theta": base} | _drop_null(older) | chosen, fraction)


def find_rope(fields: Fields) -> dict[str, Any]:
    """What a config.json says of rotary positions; older files call it `rope_scaling`."""
    given = [fields.take(key, None) for key in ("rope_scaling", "rope_parameters")]
    return next((values for values in given if values), {})


def read_ropes(fields: Fields, bases: dict[str, tuple[str, float]], scaled: Sequence[str]) -> dict[str, RopeConfig]:
    """Rotary positions of a config.json where each kind of layer has its own.

    Args:
      fields: the file: `rope_parameters` with an entry for each kind, or older keys.
      bases: kinds of layers -> the key of older files that has the base, and the base of a file that has none.
      scaled: the kinds that `rope_scaling` of older files is for.

    Raises:
      CheckpointError: as `read_rope`; or `rope_parameters` are not by kind.
    """
    given, scaling = (fields.take(key, None) or {} for key in ("rope_parameters", "rope_scaling"))
    for kind in given:
        if kind not in bases:
            raise fields.error(f"rope_parameters.{kind}", f"expected an entry for each of {', '.join(bases)}")
    ropes = {}
    for kind, (key, base) in bases.items():
        older = fields.take(key, None)
        values = {"rope_theta": base if older is None else older} | (given.get(kind) or {})
        values |= scaling if kind in scaled else {}
        if not values.pop("truncate", True):
            raise fields.error(f"rope_parameters.{kind}.truncate", "only true has an effect where kinds have their own")
        ropes[kind] = _make_rope(fields, values, None)
    return ropes


def _make_rope(fields: Fields, values: dict[str, Any], fraction: float | None) -> RopeConfig:
    base, turned = values.pop("rope_theta"), values.pop("partial_rotary_factor", None)
    if fraction is None and turned not in (None, 1):
        raise fields.error("partial_rotary_factor", f"{turned!r} is not supported; whole heads turn in this family")
    older = values.pop("type", None)
    name = values.pop("rope_type", None) or older or "default"
    if name not in ROPE_TYPES:
        raise fields.error("rope_type", f"{name!r} is not supported; only {', '.join(ROPE_TYPES)}")
    if name in ("yarn", "llama3") and values.get("original_max_position_embeddings") is None:
        values["original_max_position_embeddings"] = fields.take("max_position_embeddings", None)
    known, values = ROPE_TYPES[name], _drop_null(values)
    for key in values:
        if key not in known and not (key == "original_max_position_embeddings" and name in ("default", "linear")):
            raise fields.error(f"rope_parameters.{key}", f"not known for rope_type {name!r}")
    for key in ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
        if key in known and key not in values:
            raise fields.error(f"rope_parameters.{key}", f"missing for rope_type {name!r}")
    scaling = None
    if name != "default":
        renamed = {known[key]: value for key, value in values.items() if key in known}
        grow = _yarn_factor(renamed.pop("mscale", None), renamed.pop("mscale_all_dim", None), renamed)
        scaling = RopeScaling(kind=name, **(renamed | grow))
    return RopeConfig(base=float(base), fraction=float(turned or fraction or 1), scaling=scaling)


def _drop_null(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


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
    factor = given["factor"]
    return {"attention_factor": yarn_growth(factor, mscale) / yarn_growth(factor, mscale_all)}


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


def pieces_of_norms(theirs: str, ours: str, second: str = "post_attention_layernorm") -> list[Piece]:
    """The norms before a layer's mixer and, called `second`, before its feed-forward part."""
    return [
        same(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_residual.before.scale"),
        same(f"{theirs}.{second}.weight", f"{ours}.mlp_residual.before.scale"),
    ]


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
