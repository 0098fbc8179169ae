"""Optimizers from optax, with warm-up, a schedule, clipping, groups of parameters and averages of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int, PyTree

from sparsejax.config import OPTIMIZERS, OptimizerConfig
from sparsejax.runs.groups import FROZEN, LORA, OTHERS, assign_groups, group_of, map_parameters

MUON_RMS = 0.2  # of the updates of Muon, which is that of AdamW, so that both have one rate (arXiv:2502.16982)


class EmaState(NamedTuple):
    """State of `track_ema`.

    Attributes:
      updates: Number of updates.
      ema: The average, a tree like the parameters.
    """

    updates: Int[Array, ""]
    ema: Any


def build_schedule(config: OptimizerConfig, steps: int, restart: tuple[int, int] | None = None) -> optax.Schedule:
    """Builds the learning rate by update: linear from 0 to the peak, then by `config.schedule`.

    Args:
      config: "cosine", "linear" and "wsd" end at `final_rate` times the peak, "constant" and "inverse_sqrt" ignore it.
      steps: Updates of the run.
      restart: First update and number of updates of another linear warm-up, which multiplies the schedule.
    """
    peak, warmup, last = config.learning_rate, config.warmup, max(steps, config.warmup + 1)
    end = peak if config.schedule == "constant" else peak * config.final_rate
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, last, end)
    elif config.schedule in ("linear", "constant"):
        parts = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, end, last - warmup)
        schedule = optax.join_schedules(parts, [warmup])
    else:
        after = (
            _inverse_sqrt(peak, warmup) if config.schedule == "inverse_sqrt" else _stable_decay(config, warmup, last)
        )
        schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    if restart is None:
        return schedule
    start, count = restart
    ramp = optax.linear_schedule(0.0, 1.0, count)
    return lambda step: schedule(step) * ramp(step - start)


def _inverse_sqrt(peak: float, warmup: int) -> optax.Schedule:
    """The rate by update after the warm-up (arXiv:1706.03762, section 5.3)."""
    first = max(warmup, 1)
    return lambda step: peak * jnp.sqrt(first / (first + jnp.maximum(step, 0)))


def _stable_decay(config: OptimizerConfig, warmup: int, last: int) -> optax.Schedule:
    """The peak, then the decay (arXiv:2404.06395; the shape "sqrt" arXiv:2405.18392), by update after the warm-up."""
    peak, ratio = config.learning_rate, config.final_rate
    count = max(1, min(round(config.option("decay_fraction") * last), last - warmup))
    shapes: dict[str, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, peak * ratio, count),
        "cosine": optax.cosine_decay_schedule(peak, count, ratio),
        "sqrt": lambda step: peak * (1 - (1 - ratio) * jnp.sqrt(jnp.clip(step, 0, count) / count)),
    }
    decay = shapes[config.option("decay_shape")]
    return optax.join_schedules([optax.constant_schedule(peak), decay], [last - warmup - count])


def build_optimizer(
    config: OptimizerConfig,
    steps: int,
    restart: tuple[int, int] | None = None,
    *,
    decay: PyTree[bool],
    axes: PyTree[tuple[str | None, ...]] | None = None,
) -> optax.GradientTransformation:
    """Builds the optimizer `config.name` on gradients that are clipped by their global norm, unless `clip` is None.

    Args:
      config: Hyperparameters.
      steps: As for `build_schedule`.
      restart: As for `build_schedule`.
      decay: Whether weight decay applies, per parameter; see `Functional.decay`.
      axes: Logical axis names per parameter, see `Functional.axes`. Muon updates the parameters that decay, except
        those with an axis "vocab", such as the head.

    Raises:
      InputError: A pattern of `config.freeze` or `config.groups` matches no parameter.
    """
    matrices = decay
    if axes is not None:
        matrices = jax.tree.map(lambda decays, names: decays and "vocab" not in names, decay, axes)
    schedule = build_schedule(config, steps, restart)
    labels = assign_groups(config, decay)
    if labels is None:
        algorithm = _build_algorithm(config, schedule, config.weight_decay, decay, matrices)
    else:
        transforms = {FROZEN: optax.set_to_zero()}
        for label in sorted({*jax.tree.leaves(labels)} - {FROZEN}):
            group = group_of(config, label)
            weight_decay = config.weight_decay if group.weight_decay is None else group.weight_decay
            transforms[label] = _build_algorithm(config, _scale(schedule, group.rate), weight_decay, decay, matrices)
        algorithm = optax.partition(transforms, labels)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    average = () if config.ema is None else (track_ema(config.ema),)
    # The clip has an empty state, so that a run can resume with another bound.
    return _in_float32(optax.chain(clip, algorithm, *average))


def widen(tree: PyTree) -> PyTree:
    """Returns the arrays with those in bfloat16 in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def _in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation whose state, gradients and updates are float32 for parameters in bfloat16.

    `optax.apply_updates` adds an update in float32 and rounds the sum.
    """

    def init(parameters: PyTree) -> PyTree:
        return transform.init(widen(parameters))

    def update(updates: PyTree, state: PyTree, parameters: PyTree) -> tuple[PyTree, PyTree]:
        return transform.update(widen(updates), state, widen(parameters))

    return optax.GradientTransformation(init, update)


def _scale(schedule: optax.Schedule, factor: float) -> optax.Schedule:
    return lambda step: factor * schedule(step)


def _build_algorithm(
    config: OptimizerConfig, schedule: optax.Schedule, weight_decay: float, decay: PyTree[bool], matrices: PyTree[bool]
) -> optax.GradientTransformation:
    """Builds an optimizer without clipping, with decoupled weight decay."""
    options = {name: config.option(name) for name in OPTIMIZERS[config.name]}
    decayed = optax.add_decayed_weights(weight_decay, decay)
    betas, dtype = {"b1": options.get("beta1"), "b2": options.get("beta2")}, jnp.dtype(config.moments)
    if config.name == "lion":
        return optax.lion(schedule, **betas, mu_dtype=dtype, weight_decay=weight_decay, mask=decay)
    if config.name == "adafactor":
        adafactor = optax.adafactor(
            schedule,
            min_dim_size_to_factor=options["min_factored"],
            momentum=options["momentum"] or None,
            dtype_momentum=dtype,
            weight_decay_rate=_scale(schedule, weight_decay),
            weight_decay_mask=decay,
        )
        return _by_layer(adafactor)
    if config.name == "sgd":
        momentum = options["momentum"]
        trace = optax.trace(momentum, options["nesterov"], dtype) if momentum else optax.identity()
        return optax.chain(trace, decayed, optax.scale_by_learning_rate(schedule))
    if config.name == "schedule_free_adamw":
        rms = optax.scale_by_rms(options["beta2"], options["eps"], eps_in_sqrt=False, bias_correction=True)
        adamw = optax.chain(rms, decayed, optax.scale_by_learning_rate(schedule))
        return optax.contrib.schedule_free(adamw, schedule, b1=options["beta1"])
    common = {"mu_dtype": dtype, "weight_decay": weight_decay}
    adamw = optax.adamw(schedule, **betas, eps=options["eps"], mask=decay, **common)
    if config.name == "adamw":
        return adamw
    muon = optax.contrib.muon(
        schedule,
        beta=options["momentum"],
        nesterov=options["nesterov"],
        **common,
        weight_decay_mask=decay,
        # The other axes, of a scanned period, of experts or of heads, stack matrices.
        muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
        consistent_rms=MUON_RMS,
    )
    return optax.partition(
        {"muon": muon, "adamw": adamw}, jax.tree.map(lambda matrix: "muon" if matrix else "adamw", matrices)
    )


def _by_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation to each layer of a scanned period as if the layers were not stacked.

    The transformation must treat every parameter independently of the others.
    """

    def axes_of(parameters: PyTree) -> tuple[PyTree, PyTree] | None:
        """The axes of parameters and of the state over which to map; None if no parameter is stacked."""
        stacked = jax.tree.map_with_path(lambda path, _: path[path[0].key == LORA].key == "period", parameters)
        if not any(jax.tree.leaves(stacked)):
            return None
        axis = jax.tree.map(lambda stacked: 0 if stacked else None, stacked)
        state = jax.eval_shape(transform.init, parameters)
        return axis, map_parameters(lambda _, stacked: 0 if stacked else None, state, stacked, lambda _: None)

    def init(parameters: PyTree) -> PyTree:
        if (axes := axes_of(parameters)) is None:
            return transform.init(parameters)
        axis, state_axis = axes
        return jax.vmap(transform.init, (axis,), state_axis)(parameters)

    def update(updates: PyTree, state: PyTree, parameters: PyTree) -> tuple[PyTree, PyTree]:
        if (axes := axes_of(parameters)) is None:
            return transform.update(updates, state, parameters)
        axis, state_axis = axes
        return jax.vmap(transform.update, (axis, state_axis, axis), (axis, state_axis))(updates, state, parameters)

    return optax.GradientTransformation(init, update)


