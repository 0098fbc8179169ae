"""Loading of models from Hugging Face folders, and saving."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.interop.huggingface import checkpoint
from sparsejax.interop.huggingface.assembly import assemble, disassemble
from sparsejax.interop.huggingface.checkpoint import Checkpoint
from sparsejax.interop.huggingface.errors import ConversionError
from sparsejax.interop.huggingface.families import FAMILIES
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import Translation
from sparsejax.layers import Context, Extras, Tokens
from sparsejax.loaded import LoadedModel, Parameters
from sparsejax.model import Functional, check_parameters
from sparsejax.paths import local_path
from sparsejax.patterns import Pattern

DEFAULT_LENGTH = 4096  # of models without a maximum length


class Pretrained(LoadedModel):
    """A loaded model; `model(input_ids, attention_mask=None, ...)` returns logits.

    Attributes:
      hf_config: The config.json.
      config: The configuration of the model. It may be changed, unless it depends on the sequence length (BigBird,
        Reformer); `save` then requires the same change in `hf_config`.
      parameters: Nested dicts of float32 arrays, for `Functional(config)`.
      dtypes: Dtype in which each tensor is stored.
      unused: Tensors that the model does not use, such as another head; `save` writes them back.
      ignored: Keys of config.json that `load` was told to ignore, so that the model may differ from the original.
    """

    def __init__(
        self,
        hf_config: dict[str, Any],
        translation: Translation,
        parameters: Parameters,
        dtypes: dict[str, np.dtype],
        unused: dict[str, np.ndarray],
        options: dict[str, Any],
        ignored: tuple[str, ...],
    ):
        super().__init__(translation.model, parameters)
        self.hf_config, self.kind, self.masks = hf_config, f"a {hf_config['model_type']} model", translation.keywords
        self.dtypes, self.unused, self.ignored = dtypes, unused, ignored
        self._translation, self._options = translation, options

    def tensors(self, parameters: Parameters | None = None) -> dict[str, np.ndarray]:
        """Returns `parameters`, or any tree of the same structure such as gradients, as tensors of the checkpoint."""
        parameters = self.parameters if parameters is None else parameters
        check_parameters(parameters, self._build(self._translation.model).shapes)
        return disassemble(self._translation.tensor_maps, parameters, self._translation.model.fold)

    def _prepare(
        self, input_ids: Any, attention_mask: Any, other_masks: dict[str, Any]
    ) -> tuple[Functional, Array, Context]:
        tokens, masks = self._check(input_ids, {"attention_mask": attention_mask} | other_masks)
        config, multiple = self.config, 1
        if self._translation.at_length is not None:
            if config != self._translation.model:
                kind = self.hf_config["model_type"]
                raise InputError("config", f"a {kind} model builds it for each length; change config.json and reload")
            config, multiple = self._translation.at_length(tokens.shape[1])
        tokens, masks = self._pad(tokens, masks, multiple)
        return self._build(config), jnp.asarray(tokens, jnp.int32), self._make_context(masks)

    def _decoder(self) -> Functional:
        if self._translation.at_length is not None:
            raise InputError("generate", f"{self.kind} is built for each length, and cannot decode token by token")
        return super()._decoder()

    def _pad(
        self, tokens: np.ndarray, masks: dict[str, np.ndarray], multiple: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Pads sequences to a multiple that the family requires, and masks the padding."""
        gap = -tokens.shape[1] % multiple
        if not gap:
            return tokens, masks
        masks = {"attention_mask": np.ones_like(tokens)} | masks
        masks = {name: np.pad(mask, ((0, 0), (0, gap))) for name, mask in masks.items()}
        padding = self.hf_config.get("pad_token_id") or 0
        return np.pad(tokens, ((0, 0), (0, gap)), constant_values=padding), masks

    def _make_context(self, masks: dict[str, np.ndarray]) -> Context:
        mask, is_global = masks.get("attention_mask"), masks.get("global_attention_mask")
        positions, rotations = None, self._translation.rotations
        if is_global is not None:
            is_global = is_global if mask is None else is_global * mask
            count = int(is_global.sum(axis=1).max())
            width = 1 << (count - 1).bit_length() if count else 0  # few distinct shapes, hence few compilations
            rows = [np.flatnonzero(row) for row in is_global]
            padded = [np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]
            positions = np.stack(padded).astype(np.int32)
        extras = Extras(
            globals=None if positions is None or not positions.size else jnp.asarray(positions),
            rotations=None if rotations is None else jnp.asarray(rotations, jnp.float32),
        )
        return Context(Tokens(mask=None if mask is None or mask.all() else jnp.asarray(mask, bool)), extras)


def read_config(path: str | Path, ignore: Collection[str] = ()) -> Translation:
    """Translates a config.json, given the file or its folder.

    Args:
      path: The file or its folder.
      ignore: Keys to leave out, as if the file did not have them.

    Raises:
      ConversionError: The file cannot be read, or has an unknown `model_type`, key or value.
    """
    return _translate(*_read_json(path), ignore)


