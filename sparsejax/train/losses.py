"""Losses of the logits of single tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.config import TrainConfig
from sparsejax.inference.evaluation import token_losses


def logit_losses(
    config: TrainConfig, logits: Float[Array, "b t v"], targets: Int[Array, "b t"], weights: Float[Array, "b t"]
) -> dict[str, Float[Array, "b t"]]:
    """Returns the loss of each token as `loss`, and its auxiliary losses with their weights, by name."""
    losses = {"loss": token_losses(logits, targets, weights)}
    if config.z_loss:
        losses["z_loss"] = config.z_loss * z_loss(logits) * weights
    if config.label_smoothing:
        factor = config.loss_weight * config.label_smoothing
        losses["label_smoothing"] = factor * label_smoothing(logits, targets) * weights
    return losses


def z_loss(logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """Returns the squared logarithm of the normalizer of the softmax of each token (PaLM, arXiv:2204.02311)."""
    return jax.nn.logsumexp(logits, axis=-1) ** 2


def label_smoothing(logits: Float[Array, "*n v"], targets: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the cross entropy with the uniform distribution minus that with the target, in nats per token.

    The loss plus `a` times this is the cross entropy with targets that `optax.smooth_labels` smooths by `a`
    (arXiv:1512.00567, section 7).
    """
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - logits.mean(axis=-1)
