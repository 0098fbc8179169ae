"""From the tensors of a checkpoint to a model's parameters, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sparsejax.interop.huggingface.checkpoint import Checkpoint, CheckpointError
from sparsejax.interop.huggingface.tensors import Piece
from sparsejax.interop.huggingface.translation import Translation
from sparsejax.model import Functional
from sparsejax.schedule import Fold
from sparsejax.sharding import parameter_shardings

Path = tuple[str | int, ...]
# What float32, in which models compute, can hold exactly.
PARAMETER_DTYPES = tuple(np.dtype(name) for name in ("float32", "float16", jnp.bfloat16))


def assemble(
    checkpoint: Checkpoint, translation: Translation, mesh: Mesh | None
) -> tuple[dict[str, Any], dict[str, np.dtype], dict[str, np.ndarray]]:
    """Parameters as nested dicts of float32 arrays, how each tensor was stored, and the tensors that are not used.

    One parameter is read at a time (of a scanned layer: all turns of the period), placed, and forgotten here.

    Raises:
      CheckpointError: a tensor is missing, unknown or of another shape.
    """
    model, fold = Functional(translation.model), translation.model.fold
    shapes = _flatten(model.shapes)
    shardings = None if mesh is None else _flatten(parameter_shardings(mesh, model.shapes, model.axes))
    unused = {name: checkpoint.read(name) for name in _check_names(checkpoint, translation)}
    dtypes: dict[str, np.dtype] = {}
    waiting: dict[Path, dict[int | None, np.ndarray]] = {}
    done: dict[Path, jax.Array] = {}
    # Pieces of one parameter in all turns of the period come one after the other.
    for piece in sorted(translation.pieces, key=lambda piece: str(_locate(fold, piece.ours[0])[0])):
        arrays = _read(checkpoint, piece, dtypes)
        for path, array in zip(piece.ours, arrays, strict=True):
            key, turn = _locate(fold, path)
            _check_shape(checkpoint, piece, path, array, shapes, key, turn)
            turns = waiting.setdefault(key, {})
            turns[turn] = array
            if turn is None or len(turns) == fold.repeats:
                whole = array if turn is None else np.stack([turns[i] for i in range(fold.repeats)])
                done[key] = _put(whole, None if shardings is None else shardings[key])
                del waiting[key]
    missing = [".".join(map(str, key)) for key in shapes if key not in done]
    if missing:
        raise AssertionError(f"no tensor is mapped to the parameter {missing[0]}")
    return _nest(model.shapes, done), dtypes, unused


def disassemble(pieces: Sequence[Piece], parameters: dict[str, Any], fold: Fold) -> dict[str, np.ndarray]:
    """Tensors by name, of parameters or of anything shaped like them."""
    held = {key: np.asarray(leaf) for key, leaf in _flatten(parameters).items()}
    tensors = {}
    for piece in pieces:
        arrays = []
        for path in piece.ours:
            key, turn = _locate(fold, path)
            arrays.append(held[key] if turn is None else held[key][turn])
        tensors |= dict(zip(piece.theirs, piece.write(arrays), strict=True))
    return tensors


def _locate(fold: Fold, path: str) -> tuple[Path, int | None]:
    """Where a parameter of the unrolled model is: its keys, and which turn of the period, None if it is not in it."""
    room, *rest = (int(part) if part.isdigit() else part for part in path.split("."))
    if room != "layers":
        return (room, *rest), None
    number, *rest = rest
    start, width = len(fold.before), len(fold.period)
    if number < start:
        return ("before", number, *rest), None
    if number < start + width * fold.repeats:
        turn, place = divmod(number - start, width)
        return ("period", place, *rest), turn
    return ("after", number - start - width * fold.repeats, *rest), None


def _read(checkpoint: Checkpoint, piece: Piece, dtypes: dict[str, np.dtype]) -> list[np.ndarray]:
    arrays = [checkpoint.read(name) for name in piece.theirs]
    for name, array in zip(piece.theirs, arrays, strict=True):
        if array.dtype not in PARAMETER_DTYPES:
            only = ", ".join(map(str, PARAMETER_DTYPES))
            raise CheckpointError(f"{checkpoint.folder}: tensor {name}: {array.dtype} is not supported; only {only}")
        dtypes[name] = array.dtype
    try:
        return piece.read([array.astype(np.float32) for array in arrays])
    except (ValueError, IndexError, TypeError) as error:  # TypeError: a number has no length
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in zip(piece.theirs, arrays, strict=True))
        raise CheckpointError(f"{checkpoint.folder}: wrong shape: {shapes}: {error}") from error


def _check_names(checkpoint: Checkpoint, translation: Translation) -> list[str]:
    """Refuses tensors that are missing or unknown; gives those that the family has no use for."""
    known = {name for piece in translation.pieces for name in piece.theirs}
    held = set(checkpoint.names)
    for name in sorted(known - held):
        raise CheckpointError(f"{checkpoint.folder}: no tensor {name}")
    unused = sorted(held - known)
    for name in unused:
        if not any(re.fullmatch(pattern, name) for pattern in translation.unused):
            raise CheckpointError(f"{checkpoint.folder}: tensor {name}: has no place in the model of config.json")
    return unused


def _check_shape(checkpoint, piece: Piece, path: str, array: np.ndarray, shapes, key: Path, turn: int | None) -> None:
    if key not in shapes:
        raise AssertionError(f"{piece.theirs[0]} is mapped to {path}, which the model does not have")
    expected = shapes[key].shape if turn is None else shapes[key].shape[1:]
    if array.shape != expected:
        names = ", ".join(f"{name} {list(checkpoint.shape(name))}" for name in piece.theirs[:3])
        raise CheckpointError(
            f"{checkpoint.folder}: wrong shape: {names}: makes {list(array.shape)}, not {list(expected)}"
        )


def _put(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    array = np.ascontiguousarray(array)
    return jax.device_put(array) if sharding is None else jax.device_put(array, sharding)


def _flatten(tree: Any) -> dict[Path, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {tuple(part.key for part in path): leaf for path, leaf in leaves}


def _nest(tree: Any, leaves: dict[Path, Any]) -> Any:
    return jax.tree.map_with_path(lambda path, _: leaves[tuple(part.key for part in path)], tree)
