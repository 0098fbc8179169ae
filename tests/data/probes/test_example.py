"""Properties of every probe: examples are functions of seed and index, and have the stated shapes."""

import hashlib
import itertools
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from sparsejax.data.probes import PROBES
from sparsejax.data.probes.example import build_example, final_example, open_stream, pick, recall_example
from sparsejax.errors import InputError
from tests.messages import rejects

pytestmark = pytest.mark.quick

FIXED_SETS = {"digits", "text_classification", "text_retrieval"}
GENERATED = {name: kind() for name, kind in PROBES.items() if name not in FIXED_SETS}
SMALLEST = {
    "mqar": {"length": 4, "pairs": 1, "vocab": 4},
    "induction_heads": {"length": 3, "vocab": 2},
    "selective_copying": {"length": 2, "tokens": 1, "vocab": 3},
    "duplication": {"length": 4, "vocab": 2},
    "passkey": {"length": 4, "digits": 1, "names": 1, "fillers": 1},
    "key_value": {"pairs": 1, "digits": 1},
    "needles": {"length": 4, "keys": 1, "digits": 1, "names": 1, "fillers": 1},
    "variable_tracking": {"length": 5, "hops": 0, "numbers": 1, "variables": 1, "fillers": 1},
    "common_words": {"length": 3, "common": 1, "repeats": 2, "rare": 1, "words": 1},
    "frequent_words": {"length": 4, "answers": 1, "words": 2},
    "listops": {"length": 2, "min_length": 0, "max_depth": 1, "max_args": 2},
    "pathfinder": {"side": 9, "dashes": 1, "dash": 1, "gap": 0, "distractors": 0, "margin": 1},
    "state_tracking": {"length": 1, "symbols": 2},
}
INVALID = [
    ("mqar", {"pairs": 0}, "pairs"),
    ("mqar", {"length": 14}, "length"),
    ("mqar", {"length": 65}, "length"),
    ("mqar", {"vocab": 9}, "vocab"),
    ("induction_heads", {"length": 2}, "length"),
    ("induction_heads", {"vocab": 1}, "vocab"),
    ("selective_copying", {"length": 31}, "length"),
    ("selective_copying", {"tokens": 0}, "tokens"),
    ("selective_copying", {"vocab": 2}, "vocab"),
    ("duplication", {"length": 7}, "length"),
    ("duplication", {"length": 2}, "length"),
    ("duplication", {"vocab": 1}, "vocab"),
    ("passkey", {"length": 11}, "length"),
    ("passkey", {"needles": 65}, "names"),
    ("passkey", {"haystack": "essay"}, "haystack"),
    ("passkey", {"depth": 1.5}, "depth"),
    ("key_value", {"pairs": 17, "digits": 1}, "pairs"),
    ("key_value", {"query": 75}, "query"),
    ("needles", {"length": 29}, "length"),
    ("needles", {"queries": 5}, "queries"),
    ("needles", {"keys": 65}, "names"),
    ("needles", {"depth": -0.1}, "depth"),
    ("needles", {"haystack": "essay"}, "haystack"),
    ("variable_tracking", {"length": 20}, "length"),
    ("variable_tracking", {"chains": 13}, "variables"),
    ("variable_tracking", {"numbers": 0}, "numbers"),
    ("common_words", {"length": 309}, "length"),
    ("common_words", {"repeats": 3}, "repeats"),
    ("common_words", {"length": 4096}, "words"),
    ("frequent_words", {"length": 10}, "length"),
    ("frequent_words", {"alpha": 0.0}, "length"),
    ("frequent_words", {"words": 3}, "words"),
    ("listops", {"length": 501}, "length"),
    ("listops", {"max_args": 1}, "max_args"),
    ("listops", {"max_depth": 3}, "min_length"),
    ("pathfinder", {"side": 24}, "side"),
    ("pathfinder", {"gap": 3}, "margin"),
    ("state_tracking", {"group": "dihedral"}, "group"),
    ("state_tracking", {"symbols": 7}, "symbols"),
    ("state_tracking", {"group": "alternating", "symbols": 2}, "symbols"),
    ("text_classification", {"length": 0}, "length"),
    ("text_classification", {"classes": ("one",)}, "classes"),
    ("text_retrieval", {"length": 2}, "length"),
    ("key_value", {"pairs": 4, "queries": 5}, "queries"),
]


def to_bytes(example):
    return b"".join(example[key].tobytes() for key in sorted(example))


def assert_is_example(example, probe):
    keys = {"inputs", "targets", "weights"}
    assert set(example) in (keys, keys | {"distance"}, keys | {"segments", "positions"})
    for key, array in example.items():
        assert array.dtype == (np.float32 if key == "weights" else np.int32)
        assert array.shape == (probe.length,)
    for key in ("inputs", "targets"):
        assert example[key].min() >= 0
        assert example[key].max() < probe.vocab
    scored = example["weights"] == 1
    assert scored.any()
    for key in {"weights", "targets", "distance"} & set(example):
        assert not example[key][~scored].any()


