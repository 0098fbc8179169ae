"""Exported models load with the same logits; what a family cannot express is refused by the key of the model."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import sparsejax
from sparsejax import config as configs
from sparsejax.cli import main
from sparsejax.data.tokenizers import Bytes, Characters, HuggingFace
from sparsejax.errors import InputError
from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import ConversionError, parity
from sparsejax.interop.huggingface.export import describe_bytes, describe_characters
from sparsejax.interop.huggingface.expression import EXPORTED, choose_family, find_differences
from sparsejax.interop.huggingface.families import FAMILIES, read_model_type
from sparsejax.loaded import LoadedModel, Source
from sparsejax.model import Functional
from tests.messages import check_message, rejects
from tests.train import runs

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json") if path.parent.name != "reformer")
IDS = np.arange(24)[None] % 20 + 3
TEXT = "naïve Ā façade\n\t€ 😀 [MASK] \x00 \u0120"
# A Mistral in words of this project; what `transformers` does not express is overridden in the tests.
MISTRAL = {
    "model.schedule": "2x(local)",
    "model.layers.local.mixer.pattern": "causal & window(7)",
    "model.layers.local.mlp.kind": "gated",
    "model.tied": False,
}


def without_source(model: LoadedModel, length: int) -> LoadedModel:
    """Returns the model without its files, at a length."""
    source = Source(masks=model.source.masks, length=length)
    return LoadedModel(model.source.at_length(model.config, length)[0], model.parameters, source)


@functools.cache
def build(name: str) -> configs.ModelConfig:
    return configs.build(configs.Config, configs.load(f"preset:{name}").to_dict()).model


def change(model: configs.ModelConfig, **fields) -> configs.ModelConfig:
    """Returns a model whose first layer's mixer has other fields."""
    name = model.names[0]
    mixer = dataclasses.replace(model.layers[name].mixer, **fields)
    return dataclasses.replace(
        model, layers=model.layers | {name: dataclasses.replace(model.layers[name], mixer=mixer)}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The workdir of a Mistral that was trained for 4 steps."""
    folder = tmp_path_factory.mktemp("trained")
    text = runs.write_text(folder / "text")
    settings = runs.load(
        text, MISTRAL | {"train.steps": 4, "checkpoint.every": 2, "eval.every": 2, "optimizer.ema": 0.5}
    )
    runs.train_here(settings, folder / "run")
    return folder / "run"


# One configuration per family


def test_every_family_is_exported_or_refused():
    assert set(FAMILIES) - set(EXPORTED) == {"gemma3", "llama4", "mamba_ssm", "minimax_m3_vl", "reformer"}
    assert {read_model_type(json.loads((GOLDEN / name / "config.json").read_text())) for name in FOLDERS} == set(
        EXPORTED
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_the_logits_are_equal_bit_for_bit(name, tmp_path):
    record = parity.read_record(GOLDEN / name)
    original, ids = record.load(), record.inputs["input_ids"][:1]
    family = original.source.hf_config["model_type"]
    model = without_source(original, ids.shape[1])  # which leaves its configuration alone
    assert huggingface.export(model, tmp_path / "out", family=family).family == family
    loaded = huggingface.load(tmp_path / "out")
    masks = {key: mask[:1] for key, mask in record.masks.items()}
    np.testing.assert_array_equal(loaded.logits(ids, **masks), original.logits(ids, **masks))


@pytest.mark.parametrize(
    ("preset", "family"),
    {
        "dense": "qwen3",
        "deepseek_v4:tiny": "deepseek_v4",
        "falcon_h1:tiny": "falcon_h1",
        "gemma3": "gemma3_text",
        "gemma3:tiny": "gemma3_text",
        "gpt_oss_20b:tiny": "gpt_oss",
        "griffin:tiny": "recurrent_gemma",
        "jamba": "jamba",
        "kimi_linear:tiny": "kimi_linear",
        "longformer_base": "longformer",
        "minimax_text_01:tiny": "minimax",
        "mistral_7b": "mistral",
        "nemotron_h": "nemotron_h",
        "qwen3_next:tiny": "qwen3_next",
    }.items(),
)
def test_the_family_of_a_preset_is_found(preset, family):
    assert choose_family(build(preset), 128).family == family


def test_the_logits_of_a_preset_are_equal(tmp_path):
    config = dataclasses.replace(build("griffin:tiny"), scan=False)
    model = LoadedModel(config, Functional(config).init(jax.random.key(0)), Source(length=64))
    sparsejax.export(model, tmp_path / "out")
    np.testing.assert_allclose(huggingface.load(tmp_path / "out").logits(IDS), model.logits(IDS), atol=2e-5)


# Runs


def test_a_run_is_exported(trained, tmp_path, capsys):
    assert main(["export", str(trained), str(tmp_path / "out")]) == 0
    assert "step 4: " in (printed := capsys.readouterr().out)
    assert "mistral, " in printed
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 8
    assert config["dtype"] == "float32"
    assert config["max_position_embeddings"] == 32
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, None)
    model, loaded = sparsejax.load(trained), sparsejax.load(tmp_path / "out")
    np.testing.assert_array_equal(loaded.logits(IDS), model.logits(IDS))
    np.testing.assert_array_equal(loaded.encode(TEXT), model.encode(TEXT))
    assert loaded.generate("sparse", 4, temperature=0).text == model.generate("sparse", 4, temperature=0).text


def test_a_step_and_the_average_are_exported(trained, tmp_path):
    paths = {"step": ["--step=2"], "ema": ["--ema"], "last": []}
    for name, options in paths.items():
        assert main(["export", str(trained), str(tmp_path / name), *options]) == 0
    tensors = {name: load_file(tmp_path / name / "model.safetensors")["lm_head.weight"] for name in paths}
    np.testing.assert_array_equal(tensors["step"].T, sparsejax.load(trained, step=2).parameters["head"]["weight"])
    np.testing.assert_array_equal(tensors["ema"].T, sparsejax.load(trained, ema=True).parameters["head"]["weight"])
    assert not np.array_equal(tensors["ema"], tensors["last"])


def test_low_rank_updates_are_merged(trained, tmp_path):
    text = trained.parent / "text"
    lora = {"optimizer.lora.match": "*.mixer.query.weight", "optimizer.lora.rank": 2, "init.source": f"run:{trained}"}
    settings = runs.load(text, MISTRAL | lora | {"train.steps": 2, "checkpoint.every": 2, "eval.every": 2})
    runs.train_here(settings, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    model, loaded = sparsejax.load(tmp_path / "run"), sparsejax.load(tmp_path / "out")
    np.testing.assert_array_equal(loaded.logits(IDS), model.logits(IDS))
    assert not np.array_equal(loaded.logits(IDS), sparsejax.load(trained).logits(IDS))


def test_bfloat16_in_several_files(trained, tmp_path):
    huggingface.export(sparsejax.load(trained), tmp_path / "out", dtype="bfloat16", shard_bytes=10_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded, model = sparsejax.load(tmp_path / "out"), sparsejax.load(trained)
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), model.parameters)
    jax.tree.map(np.testing.assert_array_equal, restacked(loaded, model), rounded)


def restacked(loaded: LoadedModel, model: LoadedModel):
    return sparsejax.model.restack(loaded.parameters, loaded.config, model.config)


def test_a_model_that_started_from_a_folder_keeps_its_config(tmp_path):
    model = huggingface.load(GOLDEN / "qwen2")
    huggingface.export(model, tmp_path / "same")
    original, written = (json.loads((f / "config.json").read_text()) for f in (GOLDEN / "qwen2", tmp_path / "same"))
    assert original.items() <= written.items()
    model.config = dataclasses.replace(
        model.config, layers={name: change(model.config, pattern="causal").layers[name] for name in model.config.layers}
    )
    assert huggingface.export(model, tmp_path / "changed").family == "qwen2"


def test_tokenizers_encode_equally():
    files = {Bytes(): describe_bytes(is_masked=True), Characters(): describe_characters()}
    for tokenizer, description in files.items():
        text = "the quick brown fox" if isinstance(tokenizer, Characters) else TEXT
        exported = HuggingFace("tokenizer.json", json.dumps(description).encode())
        ids = exported.encode(text.encode())
        np.testing.assert_array_equal(ids, tokenizer.encode(text.encode()))
        assert exported.decode(ids) == tokenizer.decode(ids) == text
        assert exported.mask == tokenizer.mask or isinstance(tokenizer, Characters)


# Refusals


def test_an_existing_folder(trained, tmp_path, capsys):
    assert main(["export", str(trained), str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    with rejects(ConversionError, "exists already"):
        huggingface.export(sparsejax.load(trained), tmp_path)


def test_a_failed_write_leaves_no_folder(trained, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface.checkpoint, "save_file", fail)
    with rejects(ConversionError, "cannot be written"):
        huggingface.export(sparsejax.load(trained), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("preset", "family", "key"),
    [
        ("window", None, "model.layers.local.mixer.pattern"),
        ("window", "mistral", "model.layers.local.mixer.pattern"),
        ("quickstart", None, "model.layers.ssm.mixer"),
        ("samba:tiny", "jamba", "model.layers.ssm.mixer.norm_eps"),
        ("bigbird_base:tiny", "big_bird", "model.layers.layer0.mixer.pattern"),
        ("griffin", None, "model.embedding.scale"),
        ("mistral_7b:tiny", "mamba", "model.layers.local.mixer"),
        ("mistral_7b:tiny", "gemma2", "model.norm.offset"),
        ("llama4:tiny", None, "model.layers.local.mixer.rope.interleaved"),
        ("mistral_7b:tiny", "reformer", "family"),
        ("mistral_7b:tiny", "misstral", "family"),
    ],
)
def test_what_no_family_expresses_is_refused_by_its_key(preset, family, key):
    with rejects(InputError, key) as caught:
        choose_family(build(preset), 128, family)
    assert caught.value.argument == key


@pytest.mark.parametrize(
    ("field", "value"),
    [("alibi", True), ("sinks", True), ("gate", True), ("relative", 4), ("growth", 0.1), ("softcap", 20.0)],
)
def test_each_option_of_attention_is_refused(field, value):
    model = change(build("mistral_7b:tiny"), **{field: value} | ({"rope": None} if field == "alibi" else {}))
    with pytest.raises(InputError) as caught:
        choose_family(model, 128, "mistral")
    assert caught.value.argument.startswith("model.layers.local.mixer")


def test_a_model_of_a_probe_has_no_tokenizer(tmp_path):
    config = dataclasses.replace(build("mistral_7b:tiny"), scan=False)
    model = LoadedModel(config, Functional(config).init(jax.random.key(0)))
    assert huggingface.export(model, tmp_path / "out").files == ()


# Comparison


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("mistral(32)", "causal & window(31)", True),
        ("causal & (window(9) | sink(1))", "causal", False),
        ("causal & window(5000) | sink(1)", "causal", False),
        ("bigbird(64, 3, seed=0)", "full", False),
        ("causal & chunk(16)", "mistral(16)", False),
    ],
)
def test_patterns_are_compared_by_their_keys(first, second, equal):
    model = dataclasses.replace(build("mistral_7b:tiny"), causal=False)
    differences = list(find_differences(change(model, pattern=first), change(model, pattern=second)))
    assert [path for path, *_ in differences] == ([] if equal else ["layers.local.mixer.pattern"])


def test_names_of_layers_and_values_without_effect_are_free():
    model = build("mistral_7b:tiny")
    other = dataclasses.replace(
        change(model, scale=model.layers["local"].mixer.head_width ** -0.5, impl="dense"),
        dtype="bfloat16",
        scan=False,
        dropout=0.1,
    )
    other = dataclasses.replace(other, layers={"window": other.layers["local"]}, schedule="4x(window)")
    assert list(find_differences(model, other)) == []


def test_the_message_of_the_command_line(tmp_path, trained, capsys):
    assert main(["export", str(trained), str(tmp_path / "out"), "--family=llama"]) == 2
    check_message(capsys.readouterr().err.strip())
