"""The parameters of a trained model, by path in the unrolled model and read one at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.config import ModelConfig, ModelSource
from sparsejax.errors import InputError
from sparsejax.model import Functional, locate_parameters


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained model, whose parameters are read on demand.

    Attributes:
      source: Where it is, with the absolute path and the step of a checkpoint.
      config: The model.
      shapes: Shape of each parameter by path in the unrolled model, such as `layers.3.mixer.query.weight`.
      read: Reads a parameter by this path, in float32.
    """

    source: ModelSource
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def open_weights(source: ModelSource) -> Weights:
    """Opens a trained model; reads its configuration, and no parameter.

    Raises:
      InputError: There is no such model or checkpoint, or it is damaged.
    """
    try:
        return _open_run(source) if source.kind == "run" else _open_folder(source.resolve())
    except InputError as error:
        named = error.argument in ("source", "path", "step")
        raise InputError("init.source" if named else error.argument, error.problem) from error


def _open_folder(source: ModelSource) -> Weights:
    from sparsejax.interop import huggingface  # needs safetensors

    if not source.exists():
        raise InputError("source", f"{source}: no folder {source.path!r}")
    config, reader = huggingface.open_parameters(source.path)
    shapes = {name: location.shape for name, location in locate_parameters(Functional(config)).items()}
    return Weights(source, config, shapes, lambda name: reader.read(name, shapes[name]))


def _open_run(source: ModelSource) -> Weights:
    from sparsejax.loading import open_checkpoint  # imports grain and Orbax
    from sparsejax.runs.lora import LORA, LowRank, adapt

    checkpoint = open_checkpoint(source)
    base = Functional(checkpoint.run.model)
    located, model = locate_parameters(base), adapt(base, checkpoint.run.optimizer)
    stacked = {tuple(entry.key for entry in path): leaf for path, leaf in jax.tree.leaves_with_path(model.shapes)}
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    # The layers of one name are read one after another, alternating between the layers of the period.
    @functools.lru_cache(maxsize=max(1, len(base.config.fold.period)))
    def read_stack(path: tuple[Any, ...]) -> np.ndarray:
        matrix = read_leaf(path)
        factors = {name: (LORA, *path, name) for name in ("a", "b")}
        if not isinstance(model, LowRank) or factors["a"] not in stacked:
            return matrix
        a, b = (jnp.asarray(read_leaf(factors[name])) for name in ("a", "b"))
        return np.asarray(model.add_product(jnp.asarray(matrix), {"a": a, "b": b}))

    def read_leaf(path: tuple[Any, ...]) -> np.ndarray:
        shape: Any = jax.ShapeDtypeStruct(stacked[path].shape, jnp.float32, sharding=device)
        [leaf] = jax.tree.leaves(checkpoint.read(functools.reduce(lambda tree, key: {key: tree}, path[::-1], shape)))
        return np.asarray(leaf)

    def read(name: str) -> np.ndarray:
        path, repetition, _ = located[name]
        return read_stack(path) if repetition is None else read_stack(path)[repetition]

    resolved = source if source.path.partition("://")[1] else source.resolve()
    resolved = dataclasses.replace(resolved, step=checkpoint.step)
    shapes = {name: location.shape for name, location in located.items()}
    return Weights(resolved, checkpoint.run.model, shapes, read)
