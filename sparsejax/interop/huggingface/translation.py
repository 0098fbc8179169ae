"""The result of translating a config.json, and helpers that families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsejax import schedule
from sparsejax.config import ModelConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import TensorMap
from sparsejax.layers import AttentionConfig, FeedForwardConfig, LayerConfig, MixerConfig, NormConfig, RopeConfig


@dataclasses.dataclass(frozen=True)
class Translation:
    """A foreign model as a model of this project.

    Attributes:
      model: The configuration.
      tensor_maps: Maps between tensors and parameters.
      keywords: Arguments of the model besides `input_ids`.
      unused: Regular expressions of tensors that the model does not use, such as derived buffers.
      older_names: Regular expressions of tensor names and their replacements in older files; see `match_names`.
      at_length: For models whose configuration depends on the sequence length: returns the configuration for a length,
        and the multiple to which sequences are padded. The parameters are the same for all lengths.
      rotations: Hash rotations of LSH attention, float [h, d, hashes, buckets / 2].
    """

    model: ModelConfig
    tensor_maps: Sequence[TensorMap]
    keywords: frozenset[str] = frozenset({"attention_mask"})
    unused: tuple[str, ...] = ()
    older_names: tuple[tuple[str, str], ...] = ()
    at_length: Callable[[int], tuple[ModelConfig, int]] | None = None
    rotations: np.ndarray | None = None


def translate_text(
    fields: Fields, translate: Callable[[Fields], Translation], unused: Sequence[str], **defaults: Any
) -> Translation:
    """Translates the text model of a model with images.

    Args:
      fields: The config.json, whose `text_config` is that of the text model.
      translate: Translation of the text model.
      unused: Patterns of the tensors of the other parts.
      **defaults: Keys of `text_config` that it may lack.
    """
    fields.ignore("vision_config", "tie_word_embeddings")
    text = Fields(defaults | fields.take("text_config", kind=dict), f"{fields.path}: text_config")
    translation = translate(text)
    text.finish()
    maps = [
        dataclasses.replace(entry, tensors=tuple(f"language_model.{name}" for name in entry.tensors))
        for entry in translation.tensor_maps
    ]
    unused = (*(rf"language_model\.{name}" for name in translation.unused), *unused)
    return dataclasses.replace(translation, tensor_maps=maps, unused=unused)


def build_model(
    fields: Fields,
    width: int,
    layers: Sequence[tuple[str, LayerConfig]],
    norm: NormConfig | None,
    *,
    tied: bool,
    **settings: Any,
) -> ModelConfig:
    """Builds the configuration of a model that computes in float32.

    Args:
      fields: The config.json, for its `vocab_size`.
      width: Width of the residual stream.
      layers: Name and configuration of each layer; see `name_layers`.
      norm: Norm before the head.
      tied: Whether the head is the transposed embedding.
      **settings: Other fields of `ModelConfig`.
    """
    names, configs = name_layers(layers)
    return ModelConfig(
        vocab=fields.take("vocab_size"),
        width=width,
        schedule=schedule.write(names),
        layers=configs,
        norm=norm,
        tied=tied,
        dtype="float32",
        scan=True,
        **settings,
    )


def name_layers(layers: Sequence[tuple[str, LayerConfig]]) -> tuple[list[str], dict[str, LayerConfig]]:
    """Returns the name of each layer, and the configurations by name.

    Layers with equal names but different configurations are numbered: `local`, `local_2`, ...
    """
    configs: dict[str, LayerConfig] = {}
    names = []
    for name, config in layers:
        variants = [key for key in configs if key.rpartition("_")[0] == name or key == name]
        unique = next((key for key in variants if configs[key] == config), None)
        if unique is None:
            unique = name if not variants else f"{name}_{len(variants) + 1}"
            configs[unique] = config
        names.append(unique)
    return names, configs


def pre_norm_layer(
    mixer: MixerConfig | None, mlp: FeedForwardConfig | None, norm: NormConfig, **settings: Any
) -> LayerConfig:
    """Configuration of a layer with norms before its branches; `settings` are other fields of `LayerConfig`."""
    return LayerConfig(mixer=mixer, mlp=mlp, norm=norm, norm_position="pre", remat="none", **settings)


def read_attention(
    fields: Fields,
    width: int,
    rope: RopeConfig | None,
    *,
    heads: int | None = None,
    kv_heads: int | None = 8,
    head_width: int | None = None,
    pattern: str = "causal",
    qk_norm: NormConfig | None = None,
    **settings: Any,
) -> AttentionConfig:
    """Reads the sizes of attention under the keys of most families.

    Args:
      fields: The config.json.
      width: Width of the residual stream; heads share it if neither `head_dim` nor `head_width` is set.
      rope: Rotary positions.
      heads: Default of `num_attention_heads`; None requires the key.
      kv_heads: Default of `num_key_value_heads`; null stands for the number of heads.
      head_width: Default of `head_dim`.
      pattern: Keys that a query attends to.
      qk_norm: Norm of queries and keys.
      **settings: Other fields of `AttentionConfig`.
    """
    count = fields.take("num_attention_heads") if heads is None else fields.take("num_attention_heads", heads)
    return AttentionConfig(
        pattern=pattern,
        heads=count,
        kv_heads=fields.take("num_key_value_heads", kv_heads, int) or count,
        head_width=fields.take("head_dim", head_width, int) or width // count,
        rope=rope,
        qk_norm=qk_norm,
        impl="auto",
        **settings,
    )


def read_window(
    fields: Fields, default: int | None = None, key: str = "sliding_window", recipe: str = "mistral"
) -> str:
    """Reads a window as its number of keys, the query's position included, for a recipe; null stands for no window."""
    width = fields.take(key, default, int)
    return "causal" if width is None else f"{recipe}({width})"


# Activations of transformers -> those of this project.
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
SILU = {"silu": "silu", "swish": "silu"}  # for families whose mixers use the activation too

# Entries of `layer_types` -> names in a schedule.
LAYER_NAMES = {"sliding_attention": "local", "full_attention": "full", "linear_attention": "linear"}

LEGACY_LAYER_TYPES = {
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
    """Reads the type of each layer; defaults to the order of the family."""
    types = [LEGACY_LAYER_TYPES.get(name, name) for name in fields.take(key, None) or default]
    for name in types:
        if name not in allowed:
            raise fields.unsupported(key, name, allowed)
    if len(types) != len(default):
        raise fields.error(key, f"{len(types)} entries for {len(default)} layers")
    return types