def assert_answers_are_copied(example):
    for position in np.flatnonzero(example["weights"]):
        source = position + 1 - example["distance"][position]
        assert 0 <= source <= position
        assert example["inputs"][source] == example["targets"][position]


@pytest.mark.parametrize("name", GENERATED)
def test_arrays_of_an_example(name):
    for index in range(20):
        example = GENERATED[name].example(3, index)
        assert_is_example(example, GENERATED[name])
        if "distance" in example:
            assert_answers_are_copied(example)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_probes_are_endless(name):
    assert GENERATED[name].held_out is None
    assert_is_example(GENERATED[name].example(2**64 - 1, 2**64 - 1, True), GENERATED[name])


@pytest.mark.parametrize("name", GENERATED)
def test_an_example_is_a_function_of_its_arguments(name):
    first = [to_bytes(GENERATED[name].example(5, index)) for index in range(8)]
    again = [to_bytes(PROBES[name]().example(5, index)) for index in reversed(range(8))]
    assert first == again[::-1]


@pytest.mark.parametrize("name", GENERATED)
def test_seeds_indices_and_sides_give_different_examples(name):
    probe = GENERATED[name]
    arguments = itertools.product((0, 1, 2), range(30), (False, True))
    examples = [to_bytes(probe.example(seed, index, validation)) for seed, index, validation in arguments]
    assert len(set(examples)) == len(examples)


def test_another_process_generates_the_same_examples():
    program = (
        "import hashlib; from sparsejax.data.probes import PROBES\n"
        f"probes = [PROBES[name]() for name in {list(GENERATED)}]\n"
        "arrays = [array for probe in probes for _, array in sorted(probe.example(7, 11).items())]\n"
        "print(hashlib.sha256(b''.join(array.tobytes() for array in arrays)).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.getcwd()}
    child = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    expected = b"".join(to_bytes(probe.example(7, 11)) for probe in GENERATED.values())
    assert child.stdout.strip() == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_sizes(name):
    probe = PROBES[name](**SMALLEST[name])
    for index in range(20):
        assert_is_example(probe.example(0, index), probe)


@pytest.mark.parametrize(
    ("name", "fields", "argument"),
    INVALID,
    ids=[f"{name}-{'-'.join(fields)}-{i}" for i, (name, fields, _) in enumerate(INVALID)],
)
def test_invalid_fields(name, fields, argument):
    with rejects(InputError, argument) as caught:
        PROBES[name](**fields)
    assert caught.value.argument == argument


def test_probes_are_immutable():
    with pytest.raises(FrozenInstanceError):
        GENERATED["mqar"].length = 8


@pytest.mark.parametrize(("seed", "index", "argument"), [(-1, 0, "seed"), (0, -1, "index"), (2**64, 0, "seed")])
def test_seeds_and_indices_out_of_range(seed, index, argument):
    with rejects(InputError, argument):
        open_stream(seed, index)


def test_similar_streams_differ():
    # As a list of 32-bit words some of these would be the same seed.
    keys = [(0, 1), (1, 0), (1 << 32, 0), (0, 1 << 32), (1, 1 << 32), (1 << 32, 1)]
    drawn = {int(open_stream(*key, side).integers(2**63)) for key in keys for side in (False, True)}
    assert len(drawn) == 2 * len(keys)


def test_pick_visits_every_element_once_per_epoch():
    epochs = [[pick(7, 3, 7 * epoch + i) for i in range(7)] for epoch in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 15
    assert pick(7, 3, 5) == epochs[0][5]
    assert pick(1, 0, 9) == 0


def test_constructors_of_examples():
    example = build_example(np.array([5, 6, 7, 8]), np.array([3, 1]), np.array([9, 4]))
    assert example["targets"].tolist() == [0, 4, 0, 9]
    assert example["weights"].tolist() == [0, 1, 0, 1]
    example = recall_example(np.array([5, 6, 5, 8]), np.array([2]), np.array([1]))
    assert example["targets"].tolist() == [0, 0, 6, 0]
    assert example["distance"].tolist() == [0, 0, 2, 0]
    example = final_example(np.array([5, 6]), 3, length=4, padding=9)
    assert example["inputs"].tolist() == [5, 6, 9, 9]
    assert example["targets"].tolist() == [0, 3, 0, 0]
    assert example["weights"].tolist() == [0, 1, 0, 0]
    assert example["segments"].tolist() == [1, 1, 0, 0]
    assert example["positions"].tolist() == [0, 1, 0, 0]
