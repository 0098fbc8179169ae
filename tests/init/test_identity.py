"""A run that starts from a model and changes nothing is that model: parameters, loss and first gradient."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import sparsejax
from sparsejax import config as configs
from sparsejax.interop import huggingface
from sparsejax.model import Functional, locate_parameters
from sparsejax.runs import plan_phases, read_arrays
from sparsejax.sharding import single_device_mesh
from sparsejax.train.runtime import set_up
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.init import origins
from tests.interop.reads import track_reads
from tests.train import runs


def first_step(settings, functional, parameters):
    """Loss and norm of the gradient on the first batch of a run, computed without the training loop."""
    [runtime], _ = set_up(plan_phases(settings), [], single_device_mesh())
    batch = jax.tree.map(jnp.asarray, next(runtime.train_batches()))

    def loss(parameters):
        logits = functional.bind(parameters)(batch["inputs"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(parameters)
    return float(value), float(optax.global_norm(gradient))


def assert_starts_from(settings, workdir, functional, parameters):
    runs.train_here(settings, workdir)
    row = read_rows(Workdir(workdir).metrics)[0]
    loss, gradient = first_step(settings, functional, parameters)
    np.testing.assert_allclose(row["train/loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(row["train/grad_norm"], gradient, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "roberta", "longformer", "jamba", "zamba2", "qwen3_next", "mixtral", "kimi_linear"]
)
def test_the_parameters_are_those_of_the_folder(name):
    config = origins.read(f"hf:{origins.GOLDEN / name}")
    model = huggingface.load(origins.GOLDEN / name)
    assert config.model == model.config
    runs.assert_same_bits(origins.load(config), origins.unroll(Functional(model.config), model.parameters))


def test_the_first_step_is_that_of_the_folder(tmp_path):
    settings = configs.load(f"hf:{origins.GOLDEN / 'llama'}", origins.PROBE)
    model = huggingface.load(origins.GOLDEN / "llama")
    assert_starts_from(settings, tmp_path / "run", Functional(model.config), model.parameters)
    record = read_json(Workdir(tmp_path / "run").init)
    assert record["source"] == f"hf:{origins.GOLDEN / 'llama'}"
    assert record["loaded"] == sorted(locate_parameters(Functional(model.config)))
    assert (record["derived"], record["fresh"], record["unused"]) == ({}, [], [])


def test_the_first_step_is_that_of_the_run(workdir, text, tmp_path):
    settings = runs.load(text, {"init.source": f"run:{workdir}", "train.steps": 1})
    model = sparsejax.load(workdir)
    assert_starts_from(settings, tmp_path / "run", Functional(model.config), model.parameters)
    assert read_json(Workdir(tmp_path / "run").init)["source"] == f"run:{workdir}@10"


def test_a_run_is_a_configuration(workdir, text):
    config = origins.read(f"run:{workdir}", {"train.seed": 3})
    recorded = origins.read(str(runs.RECIPE), {"data.files": str(text), "train.steps": 10, "train.seed": 3})
    assert config.model == recorded.model
    assert config.train == recorded.train
    assert config.init.source == f"run:{workdir}"


def test_layers_keep_their_index_in_another_schedule(workdir, text):
    source = sparsejax.load(workdir)
    expected = origins.unroll(Functional(source.config), source.parameters)
    same = {"init.source": f"run:{workdir}@10", "model.scan": False}
    runs.assert_same_bits(origins.load(origins.read(str(runs.RECIPE), same)), expected)
    shorter = origins.load(origins.read(str(runs.RECIPE), same | {"model.schedule": "ssm local ssm"}))
    runs.assert_same_bits(shorter, {path: expected[path] for path in shorter})


def test_the_best_step_and_a_schedule_free_average(text, tmp_path):
    overrides = {"train.steps": 10, "optimizer.name": "schedule_free_adamw", "optimizer.schedule": "constant"}
    runs.train_here(runs.load(text, overrides), tmp_path / "run")
    config = origins.read(str(runs.RECIPE), {"init.source": f"run:{tmp_path / 'run'}@best"})
    model = sparsejax.load(tmp_path / "run", step="best")
    runs.assert_same_bits(origins.load(config), origins.unroll(Functional(model.config), model.parameters))
    arrays = read_arrays(Workdir(tmp_path / "run").checkpoints, model.source.step)
    assert (arrays["parameters.embedding.tokens"] != np.asarray(model.parameters["embedding"]["tokens"])).any()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_becomes_float32(llama, dtype):
    file = llama / "model.safetensors"
    save_file({name: tensor.astype(dtype) for name, tensor in load_file(file).items()}, file)
    loaded = origins.load(origins.read(f"hf:{llama}"))
    assert {leaf.dtype for leaf in loaded.values()} == {np.dtype(np.float32)}
    tokens = load_file(file)["model.embed_tokens.weight"]
    assert (loaded["embedding.tokens"] == tokens.astype(np.float32)).all()


def test_parameters_are_read_one_at_a_time(llama, monkeypatch):
    usage = track_reads(monkeypatch)
    config = origins.read(f"hf:{llama}", {"model.scan": False})
    planned = origins.plan_for(config)
    assert not usage
    planned.load(single_device_mesh(), 0)
    sizes = [tensor.nbytes for tensor in load_file(llama / "model.safetensors").values()]
    assert len(usage) == len(sizes)
    assert max(usage) <= 2 * max(sizes) < sum(sizes) / 3


def test_the_tokenizer_is_that_of_the_source(workdir, text, llama, tmp_path):
    recipe, files = str(runs.RECIPE), {"data.files": str(text)}
    (llama / "tokenizer.json").write_text("{}")
    for source in (f"hf:{llama}", recipe):
        settings = configs.load(source, {"init.source": f"hf:{llama}"})
        assert settings.data.tokenizer == str(llama / "tokenizer.json")
    assert configs.load(recipe, {"init.source": f"hf:{llama}", "data.tokenizer": "chars"}).data.tokenizer == "chars"
    assert configs.load(recipe, files | {"init.source": f"run:{workdir}"}).data.tokenizer == "bytes"
    settings = configs.load(recipe, files | {"data.tokenizer": "bpe:300", "model.vocab": 300, "train.steps": 1})
    runs.train_here(settings, tmp_path / "bpe")
    settings = configs.load(recipe, files | {"model.vocab": 300, "init.source": f"run:{tmp_path / 'bpe'}"})
    assert settings.data.tokenizer == str(tmp_path / "bpe" / "tokenizer.json")
    assert json.loads((tmp_path / "bpe" / "tokenizer.json").read_text())
