"""Comparison of loaded models with recorded logits, losses and gradients of transformers."""

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
from numpy.typing import ArrayLike

from sparsejax.interop.huggingface.pretrained import load, to_tensors
from sparsejax.loaded import LoadedModel, Parameters

# Absolute tolerances of logits, streams and losses by `model_type`, and the relative tolerance of gradient norms.
# Reformer rounds scores of -1e5 to multiples of 1/128 in float32, so its first tokens are noisy.
TOLERANCES = collections.defaultdict(lambda: 5e-4, {"jamba": 1e-3, "qwen3_next": 1e-3, "reformer": 2e-2})
GRADIENTS = 2e-3
# Gradients whose norm is below this fraction of the largest are mostly rounding, and are compared with that fraction.
NOISE_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True)
class Record:
    """Recorded inputs and outputs of a checkpoint: `inputs.npz`, `outputs.npz` and `meta.json`."""

    folder: Path
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    meta: dict[str, Any]

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Masks with which the model was called."""
        return {key: self.inputs[key] for key in ("attention_mask", "global_attention_mask") if key in self.inputs}

    @property
    def valid(self) -> Bool[np.ndarray, "b t"]:
        """Positions whose outputs are defined."""
        return valid_positions(self.inputs["input_ids"], **self.masks)

    def load(self) -> LoadedModel:
        """Loads the model with the recorded random numbers."""
        if "lsh_random_rotations" in self.inputs:
            return load(self.folder, lsh_rotations=self.inputs["lsh_random_rotations"])
        return load(self.folder)


def read_record(folder: str | Path) -> Record:
    """Reads the record of a folder."""
    folder = Path(folder)
    inputs, outputs = (dict(np.load(folder / f"{part}.npz")) for part in ("inputs", "outputs"))
    return Record(folder, inputs, outputs, json.loads((folder / "meta.json").read_text()))


def measure(
    model: LoadedModel, input_ids: Int[Array, "b t"], labels: Int[Array, "b t"], **masks: Int[Array, "b t"]
) -> tuple[Float[Array, "b t v"], float, dict[str, np.ndarray]]:
    """Returns logits, the mean cross entropy over positions that are not masked, and its gradient by tensor.

    Args:
      model: The model.
      input_ids: Token ids.
      labels: Target of each position; not shifted.
      **masks: Other arguments of the model.
    """
    valid = valid_positions(input_ids, **masks)

    def run(parameters: Parameters) -> tuple[Array, Array]:
        logits = model.logits(input_ids, parameters=parameters, **masks)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[..., None], axis=-1)[..., 0]
        return jnp.where(valid, losses, 0).sum() / valid.sum(), logits

    compiled = jax.jit(jax.value_and_grad(run, has_aux=True))
    (loss, logits), gradient = compiled(model.parameters)
    return logits, float(loss), to_tensors(model, gradient)


def valid_positions(
    input_ids: ArrayLike, attention_mask: ArrayLike | None = None, **_: ArrayLike
) -> Bool[np.ndarray, "b t"]:
    """Returns the positions whose outputs are defined."""
    return np.ones(np.shape(input_ids), bool) if attention_mask is None else np.asarray(attention_mask, bool)


def max_difference(actual: ArrayLike, expected: ArrayLike) -> float:
    """Returns the maximum absolute difference; infinite if a value is not finite."""
    error = float(np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max(initial=0.0))
    return error if np.isfinite(error) else np.inf


def compare_gradients(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the norm of the difference per expected tensor, relative to its norm."""
    norms = {name: float(np.linalg.norm(tensor)) for name, tensor in expected.items()}
    differences = {name: float(np.linalg.norm(actual[name] - tensor)) for name, tensor in expected.items()}
    return _relative(differences, norms)


def compare_norms(actual: Mapping[str, np.ndarray], expected: Mapping[str, float]) -> dict[str, float]:
    """Returns the relative difference of gradient norms per parameter of the module of transformers.

    Args:
      actual: Gradients by tensor of the checkpoint; a parameter may consist of several tensors.
      expected: Norms by parameter.
    """
    squares: dict[str, float] = collections.defaultdict(float)
    for name, tensor in actual.items():
        squares[_name_in_module(name, expected)] += float((tensor.astype(np.float64) ** 2).sum())
    return _relative({name: abs(squares[name] ** 0.5 - norm) for name, norm in expected.items()}, expected)


# Tensors of a checkpoint -> parameters of the modules of transformers, where names differ or tensors are merged.
IN_MODULES = [
    (r"^embed\.weight", "model.embed_tokens.weight"),
    (r"^head\.weight", "lm_head.weight"),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^norm\.", "model.norm."),
    (r"^layers\.", "model.layers."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_sink", ".sinks"),
    (r"\.compressor\.norm\.", ".compressor.kv_norm."),
    (r"\.self_attn\.q_norm\.", ".self_attn.q_a_norm."),
    (r"\.w(q_a|q_b|kv|gate|o_a|o_b)\.", r".\1_proj."),
    (r"\.ape$", ".position_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"^backbone\.", "model."),
    (r"\.router\.layer\.", ".router."),
    (r"\.block_sparse_moe\.input_linear\.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.\d+\.(gate_proj|w1|w3)\.weight", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.(down_proj|w2)\.weight", ".experts.down_proj"),
    (r"\.[qkv]_conv1d\.", ".conv1d."),
    (r"\.attention_layer_norm\.", ".input_layernorm."),
    (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    (r"\.self_attn\.(f_a_proj|f_b_proj|A_log|dt_bias)", r".self_attn.forget_gate.\1"),
]


def _name_in_module(name: str, known: Mapping[str, float]) -> str:
    for pattern, text in IN_MODULES:
        if name in known:
            return name
        name = re.sub(pattern, text, name)
    up = r"\.experts\.\d+\.up_proj\.weight"  # merged with the gate if experts are gated
    joint = re.sub(up, ".experts.gate_up_proj", name)
    return joint if joint in known else re.sub(up, ".experts.up_proj", name)


def _relative(differences: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    floor = NOISE_FLOOR * max(norms.values(), default=0.0) or 1.0
    errors = {name: differences[name] / (norm + floor) for name, norm in norms.items()}
    return {name: error if np.isfinite(error) else np.inf for name, error in errors.items()}
