"""Folders of safetensors, read tensor by tensor and written in one step."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsejax import workdir
from sparsejax.errors import InputError
from sparsejax.interop.huggingface.errors import ConversionError

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_NAME = 255  # characters of a name in an error
SHARD_BYTES = 5 * 10**9
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # those of NumPy; others are quantized


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ConversionError: The file cannot be read, or contains something else.
    """
    try:
        return workdir.read_json(path, dict)
    except FileNotFoundError as error:
        raise ConversionError(path, str(error.strerror)) from error
    except InputError as error:
        raise ConversionError(path, error.problem) from error


class Checkpoint:
    """The tensors of a folder, in one file or several; tensors are read on demand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}  # tensor -> its open file
        for path in self._paths():
            try:
                file = safe_open(path, framework="numpy")
                names = file.keys()
            except (OSError, SafetensorError) as error:
                raise ConversionError(path, "truncated or damaged") from error
            if twice := self._files.keys() & set(names):
                raise ConversionError(path, f"the tensor {min(twice)[:MAX_NAME]} is in another file as well")
            self._files |= dict.fromkeys(names, file)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor.

        Raises:
          ConversionError: The tensor does not exist, or cannot be read.
        """
        file = self._file(name)
        dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise self.error(name, f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}")
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise self.error(name, "damaged") from error

    def error(self, name: str, problem: str) -> ConversionError:
        """Returns an error about a tensor."""
        return ConversionError(f"{self.folder}: {name}", problem)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise self.error(name, "missing")
        return self._files[name]

    def _paths(self) -> list[Path]:
        tensors, index = self.folder / TENSORS, self.folder / INDEX
        if tensors.is_file():
            return [tensors]
        if not index.is_file():
            raise ConversionError(self.folder, f"contains neither {TENSORS} nor {INDEX}")
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()) or not shards:
            raise ConversionError(f"{index}: weight_map", "expected an object of tensor names and file names")
        files = {path.name: path for path in self.folder.iterdir() if path.is_file()}
        for name in shards.values():
            if name not in files:
                raise ConversionError(f"{index}: weight_map", f"no file {name[:MAX_NAME]!r}")
        return [files[name] for name in dict.fromkeys(shards.values())]


def write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    shard_bytes: int = SHARD_BYTES,
    files: Mapping[str, bytes] = types.MappingProxyType({}),
) -> None:
    """Writes a folder, which appears in one step.

    Args:
      folder: The folder.
      config: Content of config.json.
      tensors: Tensors by name.
      shard_bytes: Largest size of a file of tensors, unless a single tensor is larger.
      files: Content of other files by name.

    Raises:
      ConversionError: The folder exists already, or cannot be written.
    """
    if folder.exists():
        raise ConversionError(folder, "exists already")
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name, content in files.items():
            (partial / name).write_bytes(content)
        _write_tensors(partial, tensors, shard_bytes)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConversionError(folder, f"cannot be written: {reason}") from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial)


def _write_tensors(folder: Path, tensors: dict[str, np.ndarray], shard_bytes: int) -> None:
    shards = list(_split(tensors, shard_bytes))
    if len(shards) == 1:
        save_file(shards[0], folder / TENSORS, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: dict[str, np.ndarray], shard_bytes: int) -> Iterable[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        # safetensors writes memory as it is, so transposed views are made contiguous.
        shard[name], size = np.asarray(tensor, order="C"), size + tensor.nbytes
    yield shard
