"""Models of Hugging Face folders agree with transformers in logits, streams, loss and gradients."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import parity
from sparsejax.interop.huggingface.checkpoint import Checkpoint
from sparsejax.layers import EMPTY
from sparsejax.loaded import LoadedModel
from sparsejax.model import Functional

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
ALL = pytest.mark.parametrize("name", FOLDERS)


@functools.cache
def read(name: str) -> parity.Record:
    return parity.read_record(GOLDEN / name)


@functools.cache
def load(name: str) -> LoadedModel:
    return read(name).load()


@functools.cache
def measure(name: str):
    record = read(name)
    return parity.measure(load(name), record.inputs["input_ids"], record.inputs["labels"], **record.masks)


def assert_close(name: str, actual, expected, quantity: str):
    error = parity.max_difference(actual, expected)
    assert error <= parity.TOLERANCES[load(name).source.hf_config["model_type"]], (
        f"{name}: {quantity}: error {error:.2e}"
    )


@ALL
def test_logits(name):
    record = read(name)
    inputs, outputs, valid = record.inputs, record.outputs, record.valid
    logits, _, _ = measure(name)
    assert logits.dtype == jnp.float32
    assert_close(name, logits[valid], outputs["logits"][valid], "logits")
    if "leftpad_logits" in outputs:
        mask = inputs["leftpad_attention_mask"]
        logits = load(name).logits(inputs["input_ids"][:1], attention_mask=mask)
        valid = mask.astype(bool)
        assert_close(name, logits[valid], outputs["leftpad_logits"].reshape(logits.shape)[valid], "left padding")


@ALL
def test_streams(name):
    record, model = read(name), load(name)
    outputs = model.streams(record.inputs["input_ids"], **record.masks)
    streams = dict(zip(["embeddings_out", *range(len(outputs) - 2), "final_norm_out"], outputs, strict=True))
    valid, width = record.valid[0], model.config.width
    for key in (key for key in record.outputs if key.endswith("_out") and key != "hc_head_out"):
        final = {"mixer_out": "final_norm_out"}.get(key, key)  # hyper-connections of Qwen4 end with a mixer
        stream = streams[final if final in streams else int(key.split("_")[1])]
        if model.config.reversible and key != "final_norm_out":  # two streams, that of attention is first
            stream = stream[..., :width] if "attn_stream" in key else stream[..., width:]
        expected = record.outputs[key][0][valid]  # hyper-connections: [t, streams, m]
        assert_close(name, stream[0][valid], expected.reshape(len(expected), -1), key)


@ALL
def test_loss_and_gradients(name):
    record = read(name)
    _, loss, gradients = measure(name)
    assert_close(name, loss, record.outputs["loss"], "loss")
    if "grad_norms" not in record.meta:
        return  # not recorded for Reformer
    for key, error in parity.compare_norms(gradients, record.meta["grad_norms"]).items():
        assert error <= parity.GRADIENTS, f"{name}: gradient norm of {key}: relative error {error:.2e}"


@ALL
def test_saved_tensors_equal_loaded_tensors(name, tmp_path):
    model = load(name)
    huggingface.save(model, tmp_path / "copy", shard_bytes=20_000)
    copy = huggingface.load(tmp_path / "copy")
    assert copy.source.hf_config == model.source.hf_config
    assert copy.source.dtypes == model.source.dtypes
    jax.tree.map(np.testing.assert_array_equal, copy.parameters, model.parameters)
    original, saved = Checkpoint(GOLDEN / name), Checkpoint(tmp_path / "copy")
    for key in saved.names:
        np.testing.assert_array_equal(saved.read(key), original.read(key), err_msg=key)


def test_selected_entries_of_deepseek_v4():
    record, loaded = read("deepseek_v4"), load("deepseek_v4")
    model, ids = Functional(loaded.config).bind(loaded.parameters), jnp.asarray(record.inputs["input_ids"])
    traces = model.forward(ids, EMPTY.with_extras(traced=True)).traces
    for i, layer in enumerate(model.unroll()):
        selection = layer.mixer.select(traces[i].mixer_input)
        assert (selection is None) == (f"selected_layer_{i}" not in record.outputs)
        if selection is not None:
            np.testing.assert_array_equal(selection.groups[:, 0], record.outputs[f"selected_layer_{i}"])


def test_bigbird_with_the_random_plans_of_training():
    name = "bigbird_block_sparse"
    record = read(name)
    plans = [record.inputs[f"train_rand_attn_layer_{i}"] for i in range(3)]
    model = huggingface.load(GOLDEN / name, random_plans=plans)
    logits = model.logits(record.inputs["input_ids"], **record.masks)
    valid = record.valid[0]
    assert_close(name, logits[0][valid], record.outputs["train_logits"][0][valid], "logits")


def test_comparisons_detect_values_that_are_not_finite():
    assert parity.max_difference([1.0, np.nan], [1.0, 2.0]) == np.inf
    assert parity.max_difference([1.0, 2.5], [1.0, 2.0]) == 0.5
    assert parity.compare_norms({"a": np.array([3.0, np.nan])}, {"a": 5.0})["a"] == np.inf
    assert parity.compare_norms({"a": np.array([3.0, 4.5])}, {"a": 5.0})["a"] > 0.05
    assert parity.compare_gradients({"a": np.array([4.0, 3.0])}, {"a": np.array([3.0, 4.0])})["a"] > 0.2


# DeepSeek-V4 selects entries instead of keys, see above.
SELECTING = [
    name for name in FOLDERS if name != "deepseek_v4" and any("selected_layer" in key for key in read(name).outputs)
]


@pytest.mark.parametrize("name", SELECTING)
def test_selections(name):
    """Every indexer selects the groups of the reference, ascending."""
    record, model = read(name), load(name)
    bound = Functional(model.config).bind(model.parameters)

    @jax.jit
    def run(tokens):
        x, context = bound.embed(tokens, EMPTY)
        selections = {}
        for index, layer in enumerate(bound.unroll()):
            x, added = layer(x, context.with_extras(layer=jnp.asarray(index)))
            if added.selection is not None:
                context = context.with_extras(selection=added.selection)
                selections[index] = added.selection
        return selections

    for index, selection in run(jnp.asarray(record.inputs["input_ids"])).items():
        expected = record.outputs[f"selected_layer_{index}"]
        expected = expected if expected.ndim == 4 else expected[:, None]
        groups = np.asarray(selection.groups)
        if groups.shape[-1] != expected.shape[-1]:  # the reference lists keys up to the query
            keys = np.asarray(selection.keys)
            groups = np.where(keys <= np.arange(keys.shape[2])[:, None], keys, -1)
        groups = np.sort(groups)
        padding = [(0, 0)] * 3 + [(groups.shape[-1] - expected.shape[-1], 0)]
        np.testing.assert_array_equal(groups, np.pad(np.sort(expected), padding, constant_values=-1))
