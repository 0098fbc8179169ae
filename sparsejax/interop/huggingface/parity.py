"""How near a loaded model comes to what was recorded elsewhere: logits, loss, gradients."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.interop.huggingface.pretrained import Parameters, Pretrained, load

# Largest difference of logits, streams and the loss, by `model_type`; of a gradient's norm, relative to it.
# Reformer's own float32 rounds scores of -1e5 to 1/128, so its first tokens carry noise.
TOLERANCES = collections.defaultdict(lambda: 5e-4, {"jamba": 1e-3, "qwen3_next": 1e-3, "reformer": 2e-2})
GRADIENTS = 2e-3
# A gradient this small beside the largest of the model is compared with that one: it is mostly rounding.
SMALL = 1e-3


@dataclasses.dataclass(frozen=True)
class Record:
    """What was recorded beside a checkpoint: `inputs.npz`, `outputs.npz` and `meta.json`."""

    folder: Path
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    notes: dict[str, Any]

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """What the model was called with beside the token ids."""
        return {key: self.inputs[key] for key in ("attention_mask", "global_attention_mask") if key in self.inputs}

    @property
    def shown(self) -> Bool[np.ndarray, "b t"]:
        """The positions whose outputs mean something."""
        return real(self.inputs["input_ids"], **self.masks)

    def load(self) -> Pretrained:
        """The model, with the random numbers that the other one drew."""
        rotations = self.inputs.get("lsh_random_rotations")
        return load(self.folder, **({} if rotations is None else {"lsh_rotations": rotations}))


def read_record(folder: str | Path) -> Record:
    """The record of a folder."""
    folder = Path(folder)
    inputs, outputs = (dict(np.load(folder / f"{part}.npz")) for part in ("inputs", "outputs"))
    return Record(folder, inputs, outputs, json.loads((folder / "meta.json").read_text()))


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
    """For each norm of a gradient by the parameter of transformers' module the difference, relative to it.

    `found` are tensors of a checkpoint, which may be parts of such a parameter.
    """
    squares: dict[str, float] = collections.defaultdict(float)
    for name, tensor in found.items():
        squares[_name_in_module(name, expected)] += float((tensor.astype(np.float64) ** 2).sum())
    return _relative({name: abs(squares[name] ** 0.5 - norm) for name, norm in expected.items()}, expected)


# Parameters of transformers' modules that are several tensors of a checkpoint, or are called otherwise there.
IN_MODULES = [
    (r"^backbone\.", "model."),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.\d+\.(gate_proj|w1|w3)\.weight", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.(down_proj|w2)\.weight", ".experts.down_proj"),
    (r"\.[qkv]_conv1d\.", ".conv1d."),
    (r"\.self_attn\.(f_a_proj|f_b_proj|A_log|dt_bias)", r".self_attn.forget_gate.\1"),
]


def _name_in_module(name: str, known: Mapping[str, float]) -> str:
    if name in known:
        return name
    for pattern, text in IN_MODULES:
        name = re.sub(pattern, text, name)
    up = r"\.experts\.\d+\.up_proj\.weight"  # one parameter with the gate, where experts are gated
    joint = re.sub(up, ".experts.gate_up_proj", name)
    return joint if joint in known else re.sub(up, ".experts.up_proj", name)


def _relative(apart: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    floor = SMALL * max(norms.values(), default=0.0) or 1.0
    errors = {name: apart[name] / (norm + floor) for name, norm in norms.items()}
    return {name: error if np.isfinite(error) else np.inf for name, error in errors.items()}
