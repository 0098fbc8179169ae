"""Models of Hugging Face folders equal what transformers computed with them: logits, streams, loss, gradients."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import parity

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
EVERY = pytest.mark.parametrize("name", FOLDERS)


@functools.cache
def read(name: str) -> parity.Record:
    return parity.read_record(GOLDEN / name)


@functools.cache
def load(name: str) -> huggingface.Pretrained:
    return read(name).load()


def assert_near(name: str, found, expected, what: str):
    error = parity.largest_difference(found, expected)
    assert error <= parity.TOLERANCES[load(name).source["model_type"]], f"{name}: {what}: off by {error:.2e}"


@EVERY
def test_logits(name):
    record = read(name)
    inputs, outputs, shown = record.inputs, record.outputs, record.shown
    logits = load(name)(inputs["input_ids"], **record.masks)
    assert logits.dtype == jnp.float32
    assert_near(name, logits[shown], outputs["logits"][shown], "logits")
    if "leftpad_logits" in outputs:
        mask = inputs["leftpad_attention_mask"]
        logits = load(name)(inputs["input_ids"][:1], attention_mask=mask)
        shown = mask.astype(bool)
        assert_near(name, logits[shown], outputs["leftpad_logits"].reshape(logits.shape)[shown], "padded on the left")


@EVERY
def test_streams(name):
    record, model = read(name), load(name)
    found = model.streams(record.inputs["input_ids"], **record.masks)
    streams = dict(zip(["embeddings_out", *range(len(found) - 2), "final_norm_out"], found, strict=True))
    shown, width = record.shown[0], model.config.width
    for key in (key for key in record.outputs if key.endswith("_out")):
        stream = streams[key if key in streams else int(key.split("_")[1])]
        if model.config.reversible and key != "final_norm_out":  # two streams, that of attention first
            stream = stream[..., :width] if "attn_stream" in key else stream[..., width:]
        assert_near(name, stream[0][shown], record.outputs[key][0][shown], key)


@EVERY
def test_loss_and_gradients(name):
    record = read(name)
    _, loss, gradients = parity.measure(load(name), record.inputs["input_ids"], record.inputs["labels"], **record.masks)
    assert_near(name, loss, record.outputs["loss"], "loss")
    if "grad_norms" not in record.notes:
        return  # the folder of Reformer has none
    for key, error in parity.compare_norms(gradients, record.notes["grad_norms"]).items():
        assert error <= parity.GRADIENTS, f"{name}: gradient of {key}: off by {error:.2e} of its norm"


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
    record = read(name)
    plans = [record.inputs[f"train_rand_attn_layer_{i}"] for i in range(3)]
    model = huggingface.load(GOLDEN / name, random_plans=plans)
    logits = model(record.inputs["input_ids"], **record.masks)
    shown = record.shown[0]
    assert_near(name, logits[0][shown], record.outputs["train_logits"][0][shown], "logits")


def test_a_number_that_is_none_is_far_away():
    assert parity.largest_difference([1.0, np.nan], [1.0, 2.0]) == np.inf
    assert parity.largest_difference([1.0, 2.5], [1.0, 2.0]) == 0.5
    assert parity.compare_norms({"a": np.array([3.0, np.nan])}, {"a": 5.0})["a"] == np.inf
    assert parity.compare_norms({"a": np.array([3.0, 4.5])}, {"a": 5.0})["a"] > 0.05
    assert parity.compare_gradients({"a": np.array([4.0, 3.0])}, {"a": np.array([3.0, 4.0])})["a"] > 0.2
