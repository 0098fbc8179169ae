"""Each rule against an independent computation."""

import numpy as np
import pytest

from sparsejax.init import rules
from sparsejax.runs import build_optimizer, init_state
from sparsejax.sharding import single_device_mesh
from tests.init import origins
from tests.init.origins import MIXER

HEADS, KV, WIDTH = 4, 2, 8  # of the attention of the golden Llama
GATES = "layers.*.mixer.gate.*, *.dt_bias, *.log_decay"
DELTA = {
    f"{MIXER}.kind": "delta",
    f"{MIXER}.key_heads": HEADS,
    f"{MIXER}.key_width": WIDTH,
    f"{MIXER}.value_width": WIDTH,
    f"{MIXER}.conv": 3,
    f"{MIXER}.norm_eps": 1e-6,
}
MAMBA2 = {
    f"{MIXER}.kind": "mamba2",
    f"{MIXER}.state": WIDTH,
    f"{MIXER}.groups": HEADS,
    f"{MIXER}.conv": 3,
    f"{MIXER}.dt_min": 1e-3,
    f"{MIXER}.dt_max": 0.1,
    f"{MIXER}.norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def source():
    """The parameters of the golden Llama."""
    return origins.load(origins.read(f"hf:{origins.GOLDEN / 'llama'}"))


def convert(overrides):
    config = origins.read(f"hf:{origins.GOLDEN / 'llama'}", overrides)
    return origins.plan_for(config), origins.load(config)


def heads_of(weight):
    """The columns of each head."""
    return [weight[:, i * WIDTH : (i + 1) * WIDTH] for i in range(weight.shape[1] // WIDTH)]


def shared(weight):
    """The columns of each query head in a matrix of keys or values."""
    return np.concatenate([heads_of(weight)[head // (HEADS // KV)] for head in range(HEADS)], axis=1)


def same(actual, expected):
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("padding", [None, 1])
def test_positions_are_repeated(padding):
    table = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    first = 0 if padding is None else 2
    expected = list(table[:first])
    while len(expected) < 25:
        expected.extend(table[first:])
    same(rules.repeat_positions(table, 25, padding), np.stack(expected[:25]))
    same(rules.repeat_positions(table, 6, padding), table[:6])


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_positions_of_a_folder(name):
    folder = origins.GOLDEN / name
    source = origins.load(origins.read(f"hf:{folder}"))["embedding.positions"]
    offset = 2 if name == "roberta" else 0
    longer = 2 * (len(source) - offset) + offset
    config = origins.read(f"hf:{folder}", {"model.embedding.positions": longer})
    assert origins.plan_for(config).record["derived"] == {
        "embedding.positions": {"rules": ["repeat_positions"], "from": ["embedding.positions"]}
    }
    same(origins.load(config)["embedding.positions"], np.concatenate([source, source[offset:]]))


def test_global_projections_are_those_of_the_layer():
    folder = origins.GOLDEN / "roberta"
    mixer = "model.layers.sparse.mixer"
    loaded = origins.load(origins.read(f"hf:{folder}", {f"{mixer}.global_projections": True}))
    for i in range(3):
        for part in ("query", "key", "value"):
            for name in ("weight", "bias"):
                same(loaded[f"layers.{i}.mixer.{part}_global.{name}"], loaded[f"layers.{i}.mixer.{part}.{name}"])


def test_heads_are_merged(source):
    plan, loaded = convert({f"{MIXER}.kv_heads": 1})
    for i in range(3):
        for part in ("key", "value"):
            path = f"layers.{i}.mixer.{part}.weight"
            first, second = heads_of(source[path])
            np.testing.assert_allclose(loaded[path], (first + second) / 2, rtol=1e-6)
        same(loaded[f"layers.{i}.mixer.query.weight"], source[f"layers.{i}.mixer.query.weight"])
    assert {tuple(item["rules"]) for item in plan.record["derived"].values()} == {("merge_heads",)}


def test_heads_are_repeated(source):
    _, loaded = convert({f"{MIXER}.kv_heads": HEADS})
    for part in ("key", "value"):
        same(loaded[f"layers.1.mixer.{part}.weight"], shared(source[f"layers.1.mixer.{part}.weight"]))


def test_the_vocabulary_grows(source):
    plan, loaded = convert({"model.vocab": 70})
    tokens, head = source["embedding.tokens"], source["head.weight"]
    same(loaded["embedding.tokens"][:64], tokens)
    same(loaded["head.weight"][:, :64], head)
    for new in range(64, 70):
        np.testing.assert_allclose(loaded["embedding.tokens"][new], tokens.mean(axis=0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(loaded["head.weight"][:, new], head.mean(axis=1), rtol=1e-5, atol=1e-7)
    assert "  by grow_vocabulary: embedding.tokens and 1 other" in plan.describe()


def test_a_tied_head_is_copied():
    folder = origins.GOLDEN / "gpt2"
    loaded = origins.load(origins.read(f"hf:{folder}", {"model.tied": False}))
    same(loaded["head.weight"], loaded["embedding.tokens"].T)


def test_attention_becomes_lightning(source):
    plan, loaded = convert({f"{MIXER}.kind": "lightning", "init.fresh": "layers.*.mixer.gate.weight"})
    for i in range(3):
        mixer = f"layers.{i}.mixer"
        same(loaded[f"{mixer}.query.weight"], source[f"{mixer}.query.weight"])
        same(loaded[f"{mixer}.key.weight"], shared(source[f"{mixer}.key.weight"]))
        same(loaded[f"{mixer}.value.weight"], shared(source[f"{mixer}.value.weight"]))
        same(loaded[f"{mixer}.out.weight"], source[f"{mixer}.out.weight"])
        same(loaded[f"{mixer}.norm.scale"], np.ones(HEADS * WIDTH))
    assert plan.record["fresh"] == [f"layers.{i}.mixer.gate.weight" for i in range(3)]


def test_attention_becomes_gated_delta(source):
    fresh = f"{GATES}, *.beta.weight, *.mixer.decay.weight"
    _, loaded = convert(DELTA | {"init.fresh": fresh, "init.rules": "attention_to_delta"})
    mixer = "layers.2.mixer"
    same(loaded[f"{mixer}.query.weight"], source[f"{mixer}.query.weight"])
    same(loaded[f"{mixer}.key.weight"], shared(source[f"{mixer}.key.weight"]))
    same(loaded[f"{mixer}.value.weight"], shared(source[f"{mixer}.value.weight"]))
    same(loaded[f"{mixer}.out.weight"], source[f"{mixer}.out.weight"])
    same(loaded[f"{mixer}.conv_key.weight"], np.array([[0.0], [0.0], [1.0]]) * np.ones(HEADS * WIDTH))
    same(loaded[f"{mixer}.norm.scale"], np.ones(WIDTH))


def test_attention_becomes_mamba2(source):
    _, loaded = convert(MAMBA2 | {"init.fresh": f"{GATES}, layers.*.mixer.dt.weight, layers.*.mixer.skip"})
    mixer = "layers.1.mixer"
    same(loaded[f"{mixer}.input.weight"], shared(source[f"{mixer}.value.weight"]))
    width = HEADS * WIDTH
    same(loaded[f"{mixer}.select.weight"][:, :width], shared(source[f"{mixer}.key.weight"]))
    same(loaded[f"{mixer}.select.weight"][:, width:], source[f"{mixer}.query.weight"])
    same(loaded[f"{mixer}.out.weight"], source[f"{mixer}.out.weight"])
    same(loaded[f"{mixer}.conv.weight"], np.array([[0.0], [0.0], [1.0]]) * np.ones(width))
    same(loaded[f"{mixer}.conv_select.bias"], np.zeros(2 * width))


def test_fresh_parameters_are_those_of_a_run_without_a_source():
    config = origins.read(f"hf:{origins.GOLDEN / 'llama'}", {"init.fresh": "layers.1.mixer.*", "train.seed": 5})
    loaded, source = origins.load(config), origins.load(origins.read(f"hf:{origins.GOLDEN / 'llama'}"))
    model = origins.plan_for(config).model
    optimizer = build_optimizer(config.optimizer, 10, decay=model.decay, axes=model.axes)
    drawn = origins.unroll(model, init_state(model, optimizer, 5, single_device_mesh()).parameters)
    for path, leaf in loaded.items():
        same(leaf, (drawn if path.startswith("layers.1.mixer.") else source)[path])


def test_a_schedule_mixes_converted_and_loaded_layers(source):
    """A new layer is a copy of a layer of the source, with another mixer."""
    linear = {key.replace("full", "linear"): value for key, value in DELTA.items()}
    fresh = "layers.1.mixer.gate.*, *.beta.weight, layers.1.mixer.d*, *.log_decay"
    overrides = {"model.layers.linear": "full", "model.schedule": "full linear full", "init.fresh": fresh}
    plan, loaded = convert(linear | overrides)
    assert {path.split(".")[1] for path in plan.record["derived"]} == {"1"}
    for path, leaf in loaded.items():
        if not path.startswith("layers.1.mixer."):
            same(leaf, source[path])
