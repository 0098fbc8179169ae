"""The optimizer: AdamW with warm-up, cosine decay and clipping, from optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from sparsejax.config import OptimizerConfig


def build_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update: linear from 0 to the peak, then a cosine down to its `final_rate` share."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=max(steps, config.warmup + 1),
        end_value=config.learning_rate * config.final_rate,
    )


def build_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) on gradients clipped by their global norm."""
    adamw = optax.adamw(
        build_schedule(config, steps),
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
