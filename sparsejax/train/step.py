"""The training step and the evaluation of a batch: pure functions, compiled for the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from sparsejax import sharding
from sparsejax.config import TrainConfig
from sparsejax.inference.evaluation import DeviceBatch, read_context, score_tokens
from sparsejax.layers import Dropout, ExpertsConfig
from sparsejax.metrics import AUXILIARY, EXPERT_LOAD_MAX, EXPERT_LOAD_MIN
from sparsejax.model import Choices, Functional, Losses, Model, Output, Statistics
from sparsejax.runs.optimizer import widen
from sparsejax.runs.state import TrainState
from sparsejax.train.losses import logit_losses
from sparsejax.train.teacher import Distillation, Targets


class Metrics(TypedDict):
    """Metrics of a step.

    Attributes:
      loss: Mean over the scored tokens of the batch, in nats, without auxiliary losses.
      loss_mean: Mean over the scored tokens since the last row of metrics, without steps that diverged.
      grad_norm: Global norm of the gradient before clipping.
      learning_rate: Learning rate of the update.
      skipped: Number of updates skipped so far.
      details: Metrics that depend on the model: each weighted auxiliary loss as `aux/NAME`, and of models with experts
        the largest and smallest number of choices of an expert of any layer, relative to the mean of the layer.
      diverged: Whether the loss diverged, so that the update was skipped.
      stops: Whether the run must stop because of it.
    """

    loss: Float[Array, ""]
    loss_mean: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Int[Array, ""]
    details: dict[str, Float[Array, ""]]
    diverged: Bool[Array, ""]
    stops: Bool[Array, ""]


class Objective(NamedTuple):
    """The objective of a batch and its parts.

    Attributes:
      total: Mean of the loss over the scored tokens, times its weight, plus the auxiliary losses: what is
        differentiated.
      loss: Mean of the loss over the scored tokens, in nats.
      auxiliary: Weighted auxiliary losses by name, means over the tokens of the batch.
      choices: Number of choices per expert.
      statistics: Sums of the mixers over the tokens.
    """

    total: Float[Array, ""]
    loss: Float[Array, ""]
    auxiliary: Losses
    choices: Choices
    statistics: Statistics


def build_step(
    model: Functional,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    mesh: Mesh | AbstractMesh,
    *,
    first: int = 0,
    ends_row: Callable[[Int[Array, ""]], Bool[Array, ""]] | None = None,
    frozen: PyTree[bool] | None = None,
    distillation: Distillation | None = None,
) -> Callable[..., tuple[TrainState[Array], Metrics]]:
    """Compiles the training step, a function of state, batch and, with `distillation`, parameters of the teacher.

    The step donates the buffers of the state.

    If the loss diverges (it or the gradient is not finite, or it is a spike by `config.spike`), the step leaves the
    parameters and the optimizer unchanged and sets the metric `diverged`.

    Args:
      model: The model.
      optimizer: Updates the parameters.
      schedule: Learning rate by update, as a metric.
      config: Microbatches, and what diverges.
      mesh: The mesh.
      first: Number of steps before the phase; the reference of spikes starts there.
      ends_row: Whether a row of metrics follows a step; by default every `config.log_every` steps. A row also follows a
        step that diverged.
      frozen: Whether each parameter keeps its value, without a gradient; by default none does.
      distillation: The losses with a teacher; None without a teacher.
    """
    frozen = jax.tree.map(lambda _: False, model.shapes) if frozen is None else frozen
    differentiate = build_gradient(model, config, mesh, frozen, distillation)
    limit = config.max_skips if config.bad_loss == "skip" else 1
    follows = ends_row or (lambda step: step % config.log_every == 0)

    def step(
        state: TrainState[Array], batch: DeviceBatch, teacher: dict[str, Any] | None = None
    ) -> tuple[TrainState[Array], Metrics]:
        key = jax.random.fold_in(state.key, state.step) if model.config.dropout else None
        objective, gradient = differentiate(state.parameters, batch, key, teacher)
        norm = optax.tree.norm(gradient)
        losses = state.losses.start_phase(state.step == first)
        diverged = ~(jnp.isfinite(objective.total) & jnp.isfinite(norm)) | losses.is_spike(objective.loss, config.spike)
        losses = losses.add(objective.loss, batch["weights"].sum(), config.spike, diverged)
        updates, moments = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = _update_state(model, optax.apply_updates(state.parameters, updates), objective)
        parameters = jax.tree.map(lambda keep, a, b: a if keep else b, frozen, state.parameters, parameters)
        updated = parameters, moments
        current = state.parameters, state.optimizer
        parameters, moments = jax.tree.map(lambda a, b: jnp.where(diverged, a, b.astype(a.dtype)), current, updated)
        after = TrainState(
            step=state.step + 1,
            skipped=state.skipped + diverged,
            losses=losses.start_row(diverged | follows(state.step + 1)),
            key=state.key,
            parameters=parameters,
            optimizer=moments,
        )
        rate = schedule(state.step - state.skipped)
        return after, Metrics(
            loss=objective.loss,
            loss_mean=losses.mean,
            grad_norm=norm,
            learning_rate=jnp.asarray(rate, jnp.float32),
            skipped=after.skipped,
            details=_describe(objective),
            diverged=diverged,
            stops=losses.consecutive_skips >= limit,
        )

    return jax.jit(step, donate_argnums=0)


def _describe(objective: Objective) -> dict[str, Array]:
    """Metrics of the auxiliary losses and of the experts."""
    details = {f"{AUXILIARY}{name}": value for name, value in objective.auxiliary.items()}
    loads = [(x / x.mean(axis=-1, keepdims=True)) for x in jax.tree.leaves(objective.choices)]
    if loads:
        details[EXPERT_LOAD_MAX] = jnp.max(jnp.stack([load.max() for load in loads]))
        details[EXPERT_LOAD_MIN] = jnp.min(jnp.stack([load.min() for load in loads]))
    return details


def _update_state(model: Functional, parameters: dict[str, Any], objective: Objective) -> dict[str, Any]:
    """Updates the state that no gradient trains: of mixers from their sums, of experts from their choices."""
    parameters = jax.tree.map(lambda leaf: leaf, parameters)  # a copy of the dicts
    for name, by_layer in (("mixer", objective.statistics), ("mlp", objective.choices)):
        for part, layers in by_layer.items():
            for index, sums in layers.items():
                config = model.config.layers[getattr(model.config.fold, part)[index]]
                layer = parameters[part][index]
                layer[name] = getattr(config, name).update_state(layer[name], sums)
    return parameters


def build_gradient(
    model: Functional,
    config: TrainConfig,
    mesh: Mesh | AbstractMesh,
    frozen: PyTree[bool],
    distillation: Distillation | None,
) -> Callable[..., tuple[Objective, dict[str, Any]]]:
    """Returns a function to the objective of a batch and its gradient, summed over microbatches that run in sequence.

    The sums do not depend on the number of microbatches. A balance loss over the batch is the product of the choices
    in the batch and of a mean over its tokens: the choices are counted first, by another forward pass.
    """
    constrain, microbatches = sharding.constrain_batch(mesh), config.accumulate
    traced = distillation is not None and bool(distillation.hidden)
    counts_first = microbatches > 1 and any(
        isinstance(layer.mlp, ExpertsConfig) and layer.mlp.balance_weight and layer.mlp.balance == "batch"
        for layer in model.config.layers.values()
    )

    def forward(bound: Model, batch: DeviceBatch, key: Key[Array, ""] | None, choices: Choices | None) -> Output:
        dropout = None if key is None else Dropout(key, model.config.dropout)
        context = read_context(batch).with_extras(dropout=dropout, traced=traced)
        return bound.forward(batch["inputs"], context, constrain, choices)

    def score(
        bound: Model, output: Output, batch: DeviceBatch, teacher: Model | None, targets: Targets | None
    ) -> tuple[Float[Array, ""], Losses]:
        """The loss, and the weighted losses of the logits, summed over the tokens."""

        def score_chunk(
            models: tuple[Model, Model | None], features: Array, labels: Array, weights: Array, others: Array | None
        ) -> dict[str, Array]:
            bound, teacher = models
            logits = bound.logits(features)
            losses = logit_losses(config, logits, labels, weights)
            if distillation is not None and teacher is not None and others is not None:
                losses["kl"] = distillation.divergence(logits, teacher, others) * weights
            return losses

        arrays = output.features, batch["targets"], batch["weights"], None if targets is None else targets.features
        losses = score_tokens(score_chunk, (bound, teacher), arrays, model.config.vocab, mesh, config.loss_chunk)
        sums = {name: x.sum() for name, x in losses.items()}
        return sums.pop("loss"), sums

    def total_loss(
        parameters: dict[str, Any],
        batch: DeviceBatch,
        key: Key[Array, ""] | None,
        choices: Choices | None,
        scale: Float[Array, ""],
        teacher: dict[str, Any] | None,
        targets: Targets | None,
    ) -> tuple[Float[Array, ""], Objective]:
        parameters = jax.tree.map(lambda keep, x: jax.lax.stop_gradient(x) if keep else x, frozen, parameters)
        bound = model.bind(parameters)
        output = forward(bound, batch, key, choices)
        # Auxiliary losses are means over tokens; the scale makes them sums that add up like the loss of the tokens.
        weighted = {name: value * _count_tokens(batch) * scale for name, value in output.losses.items()}
        other = None if distillation is None or teacher is None else distillation.teacher.bind(teacher)
        loss, added = score(bound, output, batch, other, targets)
        weighted |= added
        if distillation is not None and targets is not None:
            weighted |= distillation.losses(bound, output, targets, batch, scale)
        total = sum(weighted.values(), config.loss_weight * loss if config.loss_weight else jnp.zeros(()))
        return total, Objective(total, loss, weighted, output.choices, dict(output.statistics))

    def gradient_of(
        parameters: dict[str, Any],
        batch: DeviceBatch,
        key: Key[Array, ""] | None,
        choices: Choices | None,
        scale: Float[Array, ""],
        teacher: dict[str, Any] | None,
    ) -> tuple[dict[str, Any], Objective]:
        targets = None
        if distillation is not None and teacher is not None:
            targets = distillation.run_teacher(teacher, batch, constrain)
        # Gradients are sums over tokens, which bfloat16 would round.
        return jax.grad(total_loss, has_aux=True)(widen(parameters), batch, key, choices, scale, teacher, targets)

    def differentiate(
        parameters: dict[str, Any],
        batch: DeviceBatch,
        key: Key[Array, ""] | None,
        teacher: dict[str, Any] | None,
    ) -> tuple[Objective, dict[str, Any]]:
        weight = batch["weights"].sum()
        scale = weight / _count_tokens(batch)
        if microbatches == 1:
            gradient, objective = gradient_of(parameters, batch, key, None, scale, teacher)
        else:
            # Adjacent rows go to different microbatches, so that each microbatch is spread over all devices.
            slices = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
            keys = None if key is None else jax.random.split(key, microbatches)
            choices = None
            if counts_first:
                choices = _add_up(
                    lambda slice_, key: forward(model.bind(parameters), slice_, key, None).choices, (slices, keys)
                )
            gradient, objective = _add_up(
                lambda slice_, key: gradient_of(parameters, slice_, key, choices, scale, teacher), (slices, keys)
            )
        divisor = 1 / jnp.maximum(weight, 1)
        gradient, (total, loss, auxiliary) = jax.tree.map(lambda x: x * divisor, (gradient, objective[:3]))
        return objective._replace(total=total, loss=loss, auxiliary=auxiliary), gradient

    return differentiate


def _add_up(function: Callable[..., PyTree], arguments: PyTree) -> PyTree:
    """The sum of `function(*x)` over the leading axis of the arguments, one after another."""
    first = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], arguments))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    sums, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, function(*x)), None), zeros, arguments)
    return sums


def _count_tokens(batch: DeviceBatch) -> Float[Array, ""]:
    """Number of tokens that are no padding, at least 1."""
    mask = read_context(batch).tokens.mask
    return jnp.float32(batch["inputs"].size) if mask is None else jnp.maximum(mask.sum(), 1).astype(jnp.float32)
