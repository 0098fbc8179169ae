"""The training step and the evaluation of a batch: pure functions, compiled for the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from sparsejax import sharding
from sparsejax.config import TrainConfig
from sparsejax.layers import EMPTY, Context, Dropout, Tokens
from sparsejax.model import Functional
from sparsejax.train.state import TrainState

LOSS_DECAY = 0.99  # of the running mean of the loss


class DeviceBatch(TypedDict):
    """A `data.Batch` on the mesh."""

    inputs: Int[Array, "b t"]
    targets: Int[Array, "b t"]
    weights: Float[Array, "b t"]
    segments: NotRequired[Int[Array, "b t"]]
    positions: NotRequired[Int[Array, "b t"]]
    distance: NotRequired[Int[Array, "b t"]]


class Metrics(TypedDict):
    """Metrics of a step.

    Attributes:
      loss: Mean over the scored tokens of the batch, in nats.
      loss_mean: Running mean of `loss`, without steps that diverged.
      grad_norm: Global norm of the gradient before clipping.
      learning_rate: Learning rate of the update.
      skipped: Number of updates skipped so far.
      diverged: Whether the loss diverged, so that the update was skipped.
    """

    loss: Float[Array, ""]
    loss_mean: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Int[Array, ""]
    diverged: Bool[Array, ""]


class AccuracySums(NamedTuple):
    """Sums over a batch for the accuracy.

    Attributes:
      correct: Weights of correct predictions by position, float32 [t].
      rows: Number of rows whose scored tokens are all correct, and of rows with scored tokens, [2].
      by_distance: Weights of correct and of scored tokens by distance of the answer, float32 [2, t + 1]; at 0 where the
        distance is unknown.
    """

    correct: Array
    rows: Array
    by_distance: Array


class EvaluationSums(NamedTuple):
    """Sums over a batch.

    Attributes:
      losses: Loss by position in the document, float32 [t].
      weights: Weights of the scored tokens by position, float32 [t].
      accuracy: None if accuracy is not scored.
    """

    losses: Array
    weights: Array
    accuracy: AccuracySums | None = None


def token_losses(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], weights: Float[Array, "b t"]
) -> Float[Array, "b t"]:
    """Returns the weighted negative log-likelihood of each target, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights


def build_step(
    model: Functional,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    mesh: Mesh,
) -> Callable[[TrainState[Array], DeviceBatch], tuple[TrainState[Array], Metrics]]:
    """Compiles the training step, which donates the buffers of its state.

    If the loss diverges (it or the gradient is not finite, or it is a spike by `config.spike`), the step leaves the
    parameters and the optimizer unchanged and sets the metric `diverged`.
    """
    differentiate = _build_gradient(model, config.accumulate, mesh)

    def step(state: TrainState[Array], batch: DeviceBatch) -> tuple[TrainState[Array], Metrics]:
        key = jax.random.fold_in(state.key, state.step) if model.config.dropout else None
        loss, gradient = differentiate(state.parameters, batch, key)
        norm = optax.tree.norm(gradient)
        diverged = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        is_first = state.step == state.skipped  # no loss is in the running mean yet
        if config.spike:
            diverged = diverged | (~is_first & (loss > config.spike * state.loss_mean))
        updates, moments = optimizer.update(gradient, state.optimizer, state.parameters)
        updated = optax.apply_updates(state.parameters, updates), moments
        current = state.parameters, state.optimizer
        parameters, moments = jax.tree.map(lambda a, b: jnp.where(diverged, a, b), current, updated)
        mean = jnp.where(is_first, loss, LOSS_DECAY * state.loss_mean + (1 - LOSS_DECAY) * loss)
        after = TrainState(
            step=state.step + 1,
            skipped=state.skipped + diverged,
            loss_mean=jnp.where(diverged, state.loss_mean, mean),
            key=state.key,
            parameters=parameters,
            optimizer=moments,
        )
        rate = schedule(state.step - state.skipped)
        return after, Metrics(
            loss=loss,
            loss_mean=after.loss_mean,
            grad_norm=norm,
            learning_rate=jnp.asarray(rate, jnp.float32),
            skipped=after.skipped,
            diverged=diverged,
        )

    return jax.jit(step, donate_argnums=0)


