"""The state of a run, and where on the mesh each part of it is placed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Key

from sparsejax import sharding
from sparsejax.model import Functional, restack_layers
from sparsejax.runs.groups import LORA, map_parameters
from sparsejax.runs.lora import LowRank
from sparsejax.runs.optimizer import carry_over
from sparsejax.runs.statistics import LossStatistics, init_losses

Leaf = TypeVar("Leaf")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState(Generic[Leaf]):
    """Everything that a step reads and writes. With the state of the data iterator it determines the rest of the run.

    The leaves are arrays, or their shapes or shardings.

    Attributes:
      step: Number of batches seen, int32.
      skipped: Number of updates that were skipped because the loss diverged, int32.
      losses: Statistics of the loss.
      key: PRNG key; step i draws from `fold_in(key, i)`.
      parameters: Parameters of the model, a nested dict.
      optimizer: State of the optimizer.
    """

    step: Leaf
    skipped: Leaf
    losses: LossStatistics
    key: Leaf
    parameters: dict[str, Any]
    optimizer: Any


def init_state(
    model: Functional,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    parameters: dict[str, Any] | None = None,
) -> TrainState[Array]:
    """Initializes a state on the mesh, without a copy elsewhere.

    Args:
      model: The model.
      optimizer: The optimizer.
      seed: Seed of the state.
      mesh: The mesh.
      parameters: Parameters of the model on the mesh, whose buffers are donated; by default they are drawn at random.
    """
    init = jax.jit(
        _build_init(model, optimizer), out_shardings=_shardings(model, optimizer, mesh), donate_argnames="parameters"
    )
    return init(jax.random.key(seed), parameters=parameters)


def state_shapes(
    model: Functional, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState[jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings into which a checkpoint is restored."""
    shapes = jax.eval_shape(_build_init(model, optimizer), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        shapes,
        _shardings(model, optimizer, mesh),
    )


def restack_state(
    state: TrainState[Array],
    source: Functional,
    target: Functional,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState[Array]:
    """Converts a state between models of the same layers that differ in what is scanned; see `model.restack`."""

    def is_parameters(tree: Any) -> bool:
        return isinstance(tree, dict) and tree.keys() == source.shapes.keys()

    def convert(tree: Any) -> Any:
        if not is_parameters(tree):
            return tree
        factors = {LORA: restack_layers(tree[LORA], source.config, target.config)} if LORA in tree else {}
        return restack_layers(tree, source.config, target.config) | factors

    def convert_all(state: TrainState[Array]) -> TrainState[Array]:
        parameters, moments = jax.tree.map(convert, (state.parameters, state.optimizer), is_leaf=is_parameters)
        return dataclasses.replace(state, parameters=parameters, optimizer=moments)

    return jax.jit(convert_all, out_shardings=_shardings(target, optimizer, mesh))(state)


def regroup_state(
    state: TrainState[Array], model: Functional, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState[Array]:
    """Converts a state to an optimizer with other groups of parameters; see `optimizer.carry_over`."""

    def convert(state: TrainState[Array]) -> TrainState[Array]:
        moments = carry_over(state.optimizer, optimizer.init(state.parameters))
        return dataclasses.replace(state, optimizer=moments)

    return jax.jit(convert, out_shardings=_shardings(model, optimizer, mesh))(state)


def _build_init(model: Functional, optimizer: optax.GradientTransformation) -> Callable[..., TrainState[Array]]:
    def init(key: Key[Array, ""], parameters: dict[str, Any] | None = None) -> TrainState[Array]:
        parameter_key, step_key = jax.random.split(key)
        if parameters is None:
            parameters = model.init(parameter_key)
        elif isinstance(model, LowRank):
            parameters = model.add_factors(parameters, parameter_key)
        else:
            parameters = model.round(parameters)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, init_losses(), step_key, parameters, optimizer.init(parameters))

    return init


def _shardings(
    model: Functional, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState[NamedSharding]:
    replicated = sharding.replicated(mesh)
    parameters = sharding.parameter_shardings(mesh, model.shapes, model.axes)
    placed = jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        model.shapes,
        parameters,
    )
    moments = map_parameters(
        # Factored statistics, which lack an axis of their parameter, are small.
        lambda leaf, parameter: parameter.sharding if leaf.shape == parameter.shape else replicated,
        jax.eval_shape(optimizer.init, model.shapes),
        placed,
        # Counters of optax need a placement too: on a single device they would not restore.
        others=lambda _: replicated,
    )
    losses = jax.tree.map(lambda _: replicated, jax.eval_shape(init_losses))
    return TrainState(replicated, replicated, losses, replicated, parameters, moments)
