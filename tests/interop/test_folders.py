"""Hugging Face folders: errors name the file, key or tensor; valid folders are read one tensor at a time."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsejax.errors import InputError
from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import ConversionError, checkpoint
from sparsejax.loaded import LoadedModel
from tests.interop.reads import track_reads
from tests.messages import rejects
from tests.train import runs

GOLDEN = Path(__file__).parents[1] / "golden"
QUERY = "model.layers.0.self_attn.q_proj.weight"
IDS = np.array([[1, 2, 3, 4]])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a valid folder."""
    return copy("mistral_sliding", tmp_path)


@pytest.fixture(scope="module")
def mistral() -> LoadedModel:
    return huggingface.load(GOLDEN / "mistral_sliding")


def copy(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, folder)
    return folder


def edit_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_rejected(folder: Path, *parts: str, **options) -> None:
    """The error of `load` names the folder, then `parts`."""
    with rejects(ConversionError, parts[0]) as caught:
        huggingface.load(folder, **options)
    assert str(caught.value).startswith(str(folder))
    assert all(part in str(caught.value) for part in parts)


def split(folder: Path) -> Path:
    """Writes the same checkpoint to several files with an index."""
    sharded = folder.with_name("split")
    huggingface.save(huggingface.load(folder), sharded, shard_bytes=5_000)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    return sharded


# Folders


def test_missing_folder(tmp_path):
    with rejects(ConversionError, "none"):
        huggingface.load(tmp_path / "none")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    assert_rejected(folder, "config.json")


@pytest.mark.parametrize(
    "text", ['{"model_type": ', "", "[1, 2]", "null", "{}"], ids=["truncated", "empty", "list", "null", "no keys"]
)
def test_malformed_config(folder, text):
    (folder / "config.json").write_text(text)
    assert_rejected(folder, "config.json")


