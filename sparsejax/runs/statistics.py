"""Statistics of the loss: its mean between two rows of metrics, and the reference of spikes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SPIKE_DECAY = 0.99  # per step, of the weight of a loss in the reference of spikes


class LossStatistics(NamedTuple):
    """The part of a run's state that depends on its losses; scalars, or their shapes or shardings.

    Attributes:
      row_loss: Sum of the losses of all scored tokens since the last row of metrics, in nats, float32.
      row_weight: Sum of the weights of these tokens, float32.
      reference_loss: Sum of the losses of the phase, weighted by powers of `SPIKE_DECAY`, float32.
      reference_weight: Sum of these weights, float32.
      consecutive_skips: Number of updates skipped since the last one that was applied, int32.
    """

    row_loss: Any
    row_weight: Any
    reference_loss: Any
    reference_weight: Any
    consecutive_skips: Any

    @property
    def mean(self) -> Float[Array, ""]:
        """Mean loss per scored token since the last row of metrics; NaN without a scored token."""
        return self.row_loss / self.row_weight

    def is_spike(self, loss: Float[Array, ""], threshold: float) -> Bool[Array, ""]:
        """Whether a loss exceeds `threshold` times the mean of the phase; never for the first loss, or threshold 0."""
        return (self.reference_weight > 0) & (threshold > 0) & (loss > threshold * self._reference)

    def add(
        self, loss: Float[Array, ""], weight: Float[Array, ""], threshold: float, diverged: Bool[Array, ""]
    ) -> LossStatistics:
        """Adds a step with the mean `loss` over tokens of total `weight`.

        A step that diverged does not count in the mean. In the reference a spike counts as the threshold, so that the
        reference follows a loss that stays higher, and a loss that is not finite does not count.
        """
        bounded = jnp.where(self.is_spike(loss, threshold), threshold * self._reference, loss)
        finite = jnp.isfinite(loss)

        def follow(total: Array, value: Array | float) -> Array:
            return jnp.where(finite, SPIKE_DECAY * total + (1 - SPIKE_DECAY) * value, total)

        return LossStatistics(
            row_loss=self.row_loss + jnp.where(diverged, 0.0, loss * weight),
            row_weight=self.row_weight + jnp.where(diverged, 0.0, weight),
            reference_loss=follow(self.reference_loss, bounded),
            reference_weight=follow(self.reference_weight, 1.0),
            consecutive_skips=jnp.where(diverged, self.consecutive_skips + 1, 0),
        )

    def start_row(self, condition: Bool[Array, ""]) -> LossStatistics:
        """Empties the sums of the row where `condition` holds."""
        return self._replace(
            row_loss=jnp.where(condition, 0.0, self.row_loss), row_weight=jnp.where(condition, 0.0, self.row_weight)
        )

    def start_phase(self, condition: Bool[Array, ""]) -> LossStatistics:
        """Forgets the losses of the previous phase where `condition` holds."""
        return self._replace(
            reference_loss=jnp.where(condition, 0.0, self.reference_loss),
            reference_weight=jnp.where(condition, 0.0, self.reference_weight),
        )

    @property
    def _reference(self) -> Float[Array, ""]:
        return self.reference_loss / jnp.where(self.reference_weight > 0, self.reference_weight, 1.0)


def init_losses() -> LossStatistics:
    """Returns the statistics before the first step."""
    zero = jnp.zeros(())
    return LossStatistics(zero, zero, zero, zero, jnp.zeros((), jnp.int32))
