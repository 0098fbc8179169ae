"""A sequence on several shards gives the results of one device."""

import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sparsejax.presets import find_preset, list_presets
from tests.check.models import MIXERS, VARIANTS
from tests.devices import simulate

FLOAT64, FLOAT32 = 1e-10, 2e-5

ATTENTION = [  # pattern, length, shards, packed
    ("causal & window(31)", 256, 8, False),
    ("causal & window(100)", 256, 8, True),  # longer than three shards
    ("window(20, 13)", 384, 4, False),
    ("causal", 256, 8, False),
    ("causal", 192, 2, True),
    ("full", 128, 4, True),
    ("causal & (window(31) | sink(4))", 512, 8, True),
    ("window(16, 16) | globals([0, 700])", 1024, 8, True),
    ("causal & (window(31) | random(2, tile=16, seed=0))", 512, 8, False),
    ("causal & strided(16)", 256, 4, False),
    ("dilated(8, 8, 3)", 384, 4, False),
    ("causal & window(8)", 296, 4, True),  # 74 tokens per shard
    ("causal & window(8)", 1018, 2, False),  # a prime number per shard
    ("per_head(causal, causal & window(7), full, window(3, 3))", 192, 2, True),
    ("causal & chunk(64)", 512, 8, False),
    ("causal & chunk(48)", 256, 8, False),  # chunks that cross shards
    ("causal & window(5)", 24, 8, False),  # three tokens per shard
]
KERNEL = [  # pattern, length, shards, packed
    ("causal & (window(300) | sink(4))", 1024, 2, True),
    ("causal", 1024, 4, True),
    ("window(16, 16) | globals([0, 700])", 2048, 2, True),  # pinned
    ("per_head(causal, causal & window(7), full, window(3, 3))", 256, 2, False),  # one tile per shard
]
RING = [  # pattern, length, shards, packed, heads, options
    ("causal", 256, 8, True, (4, 2), {"softcap": 5.0}),
    ("causal", 192, 2, False, (4, 1), {"alibi": True}),
    ("causal", 222, 2, True, (2, 2), {"sinks": False}),  # three tiles per shard
    ("causal", 24, 8, True, (4, 2), {}),  # one tile per shard, which cannot be halved
    ("full", 128, 4, True, (4, 2), {}),
    ("causal & (window(31) | sink(4))", 256, 4, True, (4, 2), {}),  # whose keys are not gathered
    ("per_head(causal, full, causal & window(5), causal)", 64, 2, False, (4, 2), {}),
]
SELECT = "model.layers.full.mixer.select"
MOBA = {SELECT: {"kind": "moba", "count": 2, "block": 16}}
TOKENS = {SELECT: {"kind": "tokens", "count": 16}}
RANDOM = 4  # random models of the default tier
MODELS = [  # config, length, shards, packed
    ("preset:window", 128, 4, True),
    ("preset:quickstart", 128, 4, True),
    ("preset:longformer_base:tiny", 128, 4, False),
    ("preset:minimax_text_01:tiny", 128, 2, True),
]


def compute(test, cases):
    """The results of a test of the program for each case."""
    command = [sys.executable, "-m", "tests.sequence.program", test]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, env=os.environ | simulate(8)
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_attention_has_the_values_and_gradients_of_one_device():
    names = "pattern", "length", "shards", "packed"
    cases = [dict(zip(names, case, strict=True)) for case in ATTENTION]
    for case, result in zip(cases, compute("attention", cases), strict=True):
        assert result["difference"] < FLOAT64, case


def test_float32_differs_by_rounding():
    cases = [
        {"pattern": pattern, "length": 256, "shards": 4, "dtype": "float32", "softcap": 20.0}
        for pattern in ("causal & window(31)", "causal")
    ]
    for case, result in zip(cases, compute("attention", cases), strict=True):
        assert result["difference"] < FLOAT32, case


