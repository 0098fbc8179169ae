"""Rotary positions of a config.json.

Current files have `rope_parameters`; older ones have `rope_theta`, `rope_scaling` and `partial_rotary_factor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsejax.interop.huggingface.fields import Fields
from sparsejax.layers import RopeConfig, RopeScaling, yarn_growth

# rope_type -> names of its keys in `RopeScaling`.
ROPE_TYPES: dict[str, dict[str, str]] = {
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


def read_rope(
    fields: Fields, base: float = 10_000.0, fraction: float | None = None, default: dict[str, Any] | None = None
) -> RopeConfig:
    """Reads rotary positions that all layers share.

    Args:
      fields: The config.json.
      base: Default of `rope_theta`.
      fraction: Default of `partial_rotary_factor`; None if the family supports full rotation only.
      default: Default of `rope_parameters`.

    Raises:
      ConversionError: The type of scaling is not supported, or one of its keys is missing or unknown.
    """
    legacy = {key: fields.take(key, None, float) for key in ("rope_theta", "partial_rotary_factor")}
    parameters = read_rope_parameters(fields) or default or {}
    return build_rope(fields, {"rope_theta": base} | _drop_null(legacy) | parameters, fraction)


def read_rope_parameters(fields: Fields) -> dict[str, Any]:
    """Reads `rope_parameters`, or the older `rope_scaling`."""
    values = [fields.take(key, None, dict) for key in ("rope_scaling", "rope_parameters")]
    return next((parameters for parameters in values if parameters), {})


def read_ropes(fields: Fields, bases: dict[str, tuple[str, float]], scaled: Sequence[str]) -> dict[str, RopeConfig]:
    """Reads rotary positions that differ between layer types.

    Args:
      fields: The config.json; its `rope_parameters` have an entry per layer type, or it has older keys.
      bases: Layer type -> older key of its base, and the default of the base.
      scaled: Layer types to which the older `rope_scaling` applies.

    Raises:
      ConversionError: See `read_rope`; or `rope_parameters` are not by layer type.
    """
    parameters, scaling = (fields.take(key, None, dict) or {} for key in ("rope_parameters", "rope_scaling"))
    for layer_type in parameters:
        if layer_type not in bases:
            raise fields.error(f"rope_parameters.{layer_type}", f"not a layer type; expected {', '.join(bases)}")
    ropes = {}
    for layer_type, (key, base) in bases.items():
        legacy = fields.take(key, None, float)
        values = {"rope_theta": base if legacy is None else legacy} | (parameters.get(layer_type) or {})
        values |= scaling if layer_type in scaled else {}
        if not values.pop("truncate", True):
            raise fields.error(f"rope_parameters.{layer_type}.truncate", "false has no effect in this family")
        ropes[layer_type] = build_rope(fields, values, None)
    return ropes


def build_rope(fields: Fields, values: dict[str, Any], fraction: float | None = None) -> RopeConfig:
    """Returns the rotary positions that `values` describe, with `rope_theta`; see `read_rope`."""
    base, partial = values.pop("rope_theta"), values.pop("partial_rotary_factor", None)
    if fraction is None and partial not in (None, 1):
        raise fields.unsupported("partial_rotary_factor", partial, [1])
    for key in ("mrope_section", "mrope_interleaved"):
        values.pop(key, None)  # of the coordinates of images, which of a text are all its positions
    legacy = values.pop("type", None)
    name = values.pop("rope_type", None) or legacy or "default"
    if name not in ROPE_TYPES:
        raise fields.unsupported("rope_type", name, ROPE_TYPES)
    if name in ("yarn", "llama3") and values.get("original_max_position_embeddings") is None:
        values["original_max_position_embeddings"] = fields.take("max_position_embeddings", None, int)
    known, values = ROPE_TYPES[name], _drop_null(values)
    for key in values:
        if key not in known and not (key == "original_max_position_embeddings" and name in ("default", "linear")):
            raise fields.error(f"rope_parameters.{key}", f"unknown for rope_type {name!r}")
    for key in ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
        if key in known and key not in values:
            raise fields.error(f"rope_parameters.{key}", f"missing for rope_type {name!r}")
    scaling = None
    if name != "default":
        renamed = {known[key]: value for key, value in values.items() if key in known}
        mscale, mscale_all = renamed.pop("mscale", None), renamed.pop("mscale_all_dim", None)
        if renamed.get("attention_factor") is None and mscale and mscale_all:
            # DeepSeek-V2 (arXiv:2405.04434) states the factor on queries and keys as a quotient.
            factor = float(renamed["factor"])
            renamed["attention_factor"] = yarn_growth(factor, float(mscale)) / yarn_growth(factor, float(mscale_all))
        integers = {key: value for key, value in renamed.items() if type(value) is int and key != "original_length"}
        scaling = RopeScaling(kind=name, **renamed | {key: float(value) for key, value in integers.items()})
    return RopeConfig(base=float(base), fraction=float(partial or fraction or 1), scaling=scaling)


def _drop_null(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
