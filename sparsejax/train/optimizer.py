"""The optimizer: AdamW with warm-up, a schedule and clipping, from optax."""

from __future__ import annotations

import optax
from jaxtyping import PyTree

from sparsejax.config import OptimizerConfig


def build_schedule(config: OptimizerConfig, steps: int, restart: tuple[int, int] | None = None) -> optax.Schedule:
    """Builds the learning rate by update: linear from 0 to the peak, then to its final value by `config.schedule`.

    Args:
      config: "cosine" and "linear" end at `final_rate` times the peak, "constant" ends at the peak.
      steps: Updates of the run.
      restart: First update and number of updates of another linear warm-up, which multiplies the schedule.
    """
    peak, warmup, last = config.learning_rate, config.warmup, max(steps, config.warmup + 1)
    end = peak if config.schedule == "constant" else peak * config.final_rate
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, last, end)
    else:
        parts = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, end, last - warmup)
        schedule = optax.join_schedules(parts, [warmup])
    if restart is None:
        return schedule
    start, count = restart
    ramp = optax.linear_schedule(0.0, 1.0, count)
    return lambda step: schedule(step) * ramp(step - start)


def build_optimizer(
    config: OptimizerConfig, steps: int, restart: tuple[int, int] | None = None, *, decay: PyTree[bool]
) -> optax.GradientTransformation:
    """Builds AdamW (arXiv:1711.05101) on gradients that are clipped by their global norm, unless `config.clip` is None.

    Args:
      config: Hyperparameters.
      steps: As for `build_schedule`.
      restart: As for `build_schedule`.
      decay: Whether weight decay applies, per parameter; see `Functional.decay`.
    """
    adamw = optax.adamw(
        build_schedule(config, steps, restart),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay,
    )
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, adamw)  # both have an empty state, so that a run can resume with another bound