def test_a_kernel_has_the_values_and_gradients_of_one_device():
    names = "pattern", "length", "shards", "packed"
    options = {"dtype": "float32", "impl": "tpu", "interpret": True}
    cases = [dict(zip(names, case, strict=True), **options) for case in KERNEL]
    cases[0] |= {"sizes": (2, 1, 2, 2), "softcap": 20.0}
    cases[3] |= {"sizes": (1, 1, 2, 2)}
    cases.append({"pattern": "causal", "length": 256, "shards": 1, "sizes": (2, 1, 1, 2), "heads": (4, 1), **options})
    for case, result in zip(cases, compute("attention", cases), strict=True):
        assert result["difference"] < FLOAT32, case


def test_a_device_receives_the_keys_of_its_rows_and_heads_only():
    """Half of the bytes with half of the rows or heads, of keys that are gathered, sent and broadcast."""
    patterns = "causal", "causal & (window(300) | sink(4))", "window(9) | globals([0, 700])"
    meshes = (1, 1, 4, 1), (1, 2, 4, 1), (1, 1, 4, 2)
    cases = [
        {"pattern": pattern, "length": 1024, "shards": 4, "sizes": sizes, "sinks": False}
        for pattern in patterns
        for sizes in meshes
    ]
    results = compute("attention", cases)
    for i, (case, result) in enumerate(zip(cases, results, strict=True)):
        assert result["difference"] < FLOAT64, case
        share = 2 if case["sizes"] != meshes[0] else 1
        expected = results[i - i % len(meshes)]["collectives"]
        # The sums of the loss, of one number each, are over all devices.
        received = {kind: share * size for kind, size in result["collectives"].items()}
        assert received == pytest.approx(expected, abs=100), case


def test_a_device_selects_and_attends_for_its_rows_and_heads_only():
    """Nothing but sums is exchanged: of the loss, and of the gradient of a key/value head that devices share."""
    cases = [
        {"kind": kind, "sizes": sizes, "heads": heads, "impl": impl}
        for kind, impl in (("blocks", "gather"), ("tokens", "segment"))
        for sizes, heads in (((2, 2, 1, 1), (2, 2)), ((2, 1, 1, 2), (4, 2)), ((1, 1, 1, 2), (4, 1)))
    ]
    for case, result in zip(cases, compute("selected", cases), strict=True):
        assert result["difference"] < FLOAT64, case
        assert set(result["collectives"]) == {"all-reduce"}, case
        assert case["heads"][1] == 1 or result["collectives"]["all-reduce"] < 100, case


def test_a_shard_selects_among_the_keys_of_its_rows_and_heads_only():
    meshes = (1, 1, 2, 1), (2, 1, 2, 1), (1, 1, 2, 2)
    for kind, impl in (("blocks", "gather"), ("tokens", "segment")):
        cases = [{"kind": kind, "sizes": sizes, "heads": (4, 2), "impl": impl} for sizes in meshes]
        results = compute("selected", cases)
        assert max(result["difference"] for result in results) < FLOAT64, kind
        whole, by_row, by_head = (result["collectives"] for result in results)
        assert 2 * by_row["reduce-scatter"] == 2 * by_head["reduce-scatter"] == whole["reduce-scatter"], kind
        assert 2 * by_row["all-gather"] == whole["all-gather"], kind
        assert by_head["all-gather"] < 0.6 * whole["all-gather"], kind  # segment ids have no heads


def test_a_ring_has_the_values_and_gradients_of_one_device():
    names = "pattern", "length", "shards", "packed", "heads"
    cases = [dict(zip(names, case[:5], strict=True), impl="ring", **case[5]) for case in RING]
    for case, result in zip(cases, compute("attention", cases), strict=True):
        assert result["difference"] < FLOAT64, case
        assert "all-gather" not in result["collectives"], case
        assert result["collectives"]["collective-permute"] > 0, case


