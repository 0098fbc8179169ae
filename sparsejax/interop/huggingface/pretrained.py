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

from sparsejax.config import ModelConfig
from sparsejax.data.errors import DataError
from sparsejax.data.tokenizers import HuggingFace, Tokenizer, load_tokenizer
from sparsejax.errors import InputError
from sparsejax.interop.huggingface import checkpoint
from sparsejax.interop.huggingface.assembly import ParameterReader, assemble, disassemble, match_names
from sparsejax.interop.huggingface.checkpoint import Checkpoint
from sparsejax.interop.huggingface.errors import ConversionError
from sparsejax.interop.huggingface.expression import find_differences
from sparsejax.interop.huggingface.families import FAMILIES, read_model_type
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.translation import Translation
from sparsejax.layers import Extras
from sparsejax.loaded import LoadedModel, Parameters, Source, set_dtype
from sparsejax.model import Functional, check_parameters
from sparsejax.paths import local_path

DEFAULT_LENGTH = 4096  # of models without a maximum length
LENGTHS = ("max_position_embeddings", "model_max_length", "n_positions")  # keys of a maximum length

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
GENERATION = "generation_config.json"


@dataclasses.dataclass
class HuggingFaceSource(Source):
    """The folder from which a model was loaded.

    Attributes:
      hf_config: The config.json. A changed `config` of the model needs the same change here before `save`.
      translation: What it describes.
      dtypes: Dtype in which each tensor is stored.
      unused: Tensors that the model does not use, such as another head; `save` writes them back.
      options: Options of the family.
      ignored: Keys of config.json that `load` was told to ignore, so that the model may differ from the original.
      folder: The folder.
    """

    hf_config: dict[str, Any] = dataclasses.field(kw_only=True)
    translation: Translation = dataclasses.field(kw_only=True)
    dtypes: dict[str, np.dtype] = dataclasses.field(kw_only=True)
    unused: dict[str, np.ndarray] = dataclasses.field(kw_only=True)
    options: dict[str, Any] = dataclasses.field(kw_only=True)
    ignored: tuple[str, ...] = dataclasses.field(kw_only=True)
    folder: Path = dataclasses.field(kw_only=True)

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that `load` names; by default that of the folder.

        Raises:
          InputError: The folder has no tokenizer.json or tokenizer.model, or the named tokenizer cannot be read.
        """
        name = self.data.get("tokenizer")
        if name is None:
            problem = f"{self.folder} has neither {' nor '.join(TOKENIZERS)}; name a tokenizer, or use token ids"
            raise InputError("tokenizer", problem)
        if name.startswith("bpe:"):
            raise InputError("tokenizer", f"{name} is trained on the text of a run; give bytes, chars or a file")
        try:
            return load_tokenizer(name, (), "", self.folder)
        except DataError as error:
            raise InputError("tokenizer", error.problem) from error

    def at_length(self, config: ModelConfig, length: int) -> tuple[ModelConfig, int]:
        """Returns the configuration for a length, and the multiple to which sequences are padded."""
        if self.translation.at_length is None:
            return config, 1
        if config != self.translation.model:
            raise InputError("config", f"{self.kind} builds it for each length; change config.json and reload")
        return self.translation.at_length(length)

    @property
    def is_built_per_length(self) -> bool:
        """Whether `at_length` depends on the length."""
        return self.translation.at_length is not None

    @property
    def extras(self) -> Extras:
        """The hash rotations of Reformer, if they were recorded."""
        rotations = self.translation.rotations
        return Extras(rotations=None if rotations is None else jnp.asarray(rotations, jnp.float32))

    @property
    def padding(self) -> int:
        """Id of padding."""
        return self.hf_config.get("pad_token_id") or 0

    def prefix(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that the tokenizer writes before every text, such as <s>."""
        return tokenizer.find_prefix() if isinstance(tokenizer, HuggingFace) else ()

    def ends(self, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        """The `eos_token_id` of generation_config.json or config.json; else the separator of the tokenizer."""
        path = self.folder / GENERATION
        recorded = checkpoint.read_object(path) if path.exists() else {}
        ends = recorded.get("eos_token_id", self.hf_config.get("eos_token_id"))
        if ends is None:
            return super().ends(tokenizer)
        ends = ends if isinstance(ends, list) else [ends]
        if not all(type(end) is int for end in ends):
            raise ConversionError(f"{path}: eos_token_id", f"{json.dumps(ends)}: expected integers")
        return tuple(ends)


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
    length = _read_length(hf_config, file, translation) if length is None else length
    model = translation.model if translation.at_length is None else translation.at_length(length)[0]
    hf_config = hf_config | (hf_config.get("text_config") or {})
    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    # float16 has the size of bfloat16.
    return dataclasses.replace(model, dtype="float32" if dtype == "float32" else "bfloat16"), length


def _read_length(hf_config: dict[str, Any], file: str, translation: Translation) -> int:
    """Returns the maximum length of a model."""
    hf_config = hf_config | (hf_config.get("text_config") or {})
    key = next((key for key in LENGTHS if hf_config.get(key)), None)
    length = DEFAULT_LENGTH if key is None else hf_config[key]
    if type(length) is not int or length < 1:
        raise ConversionError(f"{file}: {key}", f"{json.dumps(length)}: expected a positive integer")
    # Positions of RoBERTa start after the padding index.
    padding = translation.model.embedding.padding
    return length - (0 if padding is None else padding + 1)


def load(
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    ignore: Collection[str] = (),
    **options: Any,
) -> LoadedModel:
    """Loads the model of a folder with config.json and safetensors.

    Args:
      folder: The folder.
      tokenizer: "bytes", or a file, instead of tokenizer.json or tokenizer.model of the folder.
      mesh: Shards parameters over this mesh by `sharding.RULES`, one at a time.
      dtype: Dtype of the computation and of linear maps and embeddings; defaults to float32.
      ignore: Keys of config.json to leave out, as if the file did not have them; `HuggingFaceSource.ignored` records
        them.
      **options: Options of a family: `random_plans` (BigBird: random key tiles of the inner query tiles per layer, int
        [h, tiles - 2, r]), `lsh_rotations` (Reformer: float [h, d, hashes, buckets / 2]).

    Raises:
      ConversionError: A file, key or tensor is missing, unknown or invalid.
    """
    hf_config, file = _read_json(folder)
    translation = _translate(hf_config, file, ignore, **options)
    config = set_dtype(translation.model, dtype)
    path = local_path(folder)
    tensors, translation = _open_tensors(path, hf_config, translation, ignore)
    parameters, dtypes, unused = assemble(tensors, translation, mesh, dtype or "float32")
    files = [str(path / name) for name in TOKENIZERS if (path / name).is_file()]
    name = files[0] if tokenizer is None and files else tokenizer
    source = HuggingFaceSource(
        kind=f"a {read_model_type(hf_config)} model",
        masks=translation.keywords,
        length=min(_read_length(hf_config, file, translation), DEFAULT_LENGTH),
        data={} if name is None else {"tokenizer": name},
        hf_config=hf_config,
        translation=translation,
        dtypes=dtypes,
        unused=unused,
        options=options,
        ignored=tuple(ignore),
        folder=path,
    )
    return LoadedModel(config, parameters, source)


def open_parameters(folder: str | Path) -> tuple[ModelConfig, ParameterReader]:
    """Returns the model of a folder, and a reader of its parameters.

    Raises:
      ConversionError: As `load`, except that a tensor of a wrong shape is found when it is read.
    """
    hf_config, file = _read_json(folder)
    tensors, translation = _open_tensors(local_path(folder), hf_config, _translate(hf_config, file))
    return translation.model, ParameterReader(tensors, translation)


def to_tensors(model: LoadedModel, parameters: Parameters | None = None) -> dict[str, np.ndarray]:
    """Returns the parameters of a loaded model as tensors of its checkpoint.

    Args:
      model: A model that `load` returned.
      parameters: Other parameters, or any tree of the same structure, such as gradients.

    Raises:
      InputError: The model is not from a Hugging Face folder, or a parameter is missing or of another shape.
    """
    translation = _source_of(model).translation
    parameters = model.parameters if parameters is None else parameters
    described = Functional(translation.model)
    check_parameters(parameters, described.shapes)
    return disassemble(translation.tensor_maps, parameters, described)


def save(model: LoadedModel, folder: str | Path, shard_bytes: int = checkpoint.SHARD_BYTES) -> None:
    """Writes a loaded model as a folder in its original format and dtypes.

    Raises:
      ConversionError: The folder exists already, or cannot be written; or `source.hf_config` describes another model
        than `config`, which the folder would give when loaded.
      InputError: The model is not from a Hugging Face folder, or a parameter is missing or of another shape.
    """
    source = _source_of(model)
    described = _translate(source.hf_config, checkpoint.CONFIG, source.ignored, **source.options).model
    for path, written, held in find_differences(described, model.config):
        problem = f"config.json describes {written!r}, but the model has {held!r}; change source.hf_config too"
        raise ConversionError(f"config.{path}", problem)
    tensors = {name: tensor.astype(source.dtypes[name]) for name, tensor in to_tensors(model).items()}
    checkpoint.write(local_path(folder), source.hf_config, tensors | source.unused, shard_bytes)


def _open_tensors(
    folder: Path, hf_config: dict[str, Any], translation: Translation, ignore: Collection[str] = ()
) -> tuple[Checkpoint, Translation]:
    """Opens the tensors, and adapts the translation to their names."""
    quantization = hf_config.get("quantization_config")
    if quantization and "quantization_config" not in ignore:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        problem = f"the weights are quantized ({method}); convert them to bfloat16 first"
        raise ConversionError(f"{folder / checkpoint.CONFIG}: quantization_config", problem)
    tensors = Checkpoint(folder)
    return tensors, match_names(tensors, translation)


def _source_of(model: LoadedModel) -> HuggingFaceSource:
    if not isinstance(model.source, HuggingFaceSource):
        raise InputError("model", "was not loaded from a Hugging Face folder")
    return model.source


def _read_json(path: str | Path) -> tuple[dict[str, Any], str]:
    path = local_path(path)
    if path.is_dir():
        path = path / checkpoint.CONFIG
    return checkpoint.read_object(path), str(path)


def _translate(hf_config: dict[str, Any], path: str, ignore: Collection[str] = (), **options: Any) -> Translation:
    fields = Fields(hf_config, path, ignore)
    model_type = read_model_type(hf_config)
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
