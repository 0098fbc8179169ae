"""The optimizer: AdamW with warm-up, a schedule and clipping, from optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from sparsejax.config import OptimizerConfig


def build_schedule(config: OptimizerConfig, steps: int, restart: tuple[int, int] | None = None) -> optax.Schedule:
    """Learning rate by update: linear from 0 to the peak, then to the last of `steps` by `config.schedule`.

    Args:
      config: "cosine" and "linear" end at the `final_rate` share of the peak, "constant" at the peak.
      steps: of the run.
      restart: warms up another time, on top of that: from which update on, and over how many.
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
    config: OptimizerConfig, steps: int, restart: tuple[int, int] | None = None
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) on gradients clipped by their global norm; arguments as of `build_schedule`."""
    adamw = optax.adamw(
        build_schedule(config, steps, restart),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def _decayed(parameters: Any) -> Any:
    """True for the matrices of linear maps; norms, biases, decays and the embedding are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "weight", parameters)
