"""Errors about the start from weights: one line each, which names the key or the parameter."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsejax import config as configs
from sparsejax.cli import USAGE_ERROR, main
from sparsejax.config import ConfigError
from sparsejax.errors import InputError
from sparsejax.sharding import single_device_mesh
from tests.init import origins
from tests.init.origins import MIXER
from tests.messages import check_message, rejects
from tests.train import runs

LLAMA = f"hf:{origins.GOLDEN / 'llama'}"


@pytest.mark.parametrize("source", ["hf:none", "hf:", "hf:messages.txt", "run:none", "run:llama"])
def test_a_configuration_of_no_model(source, monkeypatch):
    monkeypatch.chdir(origins.GOLDEN)
    with pytest.raises(ConfigError) as caught:
        configs.load(source)
    check_message(str(caught.value).replace(str(origins.GOLDEN), "GOLDEN"))


def test_a_folder_that_is_a_workdir(workdir):
    with rejects(ConfigError, f"run:{workdir}") as caught:
        configs.load(f"hf:{workdir}")
    assert caught.value.argument == "config"


@pytest.mark.parametrize(
    ("source", "argument"),
    [
        ("hf:none", "init.source"),
        ("run:none", "init.source"),
        ("run:{workdir}@7", "init.source"),
        ("hf:{workdir}", "model_type"),
        ("run:{llama}", "init.source"),
    ],
)
def test_a_source_that_is_no_model(source, argument, workdir, llama):
    source = source.format(workdir=workdir, llama=llama)
    config = origins.read(str(runs.RECIPE), {"init.source": source})
    with pytest.raises(InputError) as caught:
        origins.plan_for(config)
    assert argument in caught.value.argument
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "init",
    [
        {"source": "folder"},
        {"source": "run:folder@first"},
        {"fresh": "embedding.*"},
        {"rules": "merge_heads"},
        {"source": "hf:folder", "freshly": ""},
    ],
)
def test_an_invalid_section(init):
    with rejects(ConfigError, "init."):
        origins.read(str(runs.RECIPE), {f"init.{key}": value for key, value in init.items()})


@pytest.mark.parametrize(
    ("overrides", "argument"),
    [
        ({"model.layers.full.mlp.width": 64}, "layers.0.mlp.down.weight"),
        ({f"{MIXER}.heads": 8}, "layers.0.mixer.key.weight"),
        ({f"{MIXER}.kv_heads": 4, f"{MIXER}.bias": True}, "layers.0.mixer.key.bias"),
        ({f"{MIXER}.kind": "lightning"}, "layers.0.mixer.gate.weight"),
        ({f"{MIXER}.kind": "lightning", f"{MIXER}.heads": 2, "init.fresh": "*.gate.*"}, "layers.0.mixer.key.weight"),
        ({f"{MIXER}.kv_heads": 1, "init.rules": "none"}, "layers.0.mixer.key.weight"),
        ({"model.schedule": "4x(full)"}, "layers.3.mixer.key.weight"),
        ({"model.vocab": 60, "data.tokenizer": "chars"}, "embedding.tokens"),
        ({"model.embedding.positions": 128}, "embedding.positions"),
        ({"init.fresh": "layers.0.mixer.gate.*"}, "init.fresh"),
        ({"init.fresh": "embedding.*, "}, None),
        ({"init.rules": "merge_head"}, "init.rules"),
        ({"init.rules": "merge_heads"}, "init.rules"),
    ],
)
def test_a_parameter_without_an_origin(overrides, argument):
    config = origins.read(LLAMA, overrides)
    if argument is None:
        assert origins.plan_for(config).fresh == ("embedding.tokens",)
        return
    with pytest.raises(InputError) as caught:
        origins.plan_for(config)
    message = str(caught.value)
    assert message.startswith("init.")
    assert argument in message
    check_message(message.replace(str(origins.GOLDEN), "GOLDEN"))


def test_the_suggested_patterns_suffice():
    overrides = {f"{MIXER}.kind": "lightning"}
    with pytest.raises(InputError) as caught:
        origins.plan_for(origins.read(LLAMA, overrides))
    pattern = str(caught.value).rpartition("init.fresh = ")[2].strip("'")
    assert len(origins.plan_for(origins.read(LLAMA, overrides | {"init.fresh": pattern})).fresh) == 3


def test_a_layer_to_copy_that_does_not_exist():
    with rejects(ConfigError, "model.layers.local"):
        configs.load(LLAMA, {"model.layers.local": "ful"})


def test_a_layer_that_an_evaluation_adds():
    with rejects(ConfigError, "eval.also.near.model.layers.near"):
        configs.load(LLAMA, {"eval.also.near.model.layers.near": "full"})
    added = {"model.layers.near": "full", "model.layers.near.mixer.pattern": "causal & window(3)"}
    config = configs.load(LLAMA, added | {"eval.also.near.model.schedule": "3x(near)"})
    assert configs.check(config).model.schedule == "3x(full)"
    assert configs.check_evaluation(config, "near").model.schedule == "3x(near)"


def test_a_tensor_of_a_wrong_shape(llama, tmp_path, capsys):
    file = llama / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": np.ones(3, np.float32)}, file)
    with rejects(InputError, "model.norm.weight"):
        origins.plan_for(origins.read(f"hf:{llama}")).load(single_device_mesh(), 0)
    overrides = [f"--config.{key}={value}" for key, value in origins.PROBE.items()]
    workdir = tmp_path / "run"
    assert main(["train", f"--config=hf:{llama}", *overrides, f"--workdir={workdir}"]) == USAGE_ERROR
    assert "model.norm.weight" in capsys.readouterr().err
    assert not (workdir / "config.json").exists()  # the run has not begun


def test_a_missing_tensor(llama):
    file = llama / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with rejects(InputError, "model.norm.weight"):
        origins.plan_for(origins.read(f"hf:{llama}"))


def test_another_source_is_another_run(llama, tmp_path):
    settings = configs.load(f"hf:{llama}", origins.PROBE)
    runs.train_here(settings, tmp_path / "run")
    other = configs.load(LLAMA, origins.PROBE)
    with pytest.raises(ConfigError) as caught:
        runs.train_here(other, tmp_path / "run")
    assert "init.source was" in str(caught.value)


def test_a_folder_of_an_unknown_family(llama):
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "spiral"}))
    with rejects(InputError, "model_type"):
        configs.load(f"hf:{llama}")
