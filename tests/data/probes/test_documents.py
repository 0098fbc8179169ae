"""Documents: the bytes of the files, a split by folder, and errors about unusable files."""

import gzip

import numpy as np
import pytest

from sparsejax.data import DataError
from sparsejax.data.probes import TextClassification, TextRetrieval
from sparsejax.data.probes.documents import _list_documents
from tests.messages import rejects

pytestmark = pytest.mark.quick


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
    [position] = np.flatnonzero(example["weights"])
    return int(example["targets"][position])


@pytest.mark.parametrize(("validation", "side", "count"), [(False, "train", 10), (True, "test", 6)])
def test_documents_and_their_classes(reviews, validation, side, count):
    probe = TextClassification(**reviews, length=40)
    examples = [probe.example(0, index, validation) for index in range(count)]
    expected = {
        f"{side} {name} {i} é" + "x" * i: label for label, name in enumerate(("neg", "pos")) for i in range(count // 2)
    }
    assert {text_of(example): answer(example) for example in examples} == expected
    for example in examples:
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


def test_classes_are_numbered_in_the_order_of_their_names(reviews):
    probe = TextClassification(**reviews, classes=("unsup", "pos", "neg"), length=40)
    labels = {text_of(probe.example(0, i)).split()[1]: answer(probe.example(0, i)) for i in range(15)}
    assert labels == {"unsup": 0, "pos": 1, "neg": 2}


def test_long_documents_are_truncated(reviews):
    example = TextClassification(**reviews, length=8).example(0, 0, True)
    assert text_of(example) == "test neg"
    assert example["weights"][-1] == 1


@pytest.mark.parametrize(
    "fields",
    [{"files": ""}, {"files": "nowhere"}, {"classes": ("neg", "missing")}],
    ids=["no folder named", "no such folder", "no such class"],
)
def test_missing_folders(reviews, fields):
    with rejects(DataError, "data.probe.files"):
        TextClassification(**(reviews | fields)).example(0, 0)


def test_empty_documents_and_classes(reviews, tmp_path):
    (tmp_path / "test" / "neg" / "0.txt").write_bytes(b"")
    with rejects(DataError, "data.probe.validation_files"):
        TextClassification(**reviews).example(0, 0, True)
    (tmp_path / "train" / "none").mkdir()
    with rejects(DataError, "data.probe.files"):
        TextClassification(**reviews, classes=("none", "pos")).example(0, 0)


def test_documents_are_text(reviews, tmp_path):
    document = tmp_path / "test" / "neg" / "0.txt"
    document.write_bytes(gzip.compress("packed é".encode()))
    probe = TextClassification(**reviews, length=40)
    assert text_of(probe.example(0, 0, True)) == "packed é"
    for data in (b"caf\xe9 au lait", "text".encode("utf-16"), b"PK\x03\x04", b"a\0b"):
        document.write_bytes(data)
        with rejects(DataError, "0.txt"):
            probe.example(0, 0, True)
    (document.parent / "more").mkdir()
    _list_documents.cache_clear()
    with rejects(DataError, "data.probe.validation_files"):
        probe.example(0, 0, True)


def test_pairs_are_text(tmp_path):
    (tmp_path / "table.tsv").write_bytes(b"0\tcaf\xe9\ttext\n")
    with rejects(DataError, "table.tsv: line 1"):
        TextRetrieval(files=str(tmp_path / "table.tsv")).example(0, 0)


def test_pairs_and_their_answers(pairs):
    probe = TextRetrieval(**pairs, length=21)
    examples = [probe.example(0, index) for index in range(4)]
    lines = {
        "one|two": 1,
        "three|four more": 0,
        "a|bé": 1,
        "last|line": 0,
    }
    answers = {}
    for example in examples:
        tokens = [token for token in example["inputs"].tolist() if token != 256]
        cut = tokens.index(257)
        answers[bytes(tokens[:cut]).decode() + "|" + bytes(tokens[cut + 1 :]).decode()] = answer(example)
        assert example["weights"][len(tokens) - 1] == 1
        assert example["inputs"].shape == (21,)
    assert answers == lines
    assert text_of(probe.example(0, 5, True)) == "xy"
    assert probe.held_out == 1
    assert probe.vocab == 258


def test_long_pairs_are_truncated_on_both_sides(pairs):
    texts = {text_of(TextRetrieval(**pairs, length=8).example(0, index)) for index in range(4)}
    assert texts == {"onetwo", "thrfou", "ab\u00e9"[:3], "laslin"}


@pytest.mark.parametrize(
    "table",
    ["0\tonly one\n", "2\ta\tb\n", "0\ta\tb\n\n", "1\t\tb\n", ""],
    ids=["one text", "label", "empty line", "empty text", "empty file"],
)
def test_malformed_tables(tmp_path, table):
    (tmp_path / "table.tsv").write_text(table)
    probe = TextRetrieval(files=str(tmp_path / "table.tsv"))
    with rejects(DataError, "data.probe.files"):
        [probe.example(0, index) for index in range(3)]


def test_missing_tables(pairs):
    with rejects(DataError, "data.probe.validation_files"):
        TextRetrieval(files=pairs["files"]).example(0, 0, True)
    with rejects(DataError, "data.probe.files"):
        TextRetrieval(files="nowhere").example(0, 0)