def track_ema(decay: float) -> optax.GradientTransformation:
    """Tracks the exponential moving average of the parameters after each update, weighted as by a debiased `optax.ema`.

    The average after `n` updates is the sum of the parameters after update `i`, times `decay ** (n - i)`, over the sum
    of these weights.
    """

    def init(parameters: PyTree) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, parameters))

    def update(updates: PyTree, state: EmaState, parameters: PyTree) -> tuple[PyTree, EmaState]:
        count = state.updates + 1
        weight = (1 - decay) / -jnp.expm1(count * math.log(decay)) if decay else 1.0
        ema = optax.incremental_update(optax.apply_updates(parameters, updates), state.ema, weight)
        return updates, EmaState(count, ema)

    return optax.GradientTransformation(init, update)


def find_ema(state: PyTree) -> PyTree | None:
    """Returns the average of `track_ema` in the state of an optimizer; None if it has none."""
    return next((part.ema for part in _find_states(state, EmaState)), None)


def averaged_parameters(state: PyTree, parameters: PyTree) -> PyTree:
    """Returns the parameters to evaluate: the averages of a schedule-free optimizer, else the parameters themselves."""
    for part in _find_states(state, optax.contrib.ScheduleFreeState):
        parameters = jax.tree.map(
            lambda z, leaf, part=part: (
                leaf if _is_masked(z) else optax.contrib.schedule_free_eval_params(part._replace(z=z), leaf)
            ),
            part.z,
            parameters,
            is_leaf=_is_masked,
        )
    return parameters


def is_averaging(state: PyTree) -> bool:
    """Whether `averaged_parameters` differ from the parameters."""
    return bool(_find_states(state, optax.contrib.ScheduleFreeState))


def carry_over(state: PyTree, fresh: PyTree) -> PyTree:
    """Returns `fresh`, the first state of an optimizer, with the statistics of an optimizer with other groups.

    Parameters that both train keep their statistics, and counters keep their values, which are the same in all groups.
    """
    known = {_path_in_group(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    return jax.tree.map_with_path(lambda path, leaf: known.get(_path_in_group(path), leaf), fresh)


def _path_in_group(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path of a leaf of an optimizer's state without the group that `build_optimizer` puts it in."""
    clip_or_algorithm, *inner = path
    names = [getattr(part, "name", getattr(part, "key", "")) for part in inner[:2]]
    in_group = names[:1] == ["inner_states"] and (names[1] == OTHERS or names[1].isdigit())
    return (clip_or_algorithm, *inner[3:]) if in_group else path


def _is_masked(tree: Any) -> bool:
    return isinstance(tree, optax.MaskedNode)


def _find_states(state: PyTree, kind: type) -> list[Any]:
    leaves = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]
