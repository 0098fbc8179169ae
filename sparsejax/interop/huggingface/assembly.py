"""Conversion of the tensors of a checkpoint to the parameters of a model, and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sparsejax.interop.huggingface.checkpoint import Checkpoint
from sparsejax.interop.huggingface.errors import ConversionError
from sparsejax.interop.huggingface.tensors import TensorMap
from sparsejax.interop.huggingface.translation import Translation
from sparsejax.model import Functional, locate_parameters
from sparsejax.sharding import parameter_shardings

Path = tuple[Any, ...]
# Dtypes that convert exactly to float32, in which models compute.
PARAMETER_DTYPES = tuple(np.dtype(name) for name in ("float32", "float16", jnp.bfloat16))
TABLE_DTYPES = tuple(np.dtype(name) for name in ("int64", "int32"))  # of tables of integers


def match_names(checkpoint: Checkpoint, translation: Translation) -> Translation:
    """Applies each replacement of `translation.older_names` with which more tensors are in the checkpoint."""
    stored = set(checkpoint.names)

    def count(maps: Sequence[TensorMap]) -> int:
        return sum(name in stored for tensor_map in maps for name in tensor_map.tensors)

    for pattern, text in translation.older_names:
        maps = [
            dataclasses.replace(tensor_map, tensors=tuple(re.sub(pattern, text, name) for name in tensor_map.tensors))
            for tensor_map in translation.tensor_maps
        ]
        if count(maps) > count(translation.tensor_maps):
            translation = dataclasses.replace(translation, tensor_maps=maps)
    return translation


def assemble(
    checkpoint: Checkpoint, translation: Translation, mesh: Mesh | None, dtype: str = "float32"
) -> tuple[dict[str, Any], dict[str, np.dtype], dict[str, np.ndarray]]:
    """Loads the parameters of a model.

    Parameters are loaded and placed one at a time; those of a scanned layer, for all repetitions of the period.

    Returns:
      The parameters as nested dicts of arrays in the dtypes of `Functional.shapes_in(dtype)`, the dtype in which each
      tensor is stored, and unused tensors.

    Raises:
      ConversionError: A tensor is missing, unknown, or of another shape.
    """
    model = Functional(translation.model)
    shapes, located = _flatten(model.shapes_in(dtype)), locate_parameters(model)
    shardings = None if mesh is None else _flatten(parameter_shardings(mesh, model.shapes, model.axes))
    unused = {name: checkpoint.read(name) for name in _check_names(checkpoint, translation)}
    dtypes: dict[str, np.dtype] = {}
    incomplete: dict[Path, dict[int | None, np.ndarray]] = {}
    parameters: dict[Path, jax.Array] = {}
    # Sorting makes the maps of one parameter in all repetitions of the period adjacent.
    for tensor_map in translation.tensor_maps:
        for name in tensor_map.parameters:
            if name not in located:
                raise AssertionError(f"{tensor_map.tensors[0]} is mapped to {name}, which the model does not have")
    for tensor_map in sorted(translation.tensor_maps, key=lambda entry: str(located[entry.parameters[0]].path)):
        arrays = _load(checkpoint, tensor_map, dtypes)
        for name, array in zip(tensor_map.parameters, arrays, strict=True):
            path, repetition, shape = located[name]
            _check_shape(checkpoint, tensor_map, array.shape, shape)
            repetitions = incomplete.setdefault(path, {})
            repetitions[repetition] = array
            if repetition is None or len(repetitions) == model.config.fold.repeats:
                if repetition is not None:
                    array = np.stack([repetitions[i] for i in range(len(repetitions))])
                parameters[path] = _put(
                    array.astype(shapes[path].dtype), None if shardings is None else shardings[path]
                )
                del incomplete[path]
    missing = [".".join(map(str, path)) for path in shapes if path not in parameters]
    if missing:
        raise AssertionError(f"no tensor is mapped to the parameter {missing[0]}")
    return _nest(model.shapes, parameters), dtypes, unused


class ParameterReader:
    """Reads the parameters of a model one at a time, by path in the unrolled model.

    Raises:
      ConversionError: A tensor is missing or unknown.
    """

    def __init__(self, checkpoint: Checkpoint, translation: Translation):
        _check_names(checkpoint, translation)
        self._checkpoint = checkpoint
        self._maps = {name: tensor_map for tensor_map in translation.tensor_maps for name in tensor_map.parameters}

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a parameter in float32; raises ConversionError if it has another shape."""
        tensor_map = self._maps[name]
        array = _load(self._checkpoint, tensor_map, {})[tensor_map.parameters.index(name)]
        _check_shape(self._checkpoint, tensor_map, array.shape, shape)
        return array


