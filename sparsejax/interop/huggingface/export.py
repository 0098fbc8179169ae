"""Export of trained models as folders that transformers loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.config import ModelSource
from sparsejax.data.tokenizers import CHARACTERS, MASK_NAMES, Bytes, HuggingFace, Tokenizer
from sparsejax.errors import InputError
from sparsejax.interop.huggingface import checkpoint
from sparsejax.interop.huggingface.assembly import disassemble
from sparsejax.interop.huggingface.errors import ConversionError
from sparsejax.interop.huggingface.expression import EXPORTED, Expression, choose_family, find_differences
from sparsejax.interop.huggingface.families import read_model_type
from sparsejax.interop.huggingface.pretrained import GENERATION, HuggingFaceSource, read_config
from sparsejax.loaded import LoadedModel
from sparsejax.model import Functional, check_parameters
from sparsejax.paths import local_path

DTYPES = ("float32", "bfloat16")
TOKENIZER, SENTENCEPIECE, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# Files of a folder that belong to its tokenizer or to generation.
COMPANIONS = (SETTINGS, GENERATION, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
NO_POSITIONS = ("mamba", "mamba2")  # families without `max_position_embeddings`


@dataclasses.dataclass(frozen=True)
class Exported:
    """A folder that `export` wrote.

    Attributes:
      folder: The folder.
      family: The `model_type` of its config.json.
      tensors: Number of tensors.
      parameters: Number of their elements.
      files: Names of the files besides config.json and the tensors.
    """

    folder: Path
    family: str
    tensors: int
    parameters: int
    files: tuple[str, ...]


def export(
    model: LoadedModel,
    folder: str | Path,
    *,
    family: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = checkpoint.SHARD_BYTES,
) -> Exported:
    """Writes a model as a folder that transformers loads, with the same logits.

    The folder has config.json, safetensors and the files of the tokenizer. A model that started from a Hugging Face
    folder, and is still the model of its config.json, keeps that config.json. Another model gets the config.json of a
    family that expresses it.

    Args:
      model: A loaded run or Hugging Face folder.
      folder: The folder, which must not exist.
      family: The `model_type`, such as "mistral"; by default that of the folder from which the model started, or the
        first family that expresses the model.
      dtype: "float32" or "bfloat16", in which the tensors are stored.
      shard_bytes: Largest size of a file of tensors, unless a single tensor is larger.

    Raises:
      InputError: No family expresses the model, or the named family does not; the argument is the key of the
        configuration that stands in the way.
      ConversionError: The folder exists already, or cannot be written.
    """
    if dtype not in DTYPES:
        raise InputError("dtype", f"{dtype!r}: use one of {', '.join(DTYPES)}")
    path = local_path(folder, "folder")
    if path.exists():
        raise ConversionError(path, "exists already")
    expression = _express(model, family)
    assert expression.translation is not None
    functional = Functional(model.config)
    check_parameters(model.parameters, functional.shapes)
    tensors = disassemble(expression.translation.tensor_maps, model.parameters, functional)
    tables = {name for entry in expression.translation.tensor_maps if entry.is_table for name in entry.tensors}
    stored = {
        name: np.asarray(tensor, np.int64 if name in tables else jnp.dtype(dtype)) for name, tensor in tensors.items()
    }
    files = _tokenizer_files(model)
    hf_config = _special_ids(model) | expression.hf_config | {"dtype": dtype}
    hf_config.pop("torch_dtype", None)
    if expression.family not in NO_POSITIONS:
        hf_config = {"max_position_embeddings": _max_length(model)} | hf_config
    if "n_positions" in hf_config:  # another name of the same key
        del hf_config["max_position_embeddings"]
    checkpoint.write(path, hf_config, stored, shard_bytes, files)
    count = sum(tensor.size for tensor in stored.values())
    return Exported(path, expression.family, len(stored), count, tuple(files))


def _express(model: LoadedModel, family: str | None) -> Expression:
    """Returns the config.json from which the model started, or that of a family."""
    origin, preferred = _origin(model), None
    if origin is not None:
        hf_config = checkpoint.read_object(origin / checkpoint.CONFIG)
        preferred = read_model_type(hf_config)
        if preferred in EXPORTED and family in (None, preferred):
            ignored = model.source.ignored if isinstance(model.source, HuggingFaceSource) else ()
            translation = read_config(origin, ignored)
            config = translation.model
            if translation.at_length is not None:
                config = translation.at_length(model.source.length)[0]
            if next(find_differences(config, model.config), None) is None:
                return Expression(preferred, hf_config, translation)
    return choose_family(model.config, model.source.length, family, preferred)


def _origin(model: LoadedModel) -> Path | None:
    """Returns the Hugging Face folder from which a model was loaded or its run started; None if there is none."""
    if isinstance(model.source, HuggingFaceSource):
        return model.source.folder
    run = model.source.run
    source = None if run is None or run.init.source is None else ModelSource.parse(run.init.source)
    return local_path(source.path) if source is not None and source.kind == "hf" and source.exists() else None


def _max_length(model: LoadedModel) -> int:
    return max(model.source.length, model.config.embedding.max_length or 0)


def _tokenizer(model: LoadedModel) -> Tokenizer | None:
    """Returns the tokenizer of a model; None if the model has no text."""
    run = model.source.run
    has_text = run.data.task == "text" if run is not None else bool(model.source.data.get("tokenizer"))
    return model.tokenizer if has_text else None


def _special_ids(model: LoadedModel) -> dict[str, Any]:
    """The ids of special tokens; null without one, since the defaults of families are those of other tokenizers."""
    tokenizer = _tokenizer(model)
    ends = model.source.ends(tokenizer)
    prefix = model.source.prefix(tokenizer) if tokenizer is not None else ()
    return {
        "bos_token_id": prefix[0] if prefix else None,
        "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": None,
    }


def _tokenizer_files(model: LoadedModel) -> dict[str, bytes]:
    """Content of the files of the tokenizer by name: copies, or equivalents for bytes and text8."""
    tokenizer, origin = _tokenizer(model), _origin(model)
    if tokenizer is None:
        return {}
    if tokenizer.data is None:
        is_masked = model.config.vocab > tokenizer.mask
        data = _write_json(describe_bytes(is_masked) if isinstance(tokenizer, Bytes) else describe_characters())
        return {TOKENIZER: data, SETTINGS: _write_json({"tokenizer_class": "PreTrainedTokenizerFast"})}
    name = TOKENIZER if isinstance(tokenizer, HuggingFace) else SENTENCEPIECE
    files = {name: tokenizer.data}
    if origin is not None and (origin / name).is_file() and (origin / name).read_bytes() == tokenizer.data:
        return files | {other: (origin / other).read_bytes() for other in COMPANIONS if (origin / other).is_file()}
    if name == TOKENIZER:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if tokenizer.separator is not None:
            settings["eos_token"] = tokenizer.decode(np.array([tokenizer.separator]))
        files[SETTINGS] = _write_json(settings)
    return files


def describe_bytes(is_masked: bool) -> dict[str, Any]:
    """Returns the file of `tokenizers` whose ids are the bytes of UTF-8, and then the mask token if there is one."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # those that byte-level vocabularies keep
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    mask = {"id": Bytes.mask, "content": MASK_NAMES[0], "special": True, "normalized": False}
    mask |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    settings = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _describe(vocabulary, settings, settings) | {"added_tokens": [mask] if is_masked else []}


def describe_characters() -> dict[str, Any]:
    """Returns the file of `tokenizers` whose ids are the 27 characters of text8."""
    return _describe({character: number for number, character in enumerate(CHARACTERS)}, None, {"type": "Fuse"})


def _describe(vocabulary: dict[str, int], splitting: dict[str, Any] | None, joining: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": splitting,
        "decoder": joining,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _write_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
