"""Folders of safetensors: read tensor by tensor, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# What NumPy can hold; others are quantised.
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


class CheckpointError(ValueError):
    """A folder that cannot be used as it is; the message is one line and names the file, key or tensor."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class Checkpoint:
    """The tensors of a folder, one file or several; each is read when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {}  # tensor name -> the open file that holds it
        for path in self._paths():
            try:
                file = safe_open(path, framework="numpy")
                self._files |= dict.fromkeys(file.keys(), file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: {_reason(error)}") from error

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor.

        Raises:
          CheckpointError: there is none of this name, or it cannot be read.
        """
        file = self._file(name)
        dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise CheckpointError(f"{self.folder}: tensor {name}: {dtype} is not supported; only {', '.join(DTYPES)}")
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder}: tensor {name}: {_reason(error)}") from error

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        return self._files[name]

    def _paths(self) -> list[Path]:
        whole, index = self.folder / WHOLE, self.folder / INDEX
        if whole.is_file():
            return [whole]
        if not index.is_file():
            raise CheckpointError(f"{self.folder}: neither {WHOLE} nor {INDEX}")
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()) or not shards:
            raise CheckpointError(f"{index}: no weight_map of tensors to files")
        paths = [self.folder / name for name in dict.fromkeys(shards.values())]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, but named by {INDEX}")
        return paths


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json and the tensors, in files of at most `shard_bytes` where a tensor is not larger.

    The folder appears when all of it is written.

    Raises:
      CheckpointError: the folder exists already, or cannot be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already")
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _write_tensors(partial, tensors, shard_bytes)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {_reason(error)}") from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial)


def _write_tensors(folder: Path, tensors: dict[str, np.ndarray], shard_bytes: int) -> None:
    shards = list(_split(tensors, shard_bytes))
    if len(shards) == 1:
        save_file(shards[0], folder / WHOLE, metadata={"format": "pt"})
        return
    placed = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: dict[str, np.ndarray], most: int) -> Iterable[dict[str, np.ndarray]]:
    shard, held = {}, 0
    for name, tensor in tensors.items():
        if shard and held + tensor.nbytes > most:
            yield shard
            shard, held = {}, 0
        # safetensors writes memory as it lies: a transposed view has to be laid out first.
        shard[name], held = np.asarray(tensor, order="C"), held + tensor.nbytes
    yield shard


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())
