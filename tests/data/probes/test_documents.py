"""Documents: bytes as they are in the files, each side from its own files, and files that cannot be used."""

import numpy as np
import pytest

from sparsejax.data import DataError
from sparsejax.data.probes import TextClassification, TextRetrieval


@pytest.fixture
def reviews(tmp_path):
    for side, count in (("train", 5), ("test", 3)):
        for name in ("neg", "pos", "unsup"):
            (tmp_path / side / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / side / name / f"{i}.txt").write_text(f"{side} {name} {i} é" + "x" * i)
        (tmp_path / side / "neg" / ".hidden").touch()
        (tmp_path / side / "urls.txt").touch()
    return {"files": str(tmp_path / "train"), "validation_files": str(tmp_path / "test")}


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "train.tsv").write_text("1\tone\ttwo\n0.0\t17\t4\tthree\tfour more\n1.0\ta\tbé\r\n0\tlast\tline")
    (tmp_path / "test.tsv").write_text("0\tx\ty\n")
    return {"files": str(tmp_path / "train.tsv"), "validation_files": str(tmp_path / "test.tsv")}


def text_of(example):
    return bytes(example["inputs"][example["inputs"] < 256].astype(np.uint8)).decode()


def answer(example):
    [place] = np.flatnonzero(example["weights"])
    return int(example["targets"][place])


@pytest.mark.parametrize(("validation", "side", "count"), [(False, "train", 10), (True, "test", 6)])
def test_documents_and_their_classes(reviews, validation, side, count):
    probe = TextClassification(**reviews, length=40)
    found = [probe.example(0, index, validation) for index in range(count)]
    expected = {
        f"{side} {name} {i} é" + "x" * i: label for label, name in enumerate(("neg", "pos")) for i in range(count // 2)
    }
    assert {text_of(example): answer(example) for example in found} == expected
    for example in found:
        size = len(text_of(example).encode())
        assert example["weights"][size - 1] == 1
        assert (example["inputs"][size:] == 256).all()
        assert example["inputs"].shape == example["targets"].shape == (40,)
    assert probe.vocab == 257


def test_training_is_shuffled_and_validation_is_in_order(reviews):
    probe = TextClassification(**reviews, length=40)
    epochs = [[text_of(probe.example(seed, i)) for i in range(10 * e, 10 * e + 10)] for seed in (0, 1) for e in (0, 1)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert probe.held_out == 6
    assert [text_of(probe.example(3, i, True)) for i in range(7)][::6] == ["test neg 0 é"] * 2


def test_classes_are_numbered_as_they_are_given(reviews):
    probe = TextClassification(**reviews, classes=("unsup", "pos", "neg"), length=40)
    labels = {text_of(probe.example(0, i)).split()[1]: answer(probe.example(0, i)) for i in range(15)}
    assert labels == {"unsup": 0, "pos": 1, "neg": 2}


def test_long_documents_are_cut(reviews):
    example = TextClassification(**reviews, length=8).example(0, 0, True)
    assert text_of(example) == "test neg"
    assert example["weights"][-1] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": ""}, "data.probe.files: needs a folder"),
        ({"files": "nowhere"}, "no folder nowhere/neg"),
        ({"classes": ("neg", "missing")}, "missing"),
    ],
)
def test_missing_folders_are_named(reviews, change, said):
    with pytest.raises(DataError, match=said) as error:
        TextClassification(**(reviews | change)).example(0, 0)
    assert "\n" not in str(error.value)


def test_empty_documents_and_classes_are_named(reviews, tmp_path):
    (tmp_path / "test" / "neg" / "0.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"^data.probe.validation_files: .*0.txt is empty$"):
        TextClassification(**reviews).example(0, 0, True)
    (tmp_path / "train" / "none").mkdir()
    with pytest.raises(DataError, match=r"^data.probe.files: no file in .*none$"):
        TextClassification(**reviews, classes=("none", "pos")).example(0, 0)


def test_pairs_and_their_answers(pairs):
    probe = TextRetrieval(**pairs, length=21)
    found = [probe.example(0, index) for index in range(4)]
    lines = {
        "one|two": 1,
        "three|four more": 0,
        "a|bé": 1,
        "last|line": 0,
    }
    seen = {}
    for example in found:
        tokens = [token for token in example["inputs"].tolist() if token != 256]
        cut = tokens.index(257)
        seen[bytes(tokens[:cut]).decode() + "|" + bytes(tokens[cut + 1 :]).decode()] = answer(example)
        assert example["weights"][len(tokens) - 1] == 1
        assert example["inputs"].shape == (21,)
    assert seen == lines
    assert text_of(probe.example(0, 5, True)) == "xy"
    assert probe.held_out == 1
    assert probe.vocab == 258


def test_long_pairs_are_cut_on_both_sides(pairs):
    texts = {text_of(TextRetrieval(**pairs, length=8).example(0, index)) for index in range(4)}
    assert texts == {"onetwo", "thrfou", "ab\u00e9"[:3], "laslin"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0\tonly one\n", "line 1: expected a label"),
        ("2\ta\tb\n", "line 1"),
        ("0\ta\tb\n\n", "line 2"),
        ("1\t\tb\n", "line 1"),
        ("", "is empty"),
    ],
)
def test_bad_tables_are_named(tmp_path, line, said):
    (tmp_path / "table.tsv").write_text(line)
    probe = TextRetrieval(files=str(tmp_path / "table.tsv"))
    with pytest.raises(DataError, match=said) as error:
        [probe.example(0, index) for index in range(3)]
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("data.probe.files: ")


def test_missing_tables_are_named(pairs):
    with pytest.raises(DataError, match=r"data.probe.validation_files: needs a table"):
        TextRetrieval(files=pairs["files"]).example(0, 0, True)
    with pytest.raises(DataError, match=r"data.probe.files: cannot read nowhere"):
        TextRetrieval(files="nowhere").example(0, 0)
