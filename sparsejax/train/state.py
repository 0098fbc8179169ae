"""The state of a run, and where on the mesh each part of it lives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from sparsejax import sharding
from sparsejax.model import Functional


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; with the data iterator's state it determines the rest of the run."""

    step: Int[Array, ""]  # batches seen
    skipped: Int[Array, ""]  # updates not made, because the loss was bad
    loss_mean: Float[Array, ""]  # running mean of the loss, in nats
    key: Key[Array, ""]  # for whatever is drawn; step i draws from fold_in(key, i)
    parameters: Any
    optimizer: Any


def init_state(model: Functional, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, made where it will live."""
    build = _builder(model, optimizer)
    placed = jax.jit(build, out_shardings=_shardings(model, optimizer, mesh))
    return placed(jax.random.key(seed))


def state_shapes(model: Functional, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shapes with shardings: what a checkpoint is restored into."""
    shapes = jax.eval_shape(_builder(model, optimizer), jax.random.key(0))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        _shardings(model, optimizer, mesh),
    )


def _builder(model: Functional, optimizer: optax.GradientTransformation):
    def build(key: Array) -> TrainState:
        init, draws = jax.random.split(key)
        parameters = model.init(init)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, jnp.zeros(()), draws, parameters, optimizer.init(parameters))

    return build


def _shardings(model: Functional, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    everywhere = sharding.replicated(mesh)
    parameters = sharding.parameter_shardings(mesh, model.shapes, model.axes)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, model.shapes),
        parameters,
        # optax's counters too: left alone they would sit on one device and not restore.
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, everywhere, everywhere, everywhere, parameters, moments)