def test_binary_config(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert_rejected(folder, "config.json")


def test_missing_tensors(folder):
    (folder / "model.safetensors").unlink()
    assert_rejected(folder, "model.safetensors")


@pytest.mark.parametrize("size", [0, 4, 500, -1])
def test_truncated_tensors(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert_rejected(folder, "model.safetensors")


# Keys of config.json

ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}

# Name, changed keys, and the key that the message names; "" for an inconsistency between keys.
INVALID_KEYS = [
    ("type", {"model_type": "llama9"}, "model_type"),
    ("type is a list", {"model_type": ["mistral"]}, "model_type"),
    ("null", {"hidden_size": None}, "hidden_size"),
    ("unknown", {"new_feature": True}, "new_feature"),
    ("quantized", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("activation", {"hidden_act": "mish"}, "hidden_act"),
    ("activation is a list", {"hidden_act": ["silu"]}, "hidden_act"),
    ("window is text", {"sliding_window": "16"}, "sliding_window"),
    ("window is a bool", {"sliding_window": True}, "sliding_window"),
    ("eps is text", {"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ("tied is text", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ("window is 0", {"sliding_window": 0}, ""),
    ("eps is null", {"rms_norm_eps": None}, ""),
    ("eps is 0", {"rms_norm_eps": 0}, "eps"),
    ("width is text", {"hidden_size": "32"}, ""),
    ("depth is 0", {"num_hidden_layers": 0}, ""),
    ("heads is 0", {"num_attention_heads": 0}, ""),
    ("vocab is 0", {"vocab_size": 0}, ""),
    ("heads", {"num_attention_heads": 3}, "heads"),
    ("head width", {"head_dim": 7}, ""),
    ("rope is a number", {"rope_parameters": 5}, ""),
    ("rope is dynamic", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    ("rope type", {"rope_parameters": ROPE | {"rope_type": "fancy"}}, "rope_type"),
    ("rope key", {"rope_parameters": ROPE | {"warp": 1}}, "rope_parameters.warp"),
    ("yarn key", {"rope_parameters": YARN | {"low_freq_factor": 1}}, "rope_parameters.low_freq_factor"),
    ("rope by type", {"rope_parameters": {"full_attention": ROPE}}, "rope_parameters.full_attention"),
    ("yarn without factor", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor"),
    ("yarn factor is text", {"rope_parameters": YARN | {"factor": "4"}}, ""),
    ("yarn betas", {"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 2}}, "fast"),
    ("partial rope", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("rope base", {"rope_parameters": ROPE | {"rope_theta": 0}}, "base"),
]


@pytest.mark.parametrize(("keys", "key"), [case[1:] for case in INVALID_KEYS], ids=[case[0] for case in INVALID_KEYS])
def test_invalid_keys(folder, keys, key):
    edit_config(folder, **keys)
    assert_rejected(folder, "config.json", key)


def test_missing_key(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_rejected(folder, "config.json", "num_hidden_layers")


INVALID_FAMILY_KEYS = [
    ("gemma2", "depth", {"layer_types": ["full_attention"]}),
    ("gemma2", "layer type", {"layer_types": ["odd"] * 4}),
    ("gemma2", "bidirectional", {"use_bidirectional_attention": True}),
    ("gemma3_text", "softcap", {"attn_logit_softcapping": 9.0}),
    ("gemma3_text", "rope without types", {"rope_parameters": ROPE}),
    ("gemma3_text", "truncate", {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}),
    ("longformer", "odd window", {"attention_window": [8, 7, 8, 8]}),
    ("longformer", "depth", {"attention_window": [8]}),
    ("longformer", "positions", {"position_embedding_type": "relative_key"}),
    ("bigbird_block_sparse", "decoder", {"is_decoder": True}),
    ("mamba2", "heads", {"num_heads": 10}),
    ("bamba", "heads", {"mamba_n_heads": 6}),
    ("bamba", "partial rope", {"partial_rotary_factor": 1.0}),
    ("zamba2", "long context", {"use_long_context": True}),
    ("zamba2", "layer type", {"layers_block_type": ["odd"]}),
]


@pytest.mark.parametrize(
    ("name", "keys"),
    [(name, keys) for name, _, keys in INVALID_FAMILY_KEYS],
    ids=[f"{name}-{case}" for name, case, _ in INVALID_FAMILY_KEYS],
)
def test_invalid_keys_of_a_family(tmp_path, name, keys):
    folder = copy(name, tmp_path)
    edit_config(folder, **keys)
    assert_rejected(folder, "config.json", *keys)


def test_all_keys_are_rejected_at_once(tmp_path):
    folder = copy("bamba", tmp_path)
    edit_config(folder, partial_rotary_factor=1.0, first_new_key=1, second_new_key=2)
    assert_rejected(folder, "partial_rotary_factor", "first_new_key, second_new_key")


def test_ignored_keys_are_recorded(folder):
    edit_config(folder, new_key=1, quantization_config={"quant_method": "fp8"})
    model = huggingface.load(folder, ignore=["new_key", "quantization_config"])
    assert model.source.ignored == ("new_key", "quantization_config")
    assert_rejected(folder, "new_key", ignore=["quantization_config"])
    assert_rejected(folder, "fp8", ignore=["new_key"])
    assert_rejected(folder, "other_key", ignore=["other_key"])


# Keys of released files without effect: families, and what `to_dict` writes for every model.
INERT_KEYS = [
    ("gpt_oss", {"initial_context_length": 4096, "experts_per_token": 4, "swiglu_limit": 7.0}),
    ("nemotron_h", {"norm_eps": 1e-5, "rope_theta": 10_000, "partial_rotary_factor": 1.0}),
    ("gemma2", {"sliding_window_size": 4096}),
    (
        "mistral_sliding",
        {
            "add_cross_attention": False, "bad_words_ids": None, "cross_attention_hidden_size": None, "do_sample": True,
            "early_stopping": False, "is_decoder": False, "is_encoder_decoder": False, "max_length": 20,
            "num_beams": 1, "prefix": None, "pruned_heads": {}, "temperature": 0.7, "tf_legacy_loss": False,
            "tie_encoder_decoder": False, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "use_bfloat16": False,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), INERT_KEYS, ids=[name for name, _ in INERT_KEYS])
def test_inert_keys(tmp_path, name, keys):
    path = tmp_path / "config.json"
    config = json.loads((GOLDEN / name / "config.json").read_text())
    path.write_text(json.dumps(keys | config))
    assert huggingface.read_config(path).model == huggingface.read_config(GOLDEN / name).model


def test_a_config_without_weights_is_described_although_they_are_quantized(folder):
    expected = huggingface.describe(folder)
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    assert huggingface.describe(folder) == expected


def test_the_text_model_of_gemma_3(tmp_path):
    text = copy("gemma3_text", tmp_path)
    folder = tmp_path / "multimodal"
    folder.mkdir()
    config = json.loads((text / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": config, "vision_config": {}})
    )
    stored = {f"language_model.{name}": tensor for name, tensor in load_file(text / "model.safetensors").items()}
    save_file(stored | {"vision_tower.a": np.zeros(3, np.float32)}, folder / "model.safetensors")
    ids = np.arange(12).reshape(1, -1)
    np.testing.assert_array_equal(huggingface.load(folder).logits(ids), huggingface.load(text).logits(ids))
    assert huggingface.describe(folder) == huggingface.describe(text)
    edit_config(folder, text_config=config | {"new_key": 1})
    assert_rejected(folder, "text_config: new_key")


def test_minimax_rotates_rotary_dim_channels(tmp_path):
    path = tmp_path / "config.json"
    config = json.loads((GOLDEN / "minimax_text01" / "config.json").read_text())
    width = huggingface.read_config(GOLDEN / "minimax_text01").model.layers["full"].mixer.head_width
    path.write_text(json.dumps(config | {"rotary_dim": width // 2}))
    assert huggingface.read_config(path).model.layers["full"].mixer.rope.width(width) == width // 2


# Tensors


def test_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(QUERY))
    assert_rejected(folder, QUERY)


def test_unknown_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.extra": np.zeros(3, np.float32)}))
    assert_rejected(folder, "model.extra")


@pytest.mark.parametrize("shape", [(32, 31), (32,), (), (2, 32, 32), (0, 32)], ids=str)
def test_wrong_shape(folder, shape):
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: np.zeros(shape, np.float32)}))
    assert_rejected(folder, f"{QUERY} {list(shape)}")


@pytest.mark.parametrize("name", ["mamba2", "modernbert", "gpt_oss", "minimax_text01"])
def test_wrong_shapes_of_any_tensor(tmp_path, name):
    folder = copy(name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    used = huggingface.to_tensors(huggingface.load(folder))
    for key in list(used)[::9]:
        for other in (np.zeros((*tensors[key].shape, 1), np.float32), tensors[key][1:], np.zeros((), np.float32)):
            save_file(tensors | {key: np.asarray(other, order="C")}, folder / "model.safetensors")
            with pytest.raises(ConversionError) as caught:
                huggingface.load(folder)
            assert f"{key} {list(other.shape)}" in caught.value.argument


@pytest.mark.parametrize("dtype", ["float64", "int8", "int64"])
def test_wrong_dtype(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(dtype)}))
    assert_rejected(folder, QUERY)


def test_quantized_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(ml_dtypes.float8_e4m3fn)}))
    assert_rejected(folder, QUERY)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_tensors_are_saved_unchanged(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    model = huggingface.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.parameters)} == {np.dtype("float32")}
    huggingface.save(model, folder.with_name("copy"))
    expected, saved = (load_file(path / "model.safetensors") for path in (folder, folder.with_name("copy")))
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        assert saved[key].dtype == dtype
        assert saved[key].tobytes() == tensor.tobytes()


def test_unused_tensors_are_saved(tmp_path):
    folder = copy("minimax_text01", tmp_path)
    unused = {f"model.layers.0.self_attn.{key}": np.full((), i) for i, key in enumerate(("slope_rate", "key_decay"))}
    edit_tensors(folder, lambda tensors: tensors.update(unused))
    huggingface.save(huggingface.load(folder), folder.with_name("copy"))
    saved = load_file(folder.with_name("copy") / "model.safetensors")
    for key, tensor in unused.items():
        assert (saved[key].dtype, saved[key].shape, saved[key]) == (tensor.dtype, tensor.shape, tensor)


# Shards


def test_missing_shard(folder):
    sharded = split(folder)
    shard = min(sharded.glob("*.safetensors"))
    shard.unlink()
    assert_rejected(sharded, shard.name)


def test_truncated_shard(folder):
    sharded = split(folder)
    shard = min(sharded.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert_rejected(sharded, shard.name)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": {}}, {"weight_map": 3}, {"weight_map": {"a": 3}}],
    ids=["missing", "empty", "number", "values"],
)
def test_malformed_weight_map(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_rejected(folder, "weight_map")


def test_shards_form_a_checkpoint(folder, mistral):
    sharded = huggingface.load(split(folder))
    assert sharded.source.dtypes == mistral.source.dtypes
    jax.tree.map(np.testing.assert_array_equal, sharded.parameters, mistral.parameters)


def test_tensors_are_read_individually(folder, monkeypatch):
    sharded, usage = split(folder), track_reads(monkeypatch)
    model = huggingface.load(sharded)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model.parameters))
    largest = max(tensor.nbytes for tensor in huggingface.to_tensors(model).values())
    assert total > 5 * largest
    assert max(usage) <= 2 * largest


ON_A_MESH = """
import json, jax, numpy as np
from sparsejax import sharding
from sparsejax.config import ShardingConfig
from sparsejax.interop import huggingface
mesh = sharding.make_mesh(ShardingConfig(data=2, fsdp=2, tensor=2))
model, sharded = huggingface.load("{folder}"), huggingface.load("{folder}", mesh=mesh)
jax.tree.map(np.testing.assert_array_equal, model.parameters, sharded.parameters)
leaves = jax.tree.leaves(sharded.parameters)
per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
ids = np.arange(24).reshape(2, 12)
error = float(abs(np.asarray(model.logits(ids)) - np.asarray(sharded.logits(ids))).max())
huggingface.save(sharded, "{copy}")
print(json.dumps([per_device, sum(leaf.nbytes for leaf in leaves), error]))
"""


def test_a_mesh_of_eight_devices(folder):
    sharded, saved = split(folder), folder.with_name("saved")
    program = ("-c", ON_A_MESH.format(folder=sharded, copy=saved))
    code, out, err = runs.finish(runs.start(program=program, devices=8))
    assert code == 0, err
    per_device, size, error = json.loads(out)
    assert per_device < size / 3  # most parameters are sharded four ways
    assert error < 1e-5
    expected, actual = (load_file(path / "model.safetensors") for path in (folder, saved))
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[key], expected[key]) for key in expected)


# Saving


def test_saving_to_an_existing_folder(folder, mistral):
    content = sorted(folder.iterdir())
    with rejects(ConversionError, str(folder)):
        huggingface.save(mistral, folder)
    assert sorted(folder.iterdir()) == content


def test_saving_to_a_full_disk_leaves_nothing_behind(tmp_path, mistral, monkeypatch):
    written = []

    def write_first(tensors, path, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", write_first)
    with rejects(ConversionError, "copy"):
        huggingface.save(mistral, tmp_path / "copy", shard_bytes=5_000)
    assert written
    assert list(tmp_path.iterdir()) == []


def test_saving_below_a_file(tmp_path, mistral):
    (tmp_path / "file").touch()
    with rejects(ConversionError, "file/copy"):
        huggingface.save(mistral, tmp_path / "file" / "copy")


def change_pattern(model: LoadedModel, name: str, pattern: str) -> None:
    layer = model.config.layers[name]
    changed = dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, pattern=pattern))
    model.config = dataclasses.replace(model.config, layers=model.config.layers | {name: changed})


def test_a_changed_config_is_saved_with_a_changed_config_json_only(folder):
    model = huggingface.load(folder)
    before, (name, *_) = model.logits(IDS), model.config.layers
    change_pattern(model, name, "mistral(2)")
    expected = model.logits(IDS)
    assert np.abs(expected - before).max() > 1e-3
    with rejects(ConversionError, f"layers.{name}.mixer.pattern"):
        huggingface.save(model, folder.with_name("copy"))
    assert not folder.with_name("copy").exists()
    model.source.hf_config = model.source.hf_config | {"sliding_window": 2}
    huggingface.save(model, folder.with_name("copy"))
    np.testing.assert_array_equal(huggingface.load(folder.with_name("copy")).logits(IDS), expected)


def test_a_changed_config_json_is_saved_with_a_changed_config_only(folder):
    model = huggingface.load(folder)
    model.source.hf_config = model.source.hf_config | {"rms_norm_eps": 0.5}
    with rejects(ConversionError, "norm.eps"):
        huggingface.save(model, folder.with_name("copy"))


def test_parameters_of_another_shape_are_not_saved(folder):
    model = huggingface.load(folder)
    model.parameters = model.parameters | {"embedding": {"tokens": model.parameters["embedding"]["tokens"][:-1]}}
    with rejects(InputError, "embedding.tokens"):
        huggingface.save(model, folder.with_name("copy"))


def test_a_config_that_depends_on_the_length_cannot_be_changed():
    model = huggingface.load(GOLDEN / "bigbird_block_sparse")
    change_pattern(model, next(iter(model.config.layers)), "full")
    with rejects(InputError, "config"):
        model.logits(np.ones((1, 300), int))


# Arguments


def test_unknown_option():
    with rejects(InputError, "random_plans"):
        huggingface.load(GOLDEN / "mistral_sliding", random_plans=[])


def test_unknown_mask(mistral):
    with rejects(InputError, "global_attention_mask"):
        mistral.logits(IDS, global_attention_mask=np.zeros_like(IDS))


@pytest.mark.parametrize(
    "ids",
    [[[1, 96]], [[-1, 3]], [[[1, 2, 3]]], [[1.0, 2.0]], np.zeros((1, 0), int)],
    ids=["above the vocabulary", "negative", "three axes", "float", "empty"],
)
def test_invalid_ids(mistral, ids):
    with rejects(InputError, "input_ids"):
        mistral.logits(np.asarray(ids))


@pytest.mark.parametrize(
    "mask",
    [[[1, 1, 1]], [1, 1, 1, 1], [[1, 1, 2, 1]], [[0.0, -np.inf, 0.0, 0.0]]],
    ids=["length", "axes", "integers", "additive"],
)
def test_invalid_masks(mistral, mask):
    with rejects(InputError, "attention_mask"):
        mistral.logits(IDS, attention_mask=np.asarray(mask))


@pytest.mark.parametrize(
    "shapes",
    [[(4, 14, 3)], [(4, 14, 2)] * 3, [(2, 14, 3)] * 3, [(14, 3)] * 3],
    ids=["layers", "draws", "heads", "axes"],
)
def test_random_plans_of_other_shapes(shapes):
    plans = [np.zeros(shape, int) for shape in shapes]
    assert_rejected(GOLDEN / "bigbird_block_sparse", "random_plans", random_plans=plans)


def test_random_plans_for_another_length():
    plans = [np.ones((4, 14, 3), int)] * 3
    model = huggingface.load(GOLDEN / "bigbird_block_sparse", random_plans=plans)
    with rejects(InputError, "random_plans"):
        model.logits(np.ones((1, 15 * 16), int))


def test_too_many_tokens():
    model = huggingface.load(GOLDEN / "longformer")
    with rejects(ValueError, "138"):
        model.logits(np.full((1, 139), 3))


def rename(folder: Path, names, **extra: np.ndarray) -> None:
    """Rewrites the tensors of a folder under the names `names(name)`, with `extra` tensors."""
    tensors = {names(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | extra, folder / "model.safetensors")


MASK = np.ones((1, 1, 72, 72), np.float32)
OLDER = {
    "gpt2": [(lambda name: name.removeprefix("transformer."), {"h.0.attn.bias": MASK, "h.1.attn.masked_bias": MASK})],
    "bert": [
        (
            lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ),
            {"bert.pooler.dense.bias": MASK, "cls.seq_relationship.bias": MASK, "bert.embeddings.position_ids": MASK},
        ),
        (lambda name: name.removeprefix("bert."), {"pooler.dense.bias": MASK}),
        (
            lambda name: (
                name.removeprefix("bert.").replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            ),
            {},
        ),
    ],
    "roberta": [(lambda name: name.removeprefix("roberta."), {"pooler.dense.bias": MASK})],
    "mamba": [(lambda name: name.replace("embeddings", "embedding"), {})],
    "llama": [(lambda name: name, {"model.layers.0.self_attn.rotary_emb.inv_freq": MASK})],
}


@pytest.mark.parametrize(("name", "names", "extra"), [(name, *case) for name, cases in OLDER.items() for case in cases])
def test_older_names_of_tensors(name, names, extra, tmp_path):
    folder = copy(name, tmp_path)
    rename(folder, names, **extra)
    model = huggingface.load(folder)
    jax.tree.map(np.testing.assert_array_equal, model.parameters, huggingface.load(GOLDEN / name).parameters)
    huggingface.save(model, tmp_path / "saved")
    original, saved = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert original.keys() == saved.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(saved[key], tensor, err_msg=key)


def test_mixed_names_of_tensors_are_rejected(tmp_path):
    folder = copy("gpt2", tmp_path)
    rename(folder, lambda name: name.removeprefix("transformer.") if "ln_f" in name else name)
    with rejects(ConversionError, "transformer.ln_f.bias"):
        huggingface.load(folder)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_layout_of_the_original_mamba(name, tmp_path):
    folder = copy(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    ssm = {"d_state": config["state_size"], "d_conv": config["conv_kernel"], "expand": config["expand"]}
    if name == "mamba":
        ssm["dt_rank"] = config["time_step_rank"]
    else:
        ssm |= {"layer": "Mamba2", "headdim": config["head_dim"], "ngroups": config["n_groups"]}
    original = {
        "d_model": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "ssm_cfg": ssm | {"conv_bias": config["use_conv_bias"], "bias": config["use_bias"]},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config["tie_word_embeddings"],
    }
    (folder / "config.json").write_text(json.dumps(original))
    rename(folder, lambda name: name.replace("embeddings", "embedding"))
    model, expected = huggingface.load(folder), huggingface.load(GOLDEN / name)
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, model.parameters, expected.parameters)
    huggingface.save(model, tmp_path / "saved")
    assert huggingface.load(tmp_path / "saved").config == model.config
    for key, value in {"attn_layer_idx": [1], "d_intermediate": 64, "ssm_cfg": ssm | {"layer": "Mamba3"}}.items():
        (folder / "config.json").write_text(json.dumps(original | {key: value}))
        with rejects(ConversionError, key):
            huggingface.load(folder)


def test_the_text_model_of_llama_4(tmp_path):
    folder = copy("llama4_text", tmp_path)
    text = json.loads((folder / "config.json").read_text())
    config = {
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rename(folder, lambda name: f"language_model.{name}", **{"vision_model.class_embedding": MASK})
    model, expected = huggingface.load(folder), huggingface.load(GOLDEN / "llama4_text")
    jax.tree.map(np.testing.assert_array_equal, model.parameters, expected.parameters)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("qwen2", "use_mrope", True),
        ("qwen3", "layer_types", ["sliding_attention"] * 3),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "activation_function", "tanh"),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("cohere2", "use_qk_norm", True),
        ("cohere2", "head_dim", 16),
        ("llama4_text", "no_rope_layers", [1]),
        ("llama4_text", "rope_parameters", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0}),
        ("recurrent_gemma", "hidden_activation", "relu"),
        ("recurrent_gemma", "block_types", ["recurrent", "conv"]),
        ("granitemoehybrid", "position_embedding_type", "alibi"),
        ("lfm2", "use_pos_enc", False),
        ("olmo_hybrid", "hidden_act", "gelu"),
    ],
)
def test_unsupported_values_of_the_families(name, key, value, tmp_path):
    folder = copy(name, tmp_path)
    edit_config(folder, **{key: value})
    if key == "rope_scaling":
        edit_config(folder, rope_parameters=None)
    with rejects(ConversionError, "rope_type" if key.startswith("rope") else key):
        huggingface.load(folder)