def disassemble(
    tensor_maps: Sequence[TensorMap], parameters: dict[str, Any], model: Functional
) -> dict[str, np.ndarray]:
    """Converts parameters of a model, or any tree of the same structure, to tensors by name."""
    located = locate_parameters(model)
    leaves = {path: np.asarray(leaf) for path, leaf in _flatten(parameters).items()}
    tensors: dict[str, np.ndarray] = {}
    for tensor_map in tensor_maps:
        arrays = []
        for name in tensor_map.parameters:
            path, repetition, _ = located[name]
            arrays.append(leaves[path] if repetition is None else leaves[path][repetition])
        tensors |= dict(zip(tensor_map.tensors, tensor_map.store(arrays), strict=True))
    return tensors


def _load(checkpoint: Checkpoint, tensor_map: TensorMap, dtypes: dict[str, np.dtype]) -> list[np.ndarray]:
    arrays = [checkpoint.read(name) for name in tensor_map.tensors]
    for name, array in zip(tensor_map.tensors, arrays, strict=True):
        known = TABLE_DTYPES if tensor_map.is_table else PARAMETER_DTYPES
        if array.dtype not in known:
            supported = ", ".join(map(str, known))
            raise checkpoint.error(name, f"dtype {array.dtype} is not supported; use one of {supported}")
        dtypes[name] = array.dtype
    try:
        return tensor_map.load([array.astype(np.float32) for array in arrays])
    except (ValueError, IndexError, TypeError) as error:  # TypeError: a scalar has no length
        raise _shape_error(checkpoint, tensor_map, "cannot be converted") from error


def _check_names(checkpoint: Checkpoint, translation: Translation) -> list[str]:
    """Rejects missing and unknown tensors; returns those that the family does not use."""
    known = {name for tensor_map in translation.tensor_maps for name in tensor_map.tensors}
    stored = set(checkpoint.names)
    for name in sorted(known - stored):
        raise checkpoint.error(name, "missing")
    unused = sorted(stored - known)
    for name in unused:
        if not any(re.fullmatch(pattern, name) for pattern in translation.unused):
            raise checkpoint.error(name, "unknown tensor, which the model of config.json does not have")
    return unused


def _check_shape(
    checkpoint: Checkpoint, tensor_map: TensorMap, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    if shape != expected:
        raise _shape_error(checkpoint, tensor_map, f"gives a parameter of shape {list(shape)}, not {list(expected)}")


def _shape_error(checkpoint: Checkpoint, tensor_map: TensorMap, problem: str) -> ConversionError:
    examples = {checkpoint.shape(name): name for name in reversed(tensor_map.tensors)}  # the first tensor of each shape
    shapes = ", ".join(f"{name} {list(shape)}" for shape, name in examples.items())
    return ConversionError(f"{checkpoint.folder}: {shapes}", f"wrong shape: {problem}")


def _put(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    array = np.ascontiguousarray(array)
    return jax.device_put(array) if sharding is None else jax.device_put(array, sharding)


def _flatten(tree: Any) -> dict[Path, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {tuple(entry.key for entry in path): leaf for path, leaf in leaves}


def _nest(tree: Any, leaves: dict[Path, Any]) -> Any:
    return jax.tree.map_with_path(lambda path, _: leaves[tuple(entry.key for entry in path)], tree)
