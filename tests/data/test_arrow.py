"""Folders of Hugging Face datasets are read as `save_to_disk` writes them, without the package."""

import json
import shutil
from pathlib import Path

import pytest

from sparsejax.data import DataConfig, DataError, load_corpus, load_dataset
from tests.data.saved.write import WORDS
from tests.messages import rejects

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.quick

SAVED = Path(__file__).with_name("saved") / "splits"
TEXTS = [f"{WORDS[i % 6]} ä {i}: " + " ".join(WORDS[(i * j) % 6] for j in range(1, 6)) for i in range(14)]


def texts(side):
    return [side.tokens[start:stop].tobytes().decode() for start, stop in side.documents]


@pytest.fixture
def folder(tmp_path):
    """A copy of the data set."""
    return shutil.copytree(SAVED, tmp_path / "splits")


def load(files, **settings):
    return load_dataset(DataConfig("text", str(files), 16, **settings)).corpus


def test_the_splits_are_the_sides_in_order():
    corpus = load(SAVED)
    assert texts(corpus.training) == TEXTS[:10]
    assert texts(corpus.held_out) == TEXTS[10:]
    assert (corpus.train_files, corpus.validation_files) == (2, 1)
    assert corpus.notes == []  # nothing is skipped


def test_a_single_split_holds_out_documents():
    corpus = load_corpus(str(SAVED / "train"))
    assert sorted(texts(corpus.training) + texts(corpus.held_out)) == sorted(TEXTS[:10])
    assert len(corpus.held_out.documents) >= 1


def test_other_columns_and_splits(folder):
    corpus = load(folder, field="title", train_split="validation", validation_split="train")
    assert texts(corpus.training) == [f"row {i}" for i in range(10, 14)]
    assert texts(corpus.held_out) == [f"row {i}" for i in range(10)]
    labelled = load(folder, label="label", objective="classify")
    assert labelled.training.labels.tolist() == [i % 2 for i in range(10)]
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    alone = load(folder)
    assert sorted(texts(alone.training) + texts(alone.held_out)) == sorted(TEXTS[:10])


def test_validation_text_of_another_folder(tmp_path):
    (tmp_path / "other.txt").write_text("another text, of another file")
    assert texts(load(SAVED, validation=str(tmp_path / "other.txt")).held_out) == ["another text, of another file"]
    assert texts(load(SAVED, validation=str(tmp_path / "other.txt")).training) == TEXTS[:10]
    (tmp_path / "train.txt").write_text("text to train on, of a file")
    assert texts(load(tmp_path / "train.txt", validation=str(SAVED)).held_out) == TEXTS[10:]


def test_an_evaluation_reads_the_validation_split():
    dataset = load_dataset(DataConfig("text", str(SAVED), 16), split=False)
    assert texts(dataset.corpus.held_out) == TEXTS[10:]


def test_a_stream_reads_it_too():
    dataset = load_dataset(DataConfig("text", str(SAVED), 16, validation=str(SAVED), stream=True, buffer=4))
    assert [file.name for file in dataset.training.text.files] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    spans = [text.decode() for file in dataset.training.text.files for text, _ in dataset.training.read(file)]
    assert spans == TEXTS[:10]
    assert texts(dataset.corpus.held_out) == TEXTS[10:]


def test_what_the_package_writes_now(tmp_path):
    """The same through the installed version, from a table in memory."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS, "other": [None] * 14}).save_to_disk(tmp_path / "one", num_shards=3)
    corpus = load_corpus(str(tmp_path / "one"))
    assert sorted(texts(corpus.training) + texts(corpus.held_out)) == sorted(TEXTS)
    selected = datasets.Dataset.from_dict({"text": TEXTS}).select([5, 3, 1])
    datasets.DatasetDict(train=selected, validation=selected).save_to_disk(tmp_path / "two")
    assert texts(load_corpus(str(tmp_path / "two")).training) == [TEXTS[5], TEXTS[3], TEXTS[1]]


@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("data.train_split", {"train_split": "trian"}),
        ("data.validation_split", {"validation_split": "test"}),
        ("data.field", {"field": "content"}),
    ],
    ids=["train split", "validation split", "column"],
)
def test_what_a_folder_lacks_is_named(argument, settings):
    with rejects(DataError, argument):
        load(SAVED, **settings)


def test_damaged_folders(folder):
    state = folder / "train" / "state.json"
    original = state.read_text()
    for content in ("{", json.dumps({"_data_files": 3}), json.dumps({"_data_files": []})):
        state.write_text(content)
        with rejects(DataError, "data.files"):
            load(folder)
    state.write_text(original)
    (folder / "train" / "data-00001-of-00002.arrow").unlink()
    with rejects(DataError, "data.files"):
        load(folder)
    (folder / "dataset_dict.json").write_text("[]")
    with rejects(DataError, "data.files"):
        load(folder)