# MiniMax-M3


def release_minimax_m3(folder):
    """Rewrites the folder of a text model with the keys and the tensor names of the released multimodal files."""
    path = folder / "config.json"
    text = json.loads(path.read_text())
    selects = [int(name == "minimax_m3_sparse") for name in text.pop("layer_types")]
    text["moe_layer_freq"] = [int(name == "sparse") for name in text.pop("mlp_layer_types")]
    names = {"n_heads": "num_index_heads", "head_dim": "index_dim", "block_size": "block_size"}
    names |= {"topk_blocks": "topk_blocks", "local_blocks": "local_block"}
    text["sparse_attention_config"] = {f"sparse_{new}": text.pop(f"index_{old}") for old, new in names.items()} | {
        "use_sparse_attention": True, "sparse_score_type": "max", "sparse_init_block": 0,
        "sparse_attention_freq": selects, "sparse_disable_index_value": selects,
    }  # fmt: skip
    rope = text.pop("rope_parameters")
    text |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")} | {
        "hidden_act": "swigluoai", "use_gemma_norm": True, "use_qk_norm": True, "qk_norm_type": "per_head",
        "attention_output_gate": False, "scoring_func": "sigmoid", "use_routing_bias": True, "swiglu_beta": 1.0,
        "num_mtp_modules": 7, "num_nextn_predict_layers": 1, "model_type": "minimax_m2",
    }  # fmt: skip
    config = {"model_type": "minimax_m3_vl", "vision_config": {"hidden_size": 8}, "image_token_index": 3}
    path.write_text(json.dumps(config | {"text_config": text}))

    def rename(tensors):
        for name, tensor in list(tensors.items()):
            del tensors[name]
            parts = {name: tensor}
            if name.endswith("experts.gate_up_proj"):
                stem = name.removesuffix("gate_up_proj")
                halves = np.split(tensor, 2, axis=1)
                parts = {
                    f"{stem}{i}.{w}.weight": x[i]
                    for w, x in zip(("w1", "w3"), halves, strict=True)
                    for i in range(len(x))
                }
            elif name.endswith("experts.down_proj"):
                parts = {f"{name.removesuffix('down_proj')}{i}.w2.weight": x for i, x in enumerate(tensor)}
            elif name.endswith("gate_up_proj.weight"):
                halves = zip(("gate", "up"), np.split(tensor, 2), strict=True)
                parts = {name.replace("gate_up_proj", f"{part}_proj"): x for part, x in halves}
            for part, x in parts.items():
                part = re.sub(r"\.mlp\.(experts|shared_experts)\.", r".block_sparse_moe.\1.", part)
                part = part.replace(".mlp.gate.e_score", ".block_sparse_moe.e_score")
                part = part.replace(".mlp.gate.", ".block_sparse_moe.gate.").replace(".indexer.", ".index_")
                tensors[f"language_model.{part}"] = np.ascontiguousarray(x)
        tensors["vision_tower.vision_model.pre_layrnorm.weight"] = np.zeros(3, np.float32)
        tensors["patch_merge_mlp.linear_1.bias"] = np.zeros(3, np.float32)

    edit_tensors(folder, rename)


