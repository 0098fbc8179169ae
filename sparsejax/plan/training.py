"""The training step of a run as a program: its function, and the shapes of its arguments. Reads no data, no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from sparsejax import sharding
from sparsejax.layers import EMPTY
from sparsejax.loading import read_teacher
from sparsejax.model import Functional
from sparsejax.runs import Phase, TrainState, state_shapes
from sparsejax.runs.lora import adapt
from sparsejax.train.runtime import build_phase_step, require_even_shards
from sparsejax.train.teacher import Distillation


class Training(NamedTuple):
    """A training step.

    Attributes:
      step: The function; it donates the state.
      state: Shapes of its first argument.
      batch: Shapes of its second argument.
      teacher: Shapes of the parameters of the teacher, its third argument; None without one.
    """

    step: Callable[..., Any]
    state: TrainState[jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]
    teacher: dict[str, Any] | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The shapes of all arguments."""
        return (self.state, self.batch) if self.teacher is None else (self.state, self.batch, self.teacher)


def describe_training(phase: Phase, steps: int, mesh: Mesh | AbstractMesh) -> Training:
    """Returns the training step of a phase.

    Args:
      phase: The phase.
      steps: Steps of the whole run.
      mesh: The mesh, which can be one without devices.

    Raises:
      InputError: The batch, the model or the teacher does not fit the mesh.
    """
    config = phase.config
    require_even_shards(phase, mesh)
    model = adapt(Functional(config.model), config.optimizer)
    teacher, distillation = _describe_teacher(phase, mesh)
    optimizer, step = build_phase_step(phase, steps, model, mesh, distillation=distillation)
    return Training(step, state_shapes(model, optimizer, mesh), describe_batch(phase, mesh), teacher)


def describe_batch(phase: Phase, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch on the mesh."""
    config = phase.config
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.packing == "packed":
        dtypes |= {"segments": jnp.int32, "positions": jnp.int32}
    shape, placement = (config.train.batch, config.data.length), sharding.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement) for name, dtype in dtypes.items()}


def _describe_teacher(phase: Phase, mesh: Mesh | AbstractMesh) -> tuple[dict[str, Any] | None, Distillation | None]:
    config, section = phase.config, phase.config.train.active_teacher
    teacher = read_teacher(config)
    if section is None or teacher is None:
        return None, None
    functional = Functional(teacher)
    pairs = section.pair_streams(config.model, teacher), section.pair_mixers(config.model, teacher)
    placements = sharding.parameter_shardings(mesh, functional.shapes, functional.axes)
    shapes = jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        functional.shapes_in(section.dtype or "float32"),
        placements,
    )
    return shapes, Distillation(section, functional, EMPTY.extras, *pairs)
