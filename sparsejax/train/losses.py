"""Auxiliary losses of the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def z_loss(logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """Returns the squared logarithm of the normalizer of the softmax of each token (PaLM, arXiv:2204.02311)."""
    return jax.nn.logsumexp(logits, axis=-1) ** 2


def label_smoothing(logits: Float[Array, "*n v"], targets: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the cross entropy with the uniform distribution minus that with the target, in nats per token.

    The loss plus `a` times this is the cross entropy with targets that `optax.smooth_labels` smooths by `a`
    (arXiv:1512.00567, section 7).
    """
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - logits.mean(axis=-1)