def test_a_ring_gathers_nothing():
    """Of nine moves, three of keys forward and three of keys and of gradients backward, XLA can reuse the first."""
    overrides = {"model.schedule": "full", "model.layers.full.mixer.impl": "ring"}
    (result,) = compute("traffic", [{"config": "preset:dense", "length": 512, "shards": 4, "overrides": overrides}])
    assert "all-gather" not in result["hlo"]
    assert set(result["account"]) == {"collective-permute"}
    moved, counted = result["hlo"]["collective-permute"], result["account"]["collective-permute"]
    assert moved <= counted <= 9 / 8 * moved


def test_a_ring_holds_the_keys_of_few_shards():
    """Temporary memory hardly depends on the number of shards; gathered keys and their gradients grow with it."""
    ring = {"model.schedule": "full", "model.layers.full.mixer.impl": "ring"}
    cases = [
        {"config": "preset:dense", "tokens": 512, "shards": shards, "overrides": overrides}
        for overrides, shards in ((ring, 2), (ring, 8), ({"model.schedule": "full"}, 8))
    ]
    two, eight, gathered = (result["bytes"] for result in compute("memory", cases))
    assert eight < 1.1 * two
    assert eight < 0.75 * gathered


def test_recurrences_have_the_values_and_gradients_of_one_device():
    names = "selective_scan", "ssd", "delta", "kimi_delta", "linear_scan", "conv"
    cases = [
        {"op": op, "length": length, "shards": shards, "packed": packed, "initial": initial}
        for op in names
        for length, shards, packed, initial in ((72, 8, True, True), (51, 3, False, True), (52, 4, True, False))
    ]
    for case, result in zip(cases, compute("recurrence", cases), strict=True):
        assert result["difference"] < FLOAT64, case
        assert "collective-permute" in result["collectives"], case


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case[0])
def test_a_training_step_has_the_loss_and_gradient_of_one_device(case):
    names = "config", "length", "shards", "packed"
    (result,) = compute("model", [dict(zip(names, case, strict=True), dropout=0.1)])
    assert result["loss"] < FLOAT64
    assert result["gradient"] < FLOAT64


def test_a_loss_in_chunks_and_sinks_beside_selections():
    """Their gradients pass from a loop within the shards to parameters that all shards share."""
    mixer = "model.layers.full.mixer."
    chosen = {"model.schedule": "full", mixer + "sinks": True, mixer + "alibi": True, mixer + "rope": None}
    cases = [
        {"config": "preset:window", "length": 128, "shards": 4, "overrides": {"train.loss_chunk": 8}},
        {"config": "preset:dense", "length": 128, "shards": 4, "overrides": chosen | MOBA},
        {"config": "preset:dense", "length": 128, "shards": 4, "overrides": chosen | TOKENS},
    ]
    for case, result in zip(cases, compute("model", cases), strict=True):
        assert max(result.values()) < FLOAT64, case


def test_a_window_sends_its_halo_and_gathers_nothing():
    cases = [
        {"config": "preset:window", "length": 512, "shards": 4},
        {"config": "preset:dense", "length": 512, "shards": 4},
        {"config": "preset:gemma3:tiny", "length": 512, "shards": 8},
    ]
    window, dense, mixed = compute("traffic", cases)
    assert "collective-permute" in window["hlo"]
    assert "all-gather" not in window["hlo"]
    for result in (window, dense, mixed):
        for kind, size in result["account"].items():
            extra = result["hlo"][kind] if kind == "all-reduce" else size  # gradients of parameters are summed too
            assert size <= result["hlo"][kind] * 1.02 <= extra * 1.04, kind


