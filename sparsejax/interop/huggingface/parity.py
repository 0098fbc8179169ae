"""How near a loaded model comes to what was recorded elsewhere: logits, loss, gradients."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.interop.huggingface.pretrained import Parameters, Pretrained

# A gradient this small beside the largest of the model is compared with that one: it is mostly rounding.
SMALL = 1e-3


def measure(
    model: Pretrained, input_ids: Int[Array, "b t"], labels: Int[Array, "b t"], **masks: Int[Array, "b t"]
) -> tuple[Float[Array, "b t v"], float, dict[str, np.ndarray]]:
    """Logits; the mean cross entropy of each position with its label, where nothing is masked; its gradient by tensor.

    Args:
      model: a loaded model.
      input_ids: token ids.
      labels: of the same positions, not of the next ones.
      **masks: what else the model is called with.
    """
    shown = real(input_ids, **masks)

    def run(parameters: Parameters) -> tuple[Array, Array]:
        logits = model.logits(parameters, input_ids, **masks)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[..., None], axis=-1)[..., 0]
        return jnp.where(shown, losses, 0).sum() / shown.sum(), logits

    (loss, logits), gradient = jax.value_and_grad(run, has_aux=True)(model.parameters)
    return logits, float(loss), model.tensors(gradient)


def real(input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None, **_) -> Bool[Array, "b t"]:
    """The positions whose outputs mean something."""
    return np.ones(np.shape(input_ids), bool) if attention_mask is None else np.asarray(attention_mask, bool)


def largest_difference(found: Array, expected: Array) -> float:
    """The largest absolute difference; infinite if something is no number."""
    error = float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max(initial=0.0))
    return error if np.isfinite(error) else np.inf


def compare_gradients(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each expected tensor the norm of the difference, relative to its own norm."""
    norms = {name: float(np.linalg.norm(tensor)) for name, tensor in expected.items()}
    apart = {name: float(np.linalg.norm(found[name] - tensor)) for name, tensor in expected.items()}
    return _relative(apart, norms)


def compare_norms(found: Mapping[str, np.ndarray], expected: Mapping[str, float]) -> dict[str, float]:
    """For each expected norm of a gradient the difference, relative to it."""
    apart = {name: abs(float(np.linalg.norm(found[name])) - norm) for name, norm in expected.items()}
    return _relative(apart, expected)


def _relative(apart: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    floor = SMALL * max(norms.values(), default=0.0) or 1.0
    errors = {name: apart[name] / (norm + floor) for name, norm in norms.items()}
    return {name: error if np.isfinite(error) else np.inf for name, error in errors.items()}
