"""Folders that cannot be used are refused in one line that names the place; the others are read piece by piece."""

import json
import shutil
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import CheckpointError, checkpoint
from sparsejax.interop.huggingface.checkpoint import Checkpoint
from tests.train import runs

GOLDEN = Path(__file__).parents[1] / "golden"
QUERY = "model.layers.0.self_attn.q_proj.weight"
IDS = np.array([[1, 2, 3, 4]])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a good one, of Mistral."""
    return copy("mistral_sliding", tmp_path)


@pytest.fixture(scope="module")
def mistral() -> huggingface.Pretrained:
    return huggingface.load(GOLDEN / "mistral_sliding")


def copy(name: str, tmp_path: Path) -> Path:
    place = tmp_path / name
    place.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, place)
    return place


def edit_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, **options) -> str:
    """Why `load` refuses: one line that begins with the place."""
    with pytest.raises(CheckpointError) as caught:
        huggingface.load(folder, **options)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message.removeprefix(str(folder))


def split(folder: Path) -> Path:
    """The same checkpoint, beside it, in many files and an index."""
    place = folder.with_name("split")
    huggingface.save(huggingface.load(folder), place, shard_bytes=5_000)
    assert len(list(place.glob("*.safetensors"))) > 3
    return place


# What is wrong with the folder


def test_there_is_no_folder(tmp_path):
    assert refusal(tmp_path / "none") == ": No such file or directory"


def test_there_is_no_config(folder):
    (folder / "config.json").unlink()
    assert refusal(folder) == "/config.json: No such file or directory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": ', "not JSON: Expecting value"),
        ("", "not JSON: Expecting value"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ("{}", "model_type: None is not supported; there are bamba, "),
    ],
)
def test_the_config_is_something_else(folder, text, message):
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"/config.json: {message}")


def test_the_config_is_not_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert refusal(folder).startswith("/config.json: not JSON: 'utf-8' codec can't decode")


def test_there_are_no_tensors(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == ": neither model.safetensors nor model.safetensors.index.json"


@pytest.mark.parametrize("size", [0, 4, 500, -1])
def test_the_tensors_are_cut_off(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(folder).startswith("/model.safetensors: ")


# What is wrong with a key of config.json

ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "llama9"}, "model_type: 'llama9' is not supported; there are bamba, "),
        ({"model_type": ["mistral"]}, "model_type: ['mistral'] is not supported; there are bamba, "),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"new_feature": True}, "new_feature: unknown key, so the model cannot be loaded exactly"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: unknown key"),
        ({"hidden_act": "mish"}, "hidden_act: 'mish' is not supported; only 'silu', "),
        ({"hidden_act": ["silu"]}, "hidden_act: ['silu'] is not supported; only 'silu', "),
        ({"sliding_window": "16"}, "sliding_window: expected a number, got '16'"),
        ({"sliding_window": True}, "sliding_window: expected a number, got True"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps: expected a number, got 'tiny'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, got 'no'"),
        ({"sliding_window": 0}, ""),
        ({"rms_norm_eps": None}, ""),
        ({"rms_norm_eps": 0}, "eps must be above 0"),
        ({"hidden_size": "32"}, ""),
        ({"num_hidden_layers": 0}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"vocab_size": 0}, ""),
        ({"num_attention_heads": 3}, "heads = 3 is not divisible by kv_heads = 2"),
        ({"head_dim": 7}, "rotary positions turn pairs; 1 of head_width = 7 is 7"),
        ({"rope_parameters": 5}, ""),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' is not supported"),
        ({"rope_parameters": ROPE | {"rope_type": "fancy"}}, "rope_type: 'fancy' is not supported; only default, "),
        ({"rope_parameters": ROPE | {"warp": 1}}, "rope_parameters.warp: not known for rope_type 'default'"),
        (
            {"rope_parameters": YARN | {"low_freq_factor": 1}},
            "rope_parameters.low_freq_factor: not known for rope_type",
        ),
        ({"rope_parameters": {"full_attention": ROPE}}, "rope_parameters.full_attention: not known for rope_type"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor: missing for rope_type 'yarn'"),
        ({"rope_parameters": YARN | {"factor": "4"}}, ""),
        ({"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 2}}, "fast must be above slow, got 1 and 2"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 is not supported"),
        ({"rope_parameters": ROPE | {"rope_theta": 0}}, "base must be above 1, got 0.0"),
    ],
)
def test_a_key_cannot_be_honoured(folder, keys, message):
    edit_config(folder, **keys)
    assert refusal(folder).startswith(f"/config.json: {message}")


def test_a_key_is_missing(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    assert refusal(folder) == "/config.json: num_hidden_layers: missing"


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types: 1 entries for 4 layers"),
        ("gemma2", {"layer_types": ["odd"] * 4}, "layer_types: 'odd' is not supported; only sliding_attention, "),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 9.0}, "attn_logit_softcapping: 9.0 is not supported; only None"),
        ("gemma3_text", {"rope_parameters": ROPE}, "rope_parameters.rope_type: expected an entry for each of "),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": YARN | {"truncate": False}}},
            "rope_parameters.full_attention.truncate: only true has an effect",
        ),
        ("longformer", {"attention_window": [8, 7, 8, 8]}, "attention_window: must be even and above 0, got 7"),
        ("longformer", {"attention_window": [8]}, "attention_window: 1 windows for 4 layers"),
        ("longformer", {"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key' is not"),
        ("bigbird_block_sparse", {"is_decoder": True}, "is_decoder: True is not supported; only False"),
        ("mamba2", {"num_heads": 10}, "num_heads: 10 heads of 8 are not expand * hidden_size"),
        ("bamba", {"mamba_n_heads": 6}, "mamba_n_heads: 6 heads of 8 do not make up 64 channels"),
        ("bamba", {"partial_rotary_factor": 1.0}, "partial_rotary_factor: 1.0 is not supported; only 0.5"),
        ("zamba2", {"use_long_context": True}, "use_long_context: True is not supported; only False"),
        ("zamba2", {"layers_block_type": ["odd"]}, "layers_block_type: 'odd' is not supported"),
    ],
)
def test_a_key_of_a_family_cannot_be_honoured(tmp_path, name, keys, message):
    place = copy(name, tmp_path)
    edit_config(place, **keys)
    assert refusal(place).startswith(f"/config.json: {message}")


# What is wrong with the tensors


def test_a_tensor_is_missing(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(QUERY))
    assert refusal(folder) == f": no tensor {QUERY}"


def test_a_tensor_has_no_place(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.extra": np.zeros(3, np.float32)}))
    assert refusal(folder) == ": tensor model.extra: has no place in the model of config.json"


@pytest.mark.parametrize("shape", [(32, 31), (32,), (), (2, 32, 32), (0, 32)])
def test_a_tensor_has_another_shape(folder, shape):
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: np.zeros(shape, np.float32)}))
    assert refusal(folder).startswith(f": wrong shape: {QUERY} {list(shape)}")


@pytest.mark.parametrize("name", ["mamba2", "modernbert", "gpt_oss", "minimax_text01"])
def test_any_tensor_of_another_shape_is_named(tmp_path, name):
    place = copy(name, tmp_path)
    tensors = load_file(place / "model.safetensors")
    used = huggingface.load(place).tensors()
    for key in list(used)[::9]:
        for other in (np.zeros((*tensors[key].shape, 1), np.float32), tensors[key][1:], np.zeros((), np.float32)):
            save_file(tensors | {key: np.asarray(other, order="C")}, place / "model.safetensors")
            message = refusal(place)
            assert message.startswith(": wrong shape: "), (key, message)
            assert f"{key} {list(other.shape)}" in message


@pytest.mark.parametrize("dtype", ["float64", "int8", "int64"])
def test_a_tensor_has_another_dtype(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(dtype)}))
    assert refusal(folder) == f": tensor {QUERY}: {dtype} is not supported; only float32, float16, bfloat16"


def test_a_tensor_is_quantised(folder):
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(ml_dtypes.float8_e4m3fn)}))
    assert refusal(folder).startswith(f": tensor {QUERY}: F8_E4M3 is not supported; only ")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_tensors_are_saved_as_they_were(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    model = huggingface.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.parameters)} == {np.dtype("float32")}
    huggingface.save(model, folder.with_name("copy"))
    expected, found = (load_file(place / "model.safetensors") for place in (folder, folder.with_name("copy")))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == dtype
        assert found[key].tobytes() == tensor.tobytes()


def test_tensors_of_no_use_are_saved_too(folder):
    place = copy("minimax_text01", folder.parent)
    more = {f"model.layers.0.self_attn.{key}": np.full((), i) for i, key in enumerate(("slope_rate", "key_decay"))}
    edit_tensors(place, lambda tensors: tensors.update(more))
    huggingface.save(huggingface.load(place), folder.with_name("copy"))
    saved = load_file(folder.with_name("copy") / "model.safetensors")
    for key, tensor in more.items():
        assert (saved[key].dtype, saved[key].shape, saved[key]) == (tensor.dtype, tensor.shape, tensor)


# Several files


def test_a_shard_is_missing(folder):
    place = split(folder)
    shard = min(place.glob("*.safetensors"))
    shard.unlink()
    assert refusal(place) == f"/{shard.name}: missing, but named by model.safetensors.index.json"


def test_a_shard_is_cut_off(folder):
    place = split(folder)
    shard = min(place.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert refusal(place).startswith(f"/{shard.name}: ")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": 3}, {"weight_map": {"a": 3}}])
def test_an_index_has_no_map(folder, index):
    place = split(folder)
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(place) == "/model.safetensors.index.json: no weight_map of tensors to files"


def test_several_files_are_one_checkpoint(folder, mistral):
    again = huggingface.load(split(folder))
    assert again.dtypes == mistral.dtypes
    jax.tree.map(np.testing.assert_array_equal, again.parameters, mistral.parameters)


def test_tensors_are_read_one_after_the_other(folder, monkeypatch):
    place, read, alive, most = split(folder), Checkpoint.read, weakref.WeakSet(), []

    class Held(np.ndarray):
        __hash__ = object.__hash__

    def watch(self, name):
        array = read(self, name).view(Held)
        alive.add(array)
        most.append(sum(one.nbytes for one in alive))
        return array

    monkeypatch.setattr(Checkpoint, "read", watch)
    model = huggingface.load(place)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model.parameters))
    largest = max(tensor.nbytes for tensor in model.tensors().values())
    assert total > 5 * largest
    assert max(most) <= 2 * largest


ON_A_MESH = """
import json, jax, numpy as np
from sparsejax import sharding
from sparsejax.config import ShardingConfig
from sparsejax.interop import huggingface
mesh = sharding.make_mesh(ShardingConfig(data=2, fsdp=2, tensor=2))
whole, spread = huggingface.load("{folder}"), huggingface.load("{folder}", mesh=mesh)
jax.tree.map(np.testing.assert_array_equal, whole.parameters, spread.parameters)
leaves = jax.tree.leaves(spread.parameters)
held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
ids = np.arange(24).reshape(2, 12)
error = float(abs(np.asarray(whole(ids)) - np.asarray(spread(ids))).max())
huggingface.save(spread, "{copy}")
print(json.dumps([held, sum(leaf.nbytes for leaf in leaves), error]))
"""


def test_a_mesh_of_eight_devices(folder):
    place, again = split(folder), folder.with_name("again")
    program = ("-c", ON_A_MESH.format(folder=place, copy=again))
    code, out, err = runs.finish(runs.start(program=program, devices=8))
    assert code == 0, err
    held, size, error = json.loads(out)
    assert held < size / 3  # most of it is split four ways
    assert error < 1e-5
    expected, found = (load_file(path / "model.safetensors") for path in (folder, again))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


# Saving


def test_a_folder_that_exists_is_left_alone(folder, mistral):
    held = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match="exists already") as caught:
        huggingface.save(mistral, folder)
    assert str(caught.value).startswith(str(folder))
    assert sorted(folder.iterdir()) == held


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, mistral, monkeypatch):
    written = []

    def write_some(tensors, path, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", write_some)
    with pytest.raises(CheckpointError, match="No space left on device"):
        huggingface.save(mistral, tmp_path / "copy", shard_bytes=5_000)
    assert written
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path, mistral):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/copy: "):
        huggingface.save(mistral, tmp_path / "file" / "copy")


# What a model is called with


def test_options_that_a_family_lacks():
    place = GOLDEN / "mistral_sliding"
    message = refusal(place, random_plans=[])
    assert message == "/config.json: a mistral model does not take random_plans"


def test_keywords_that_a_family_lacks(mistral):
    with pytest.raises(ValueError, match="a mistral model takes") as caught:
        mistral(IDS, global_attention_mask=np.zeros_like(IDS))
    assert str(caught.value) == "global_attention_mask: a mistral model takes input_ids, attention_mask only"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 96]], "input_ids: ids must be from 0 to 95"),
        ([[-1, 3]], "input_ids: ids must be from 0 to 95"),
        ([1, 2, 3], r"input_ids: expected integers \[b, t\], got int64 \[3\]"),
        ([[1.0, 2.0]], r"input_ids: expected integers \[b, t\], got float64 \[1, 2\]"),
        (np.zeros((1, 0), int), r"input_ids: expected integers \[b, t\], got int64 \[1, 0\]"),
    ],
)
def test_ids_that_are_none(mistral, ids, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        mistral(np.asarray(ids))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1]], r"attention_mask: expected shape \[1, 4\] as input_ids, got \[1, 3\]"),
        ([1, 1, 1, 1], r"attention_mask: expected shape \[1, 4\] as input_ids, got \[4\]"),
        ([[1, 1, 2, 1]], "attention_mask: expected zeros and ones"),
        ([[0.0, -np.inf, 0.0, 0.0]], "attention_mask: expected zeros and ones"),
    ],
)
def test_masks_that_do_not_fit(mistral, mask, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        mistral(IDS, attention_mask=np.asarray(mask))


@pytest.mark.parametrize("shapes", [[(4, 14, 3)], [(4, 14, 2)] * 3, [(2, 14, 3)] * 3, [(14, 3)] * 3])
def test_random_plans_that_do_not_fit(shapes):
    plans = [np.zeros(shape, int) for shape in shapes]
    message = refusal(GOLDEN / "bigbird_block_sparse", random_plans=plans)
    assert message.startswith("/config.json: random_plans: expected 3 of [4, tiles - 2, 3], got ")


def test_random_plans_of_another_length():
    plans = [np.ones((4, 14, 3), int)] * 3
    model = huggingface.load(GOLDEN / "bigbird_block_sparse", random_plans=plans)
    with pytest.raises(ValueError, match="random_plans: for 16 tiles, but 240 tokens are 15 tiles"):
        model(np.ones((1, 15 * 16), int))


def test_more_tokens_than_positions():
    model = huggingface.load(GOLDEN / "longformer")
    with pytest.raises(ValueError, match="139 tokens are more than the 140 positions that the model has"):
        model(np.full((1, 139), 3))