def describe(path: str | Path, length: int | None = None, ignore: Collection[str] = ()) -> tuple[ModelConfig, int]:
    """Returns the model of a config.json in the dtype in which it is stored, and a sequence length.

    Args:
      path: The file or its folder.
      length: Tokens per sequence; defaults to the maximum length of the file, or 4,096.
      ignore: See `read_config`.

    Raises:
      ConversionError: See `read_config`.
    """
    hf_config, file = _read_json(path)
    translation = _translate(hf_config, file, ignore)
    hf_config = hf_config | (hf_config.get("text_config") or {})
    if length is None:
        key = next((key for key in ("max_position_embeddings", "model_max_length") if hf_config.get(key)), None)
        length = DEFAULT_LENGTH if key is None else hf_config[key]
        if type(length) is not int or length < 1:
            raise ConversionError(f"{file}: {key}", f"{json.dumps(length)}: expected a positive integer")
        # Positions of RoBERTa start after the padding index.
        padding = translation.model.embedding.padding
        length -= 0 if padding is None else padding + 1
    model = translation.model if translation.at_length is None else translation.at_length(length)[0]
    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    # float16 has the size of bfloat16.
    return dataclasses.replace(model, dtype="float32" if dtype == "float32" else "bfloat16"), length


def load(folder: str | Path, *, mesh: Mesh | None = None, ignore: Collection[str] = (), **options: Any) -> Pretrained:
    """Loads the model of a folder with config.json and safetensors, to compute in float32.

    Args:
      folder: The folder.
      mesh: Shards parameters over this mesh by `sharding.RULES`, one at a time.
      ignore: Keys of config.json to leave out, as if the file did not have them; `Pretrained.ignored` records them.
      **options: Options of a family: `random_plans` (BigBird: random key tiles of the inner query tiles per layer, int
        [h, tiles - 2, r]), `lsh_rotations` (Reformer: float [h, d, hashes, buckets / 2]).

    Raises:
      ConversionError: A file, key or tensor is missing, unknown or invalid.
    """
    hf_config, file = _read_json(folder)
    translation = _translate(hf_config, file, ignore, **options)
    quantization = hf_config.get("quantization_config")
    if quantization and "quantization_config" not in ignore:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        problem = f"the weights are quantized ({method}); convert them to bfloat16 first"
        raise ConversionError(f"{file}: quantization_config", problem)
    parts = assemble(Checkpoint(local_path(folder)), translation, mesh)
    return Pretrained(hf_config, translation, *parts, options, tuple(ignore))


def save(model: Pretrained, folder: str | Path, shard_bytes: int = checkpoint.SHARD_BYTES) -> None:
    """Writes a loaded model as a folder in its original format and dtypes.

    Raises:
      ConversionError: The folder exists already, or cannot be written; or `hf_config` describes another model than
        `config`, which the folder would give when loaded.
      InputError: A parameter is missing, or of another shape.
    """
    described = _translate(model.hf_config, checkpoint.CONFIG, model.ignored, **model._options).model
    difference = _find_difference(described, model.config)
    if difference is not None:
        path, written, held = difference
        problem = f"config.json describes {written!r}, but the model has {held!r}; change hf_config too"
        raise ConversionError(f"config.{path}", problem)
    tensors = {name: tensor.astype(model.dtypes[name]) for name, tensor in model.tensors().items()}
    checkpoint.write(local_path(folder), model.hf_config, tensors | model.unused, shard_bytes)


def _find_difference(first: Any, second: Any, path: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """The path of the first field in which two configurations differ, and both values."""
    if first == second:
        return None
    if dataclasses.is_dataclass(first) and type(first) is type(second) and not isinstance(first, Pattern):
        names = [field.name for field in dataclasses.fields(first)]
        entries = [(name, getattr(first, name), getattr(second, name)) for name in names]
    elif isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        entries = [(key, first[key], second[key]) for key in first]
    else:
        return ".".join(path), first, second
    return next(filter(None, (_find_difference(a, b, (*path, key)) for key, a, b in entries)))


def _read_json(path: str | Path) -> tuple[dict[str, Any], str]:
    path = local_path(path)
    if path.is_dir():
        path = path / checkpoint.CONFIG
    return checkpoint.read_object(path), str(path)


def _translate(hf_config: dict[str, Any], path: str, ignore: Collection[str] = (), **options: Any) -> Translation:
    fields = Fields(hf_config, path, ignore)
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise fields.unsupported("model_type", model_type, sorted(FAMILIES))
    translate = FAMILIES[model_type]
    for option in options:
        if option not in inspect.signature(translate).parameters:
            raise InputError(option, f"not an option of a {model_type} model")
    try:
        translation = translate(fields, **options)
    except ConversionError:
        raise
    except InputError as error:  # sizes that a configuration does not accept
        raise ConversionError(path, str(error)) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConversionError(path, "a value has the wrong type or size") from error
    fields.finish()
    return translation
