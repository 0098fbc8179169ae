"""The training step: one pure function from state and batch to state and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from sparsejax import sharding
from sparsejax.config import TrainConfig
from sparsejax.layers import NOTHING, Context, Dropout
from sparsejax.model import Functional
from sparsejax.train.state import TrainState

LOSS_MEMORY = 0.99  # of the running mean of the loss
# inputs, targets, and of packed documents segments (0: padding) and positions: int32 [b, t]; weights: float32 [b, t];
# of some probes distance: int32 [b, t]
Batch = dict[str, Array]
Metrics = dict[str, Array]


def token_losses(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], weights: Float[Array, "b t"]
) -> Float[Array, "b t"]:
    """Weighted negative log-likelihood of each target, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights


def build_step(
    model: Functional,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step; it gives up its input state.

    A bad loss (not finite, or a spike by `config.spike`) leaves parameters and optimizer as they were; the
    metric `bad` says so, and the loop decides whether to go on.
    """
    differentiate = _gradient(model, config.accumulate, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step) if model.config.dropout else None
        loss, grads = differentiate(state.parameters, batch, key)
        norm = optax.tree.norm(grads)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        first = state.step == state.skipped  # the mean has nothing in it yet
        if config.spike:
            bad = bad | (~first & (loss > config.spike * state.loss_mean))
        updates, moments = optimizer.update(grads, state.optimizer, state.parameters)
        new = optax.apply_updates(state.parameters, updates), moments
        old = state.parameters, state.optimizer
        parameters, moments = jax.tree.map(lambda a, b: jnp.where(bad, a, b), old, new)
        mean = jnp.where(first, loss, LOSS_MEMORY * state.loss_mean + (1 - LOSS_MEMORY) * loss)
        after = TrainState(
            step=state.step + 1,
            skipped=state.skipped + bad,
            loss_mean=jnp.where(bad, state.loss_mean, mean),
            key=state.key,
            parameters=parameters,
            optimizer=moments,
        )
        rate = schedule(state.step - state.skipped)
        return after, {
            "loss": loss,
            "loss_mean": after.loss_mean,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "skipped": after.skipped,
            "bad": bad,
        }

    return jax.jit(step, donate_argnums=0)


def build_evaluation(model: Functional, mesh: Mesh, answers: bool = False) -> Callable[[Any, Batch], tuple[Array, ...]]:
    """The compiled evaluation: sums over a batch.

    Args:
      model: the model.
      mesh: where it runs.
      answers: also counts how many of the scored tokens are the most likely ones.

    Returns:
      A function of parameters and batch to losses and weights by position in the document, float32 [t] each. With
      `answers`, also the weights of right answers by position [t], how many rows are right wherever they are scored and
      how many are scored at all [2], and right and scored weights by distance [2, t + 1] (at 0 if it is not known).
    """
    place = _keep_batch_sharded(mesh)

    def evaluate(parameters: Any, batch: Batch) -> tuple[Array, ...]:
        logits, _ = model.bind(parameters).forward(batch["inputs"], read_context(batch), place)
        weights, length = batch["weights"], batch["weights"].shape[1]

        def sum_by(numbers: Array | None, x: Array, size: int) -> Array:
            return x.sum(0) if numbers is None else jnp.zeros(size).at[numbers].add(x)

        positions = batch.get("positions")
        losses = token_losses(logits, batch["targets"], weights)
        sums = tuple(sum_by(positions, x, length) for x in (losses, weights))
        if not answers:
            return sums
        right = weights * (logits.argmax(-1) == batch["targets"])
        scored = weights.sum(1) > 0
        rows = jnp.stack([(scored & (right.sum(1) == weights.sum(1))).sum(), scored.sum()])
        distance = batch.get("distance", jnp.zeros_like(batch["targets"]))
        by_distance = jnp.stack([sum_by(distance, x, length + 1) for x in (right, weights)])
        return *sums, sum_by(positions, right, length), rows, by_distance

    return jax.jit(evaluate)


def read_context(batch: Batch) -> Context:
    """What a batch tells of its tokens: of packed documents, which of them a token belongs to and where it stands."""
    if "segments" not in batch:
        return NOTHING
    return Context(segments=batch["segments"], mask=batch["segments"] > 0, positions=batch["positions"])


def _gradient(model: Functional, parts: int, mesh: Mesh):
    """Loss and gradient of a batch, summed over `parts` slices of it that are computed one after the other."""
    place = _keep_batch_sharded(mesh)

    def total_loss(parameters: Any, batch: Batch, key: Key[Array, ""] | None) -> Array:
        context = read_context(batch)
        if key is not None:
            context = dataclasses.replace(context, dropout=Dropout(key, model.config.dropout))
        logits, others = model.bind(parameters).forward(batch["inputs"], context, place)
        weights = batch["weights"]
        # What the layers add is a mean over tokens already; it counts for as much as the tokens it is a mean of.
        return token_losses(logits, batch["targets"], weights).sum() + weights.sum() * sum(others.values())

    def differentiate(parameters: Any, batch: Batch, key: Key[Array, ""] | None) -> tuple[Array, Any]:
        scale = 1 / jnp.maximum(batch["weights"].sum(), 1)
        if parts == 1:
            total, grads = jax.value_and_grad(total_loss)(parameters, batch, key)
        else:
            # Neighbouring rows go to different slices, so that each slice is spread over all devices.
            slices = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
            keys = None if key is None else jax.random.split(key, parts)

            def add(sums, part):
                return jax.tree.map(jnp.add, sums, jax.value_and_grad(total_loss)(parameters, *part)), None

            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters)
            (total, grads), _ = jax.lax.scan(add, zeros, (slices, keys))
        return total * scale, jax.tree.map(lambda g: g * scale, grads)

    return differentiate


def _keep_batch_sharded(mesh: Mesh) -> Callable[[Array], Array]:
    place = sharding.batch_sharding(mesh)
    return lambda x: jax.lax.with_sharding_constraint(x, place)
