"""Models of Hugging Face folders equal what transformers computed with them: logits, streams, loss, gradients."""

import collections
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import families

GOLDEN = Path(__file__).parents[1] / "golden"
# Folders of families that cannot be loaded yet wait for them.
FOLDERS = sorted(
    path.parent.name
    for path in GOLDEN.glob("*/config.json")
    if json.loads(path.read_text())["model_type"] in families.FAMILIES
)
EVERY = pytest.mark.parametrize("name", FOLDERS)

# Largest difference of logits and streams, absolute; gradient norms relative to the norm. Reformer's own float32
# rounds scores of -1e5 to 1/128, so its first tokens carry noise.
TOLERANCE = {"jamba": 1e-3, "qwen3_next": 1e-3, "reformer": 2e-2}
LOGITS, GRADIENTS = 5e-4, 2e-3


@functools.cache
def read(name: str) -> tuple[dict, dict, dict]:
    """Inputs, outputs and notes of a folder."""
    inputs, outputs = (dict(np.load(GOLDEN / name / f"{part}.npz")) for part in ("inputs", "outputs"))
    return inputs, outputs, json.loads((GOLDEN / name / "meta.json").read_text())


@functools.cache
def load(name: str) -> huggingface.Pretrained:
    inputs, _, _ = read(name)
    options = {}
    if "lsh_random_rotations" in inputs:
        options["lsh_rotations"] = inputs["lsh_random_rotations"]
    return huggingface.load(GOLDEN / name, **options)


def keywords(name: str) -> dict:
    inputs, _, _ = read(name)
    return {key: inputs[key] for key in ("attention_mask", "global_attention_mask") if key in inputs}


def real(name: str) -> np.ndarray:
    inputs, _, _ = read(name)
    return inputs.get("attention_mask", np.ones_like(inputs["input_ids"])).astype(bool)


def assert_near(name: str, found, expected, what: str):
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    assert error <= TOLERANCE.get(name, LOGITS), f"{name}: {what}: off by {error:.2e}"


@EVERY
def test_logits(name):
    inputs, outputs, _ = read(name)
    logits = load(name)(inputs["input_ids"], **keywords(name))
    assert logits.dtype == jnp.float32
    assert_near(name, logits[real(name)], outputs["logits"][real(name)], "logits")
    if "leftpad_logits" in outputs:
        mask = inputs["leftpad_attention_mask"]
        logits = load(name)(inputs["input_ids"][:1], attention_mask=mask)
        shown = mask.astype(bool)
        assert_near(name, logits[shown], outputs["leftpad_logits"].reshape(logits.shape)[shown], "padded on the left")


@EVERY
def test_streams(name):
    inputs, outputs, _ = read(name)
    model = load(name)
    found = model.streams(inputs["input_ids"], **keywords(name))
    streams = dict(zip(["embeddings_out", *range(len(found) - 2), "final_norm_out"], found, strict=True))
    shown, width = real(name)[0], model.config.width
    for key in (key for key in outputs if key.endswith("_out")):
        stream = streams[key if key in streams else int(key.split("_")[1])]
        if model.config.reversible and key != "final_norm_out":  # two streams, that of attention first
            stream = stream[..., :width] if "attn_stream" in key else stream[..., width:]
        assert_near(name, stream[0][shown], outputs[key][0][shown], key)


# Parameters of transformers' modules that are several tensors of a checkpoint, or are called otherwise there.
IN_MODULES = [
    (r"^backbone\.", "model."),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.\d+\.(gate_proj|w1|w3)\.weight", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.(down_proj|w2)\.weight", ".experts.down_proj"),
    (r"\.[qkv]_conv1d\.", ".conv1d."),
    (r"\.self_attn\.(f_a_proj|f_b_proj|A_log|dt_bias)", r".self_attn.forget_gate.\1"),
]


def norms_by_module(tensors: dict[str, np.ndarray], known: set[str]) -> dict[str, float]:
    """The norm of each parameter of transformers' modules, from the tensors of a checkpoint."""
    squares = collections.defaultdict(float)
    for name, tensor in tensors.items():
        for pattern, text in IN_MODULES:
            name = re.sub(pattern, text, name)
        up = r"\.experts\.\d+\.up_proj\.weight"  # one parameter with the gate, where experts are gated
        joint = re.sub(up, ".experts.gate_up_proj", name)
        name = joint if joint in known else re.sub(up, ".experts.up_proj", name)
        squares[name] += float((tensor.astype(np.float64) ** 2).sum())
    return {name: square**0.5 for name, square in squares.items()}


@EVERY
def test_loss_and_gradients(name):
    inputs, outputs, notes = read(name)
    model, shown = load(name), jnp.asarray(real(name))

    def measure(parameters):
        logits = model.logits(parameters, inputs["input_ids"], **keywords(name))
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), inputs["labels"][..., None], axis=-1)[..., 0]
        return jnp.where(shown, losses, 0).sum() / shown.sum()

    loss, gradient = jax.value_and_grad(measure)(model.parameters)
    assert_near(name, loss, outputs["loss"], "loss")
    if "grad_norms" not in notes:
        return  # the folder of Reformer has none
    found = norms_by_module(model.tensors(gradient), set(notes["grad_norms"]))
    top = max(notes["grad_norms"].values())
    for key, norm in notes["grad_norms"].items():
        assert abs(found[key] - norm) <= GRADIENTS * (norm + 1e-3 * top), (
            f"{name}: gradient of {key}: {found[key]} for {norm}"
        )


@EVERY
def test_saving_and_loading_gives_the_same_tensors(name, tmp_path):
    model = load(name)
    huggingface.save(model, tmp_path / "copy", shard_bytes=20_000)
    again = huggingface.load(tmp_path / "copy")
    assert again.source == model.source
    assert again.dtypes == model.dtypes
    same = jax.tree.map(np.array_equal, model.parameters, again.parameters)
    assert all(jax.tree.leaves(same))
    held = huggingface.pretrained.Checkpoint(GOLDEN / name)
    copied = huggingface.pretrained.Checkpoint(tmp_path / "copy")
    for key in copied.names:
        np.testing.assert_array_equal(copied.read(key), held.read(key), err_msg=key)


def test_bigbird_with_the_random_plans_of_training():
    name = "bigbird_block_sparse"
    inputs, outputs, _ = read(name)
    plans = [inputs[f"train_rand_attn_layer_{i}"] for i in range(3)]
    model = huggingface.load(GOLDEN / name, random_plans=plans)
    logits = model(inputs["input_ids"], **keywords(name))
    shown = real(name)[0]
    assert_near(name, logits[0][shown], outputs["train_logits"][0][shown], "logits")