def test_minimax_m3_as_released(tmp_path):
    folder = copy("minimax_m3", tmp_path)
    expected, described = huggingface.load(folder), huggingface.describe(folder)
    release_minimax_m3(folder)
    model = huggingface.load(folder)
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, model.parameters, expected.parameters)
    assert huggingface.describe(folder) == described


@pytest.mark.parametrize(
    ("section", "keys", "named"),
    [
        ("sparse_attention_config", {"sparse_score_type": "mean"}, "sparse_score_type"),
        ("sparse_attention_config", {"sparse_init_block": 1}, "sparse_init_block"),
        ("sparse_attention_config", {"sparse_disable_index_value": [0, 0, 1]}, "sparse_disable_index_value"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("text_config", {"use_gemma_norm": False}, "use_gemma_norm"),
        ("text_config", {"new_key": 1}, "new_key"),
    ],
)
def test_released_minimax_m3_with_keys_that_are_not_supported(tmp_path, section, keys, named):
    folder = copy("minimax_m3", tmp_path)
    release_minimax_m3(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    (text if section == "text_config" else text[section]).update(keys)
    (folder / "config.json").write_text(json.dumps(config))
    assert_rejected(folder, named)


# DeepSeek-V4


def test_deepseek_v4_under_the_names_that_transformers_writes(tmp_path):
    folder = copy("deepseek_v4", tmp_path)
    expected = huggingface.load(folder).parameters

    def rename(tensors):
        for name in list(tensors):
            written = re.sub(r"^layers\.", "model.layers.", name).replace(".attn.kv_norm.", ".attn.norm.")
            tensors[written] = tensors.pop(name)

    edit_tensors(folder, rename)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder).parameters, expected)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"compress_rates": {"compressed_sparse_attention": "4"}}, "compress_rates"),
        ({"layer_types": None, "compress_ratios": [0, 3, 128, 4]}, "compress_ratios"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"hc_mult": 1}, "streams"),
    ],
)
def test_deepseek_v4_with_keys_that_are_not_supported(tmp_path, keys, named):
    folder = copy("deepseek_v4", tmp_path)
    edit_config(folder, **keys)
    assert_rejected(folder, "config.json", named)


def test_a_table_of_experts_that_is_not_of_integers(tmp_path):
    folder = copy("deepseek_v4", tmp_path)
    name = "layers.0.ffn.gate.tid2eid"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float32)}))
    assert_rejected(folder, name, "int64")