def build_evaluation(
    model: Functional, mesh: Mesh, score_accuracy: bool = False
) -> Callable[[dict[str, Any], DeviceBatch], EvaluationSums]:
    """Compiles the evaluation of a batch, a function of parameters and batch."""
    constrain = _constrain_batch(mesh)

    def evaluate(parameters: dict[str, Any], batch: DeviceBatch) -> EvaluationSums:
        logits, _ = model.bind(parameters).forward(batch["inputs"], read_context(batch), constrain)
        weights, length = batch["weights"], batch["weights"].shape[1]

        def sum_by(indices: Array | None, x: Array, size: int) -> Array:
            return x.sum(0) if indices is None else jnp.zeros(size).at[indices].add(x)

        positions = batch.get("positions")
        losses = sum_by(positions, token_losses(logits, batch["targets"], weights), length)
        sums = EvaluationSums(losses, sum_by(positions, weights, length))
        if not score_accuracy:
            return sums
        correct = weights * (logits.argmax(-1) == batch["targets"])
        is_scored = weights.sum(1) > 0
        rows = jnp.stack([(is_scored & (correct.sum(1) == weights.sum(1))).sum(), is_scored.sum()])
        distance = batch.get("distance", jnp.zeros_like(batch["targets"]))
        by_distance = jnp.stack([sum_by(distance, x, length + 1) for x in (correct, weights)])
        return sums._replace(accuracy=AccuracySums(sum_by(positions, correct, length), rows, by_distance))

    return jax.jit(evaluate)


def read_context(batch: DeviceBatch) -> Context:
    """Returns the document and the position of each token of packed documents; EMPTY for other batches."""
    if "segments" not in batch:
        return EMPTY
    segments = batch["segments"]
    return Context(Tokens(segments=segments, mask=segments > 0, positions=batch["positions"]))


def _build_gradient(
    model: Functional, microbatches: int, mesh: Mesh
) -> Callable[[dict[str, Any], DeviceBatch, Key[Array, ""] | None], tuple[Array, dict[str, Any]]]:
    """Returns a function to the loss of a batch and its gradient, summed over microbatches that run in sequence."""
    constrain = _constrain_batch(mesh)

    def total_loss(parameters: dict[str, Any], batch: DeviceBatch, key: Key[Array, ""] | None) -> Float[Array, ""]:
        context = read_context(batch)
        if key is not None:
            context = context.with_extras(dropout=Dropout(key, model.config.dropout))
        logits, auxiliary = model.bind(parameters).forward(batch["inputs"], context, constrain)
        weights = batch["weights"]
        # Auxiliary losses are means over tokens; the weights make them sums, like the loss of the tokens.
        return token_losses(logits, batch["targets"], weights).sum() + weights.sum() * sum(auxiliary.values())

    def differentiate(
        parameters: dict[str, Any], batch: DeviceBatch, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        scale = 1 / jnp.maximum(batch["weights"].sum(), 1)
        if microbatches == 1:
            total, gradient = jax.value_and_grad(total_loss)(parameters, batch, key)
        else:
            # Adjacent rows go to different microbatches, so that each microbatch is spread over all devices.
            slices = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
            keys = None if key is None else jax.random.split(key, microbatches)

            def add(sums, microbatch):
                return jax.tree.map(jnp.add, sums, jax.value_and_grad(total_loss)(parameters, *microbatch)), None

            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters)
            (total, gradient), _ = jax.lax.scan(add, zeros, (slices, keys))
        return total * scale, jax.tree.map(lambda g: g * scale, gradient)

    return differentiate


def _constrain_batch(mesh: Mesh) -> Callable[[Array], Array]:
    placement = sharding.batch_sharding(mesh)
    return lambda x: jax.lax.with_sharding_constraint(x, placement)