def test_keys_among_which_queries_choose_are_gathered_once():
    """Of MoBA the means of the blocks too, of single keys the keys once more, for their scores."""
    cases = [
        {"config": "preset:dense", "length": 512, "shards": 4, "overrides": {"model.schedule": "full"} | choice}
        for choice in (MOBA, TOKENS)
    ]
    moba, tokens = compute("traffic", cases)
    for result in (moba, tokens):
        assert set(result["account"]) == {"all-gather", "reduce-scatter"}
        assert result["account"] == {kind: result["hlo"][kind] for kind in result["account"]}
    assert moba["account"]["all-gather"] < 0.7 * tokens["account"]["all-gather"]


def test_the_memory_of_a_window_does_not_depend_on_the_number_of_shards():
    cases = [{"config": "preset:window", "tokens": 256, "shards": shards} for shards in (2, 4, 8)]
    sizes = [result["bytes"] for result in compute("memory", cases)]
    assert max(sizes) < 1.05 * min(sizes)


def assert_random_models(seeds):
    cases = [{"seed": seed} for seed in seeds]
    for case, result in zip(cases, compute("random_model", cases), strict=True):
        tolerance = {"float64": FLOAT64, "float32": FLOAT32}[result["dtype"]]
        assert result["loss"] < tolerance, case | result
        assert result["gradient"] < tolerance, case | result


def test_random_models_have_the_loss_and_gradient_of_one_device():
    assert_random_models(range(RANDOM))


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(RANDOM, 200, 14))
def test_more_random_models(first):
    assert_random_models(range(first, first + 14))


@pytest.mark.nightly
@pytest.mark.parametrize("mixer", [name for name in MIXERS | VARIANTS if "lsh" not in name])
def test_every_mixer(mixer):
    """The lengths only just divide; the windows are longer than a shard."""
    cases = [{"mixer": mixer, "length": length, "shards": shards} for length, shards in ((40, 8), (26, 2))]
    for case, result in zip(cases, compute("mixer", cases), strict=True):
        assert max(result.values()) < FLOAT64, case


def assert_rows_stay(mixers):
    """Devices that share the rows of a batch, and have all parameters, exchange sums of gradients only."""
    cases = [{"mixer": mixer, "length": 640} for mixer in mixers]  # too many tokens for dense attention
    for case, result in zip(cases, compute("rows", cases), strict=True):
        assert set(result["collectives"]) <= {"all-reduce"}, case


def test_rows_stay_on_their_device():
    assert_rows_stay(["indexed", "compressed"])


@pytest.mark.nightly
def test_rows_of_every_mixer_stay_on_their_device():
    assert_rows_stay(MIXERS | VARIANTS)


@pytest.mark.nightly
@pytest.mark.parametrize("name", list_presets())
def test_every_preset(name):
    """The tiny form, where a preset has one."""
    has_form = inspect.signature(find_preset(name).get_config).parameters
    config = f"preset:{name}:tiny" if has_form else f"preset:{name}"
    (result,) = compute("model", [{"config": config, "length": 128, "shards": 4}])
    assert max(result.values()) < FLOAT64


@pytest.mark.nightly
def test_random_patterns():
    draw = np.random.default_rng(0)
    parts = [
        "window({a})",
        "window({a}, {b})",
        "sink({s})",
        "strided({s})",
        "random(2, tile=8, seed={b})",
        "chunk({a})",
    ]
    parts += ["globals([0, {b}])", "dilated({s}, {s}, 2)", "causal"]
    cases = []
    for _ in range(200):
        a, b, s = draw.integers(1, 90), draw.integers(1, 60), draw.integers(2, 20)
        texts = [part.format(a=a, b=b, s=s) for part in draw.choice(parts, draw.integers(1, 4), replace=False)]
        pattern = " | ".join(texts)
        pattern = f"causal & ({pattern})" if draw.random() < 0.7 else pattern
        shards = int(draw.choice([2, 4, 8]))
        length = shards * int(draw.integers(8, 100))
        cases.append({"pattern": pattern, "length": length, "shards": shards, "packed": bool(draw.random() < 0.5)})
    for case, result in zip(cases, compute("attention", cases), strict=True):
        assert result["difference"] < FLOAT64, case
