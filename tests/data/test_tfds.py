"""TFDS without TensorFlow: data sets are prepared from verified files and read by split and slice."""

import hashlib
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparsejax.data import DataConfig, DataError, load_dataset
from sparsejax.data.builders import _Bytes, prepare
from tests.messages import rejects

pytestmark = pytest.mark.quick

DATA = np.random.default_rng(0).integers(1, 128, 10_000, dtype=np.uint8).tobytes()


class TinyBytes(_Bytes):
    """A small version of enwik8."""

    name, SIZE, MD5 = "tiny_bytes", len(DATA), hashlib.md5(DATA).hexdigest()


class TinyReviews(tfds.core.GeneratorBasedBuilder):
    """Labelled texts."""

    VERSION = tfds.core.Version("2.1.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(8)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"review {i} of {count}", "label": i % 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "tiny_bytes").write_bytes(DATA)
    assert prepare(TinyBytes, folder, str(folder / "sets")) == folder / "sets" / "tiny_bytes" / "1.0.0"
    TinyReviews(data_dir=str(folder / "sets"), file_format="array_record").download_and_prepare()
    return folder


def config(folder, name, **fields):
    return DataConfig("text", "", 8, tfds=name, tfds_dir=str(folder / "sets"), **fields)


def test_the_standard_splits_of_a_file(folder):
    corpus = load_dataset(config(folder, "tiny_bytes:1.0.0")).corpus
    assert bytes(corpus.train) == DATA[:9000]
    assert bytes(corpus.validation) == DATA[9000:9500]
    test = load_dataset(config(folder, "tiny_bytes", validation_split="test")).corpus
    assert bytes(test.validation) == DATA[9500:]
    assert test.digest != corpus.digest


def test_zip_files(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "tiny_bytes.zip", "w") as archive:
        archive.writestr("tiny_bytes", DATA)
    prepared = prepare(TinyBytes, tmp_path, str(tmp_path / "sets"))
    assert (prepared / "features.json").read_bytes() == (folder / "sets/tiny_bytes/1.0.0/features.json").read_bytes()


def test_wrong_files(tmp_path):
    (tmp_path / "tiny_bytes").write_bytes(DATA[1:])
    with rejects(DataError, "file"):
        prepare(TinyBytes, tmp_path, str(tmp_path / "sets"))
    with rejects(DataError, "file"):
        prepare(TinyBytes, tmp_path / "elsewhere", str(tmp_path / "sets"))


def test_slices_and_labels(folder):
    settings = {"train_split": "train[:75%]", "validation_split": "train[75%:]"}
    dataset = load_dataset(config(folder, "tiny_reviews:2.1.0", objective="classify", label="label", **settings))
    sides = dataset.corpus.training, dataset.corpus.held_out
    assert [len(side.documents) for side in sides] == [30, 10]
    for side in sides:
        for (start, stop), label in zip(side.documents.tolist(), side.labels.tolist(), strict=True):
            number = int(bytes(side.tokens[start:stop]).split()[1])
            assert label == number % 3


@pytest.mark.parametrize(
    ("name", "fields", "argument"),
    [
        ("tiny_reviews", {}, "data.validation_split"),
        ("tiny_reviews", {"validation_split": "test", "field": "body"}, "data.field"),
        ("tiny_reviews", {"validation_split": "test", "label": "class"}, "data.label"),
        ("tiny_reviews:9.0.0", {}, "data.tfds"),
        ("mnist:3.0.1", {}, "data.tfds"),
        ("text8:1.0.0", {}, "data.tfds"),
    ],
    ids=["split", "field", "label", "version", "not prepared", "local builder"],
)
def test_unavailable_data_sets(folder, name, fields, argument):
    with rejects(DataError, argument):
        load_dataset(config(folder, name, **fields))


def test_damaged_files_and_other_formats(folder, tmp_path):
    prepare(TinyBytes, folder, str(tmp_path / "sets"))
    prepared = tmp_path / "sets" / "tiny_bytes" / "1.0.0"
    info = json.loads((prepared / "dataset_info.json").read_text())
    (prepared / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with rejects(DataError, "data.tfds"):
        load_dataset(config(tmp_path, "tiny_bytes"))
    (prepared / "dataset_info.json").write_text(json.dumps(info))
    file = prepared / "tiny_bytes-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[: 1 << 15])
    with rejects(DataError, "data."):
        load_dataset(config(tmp_path, "tiny_bytes"))


def test_tensorflow_is_not_imported(folder):
    script = (
        "import sys; from sparsejax.data import DataConfig, load_dataset;"
        f"load_dataset(DataConfig('text', '', 8, tfds='tiny_bytes', tfds_dir={str(folder / 'sets')!r}));"
        "print('tensorflow' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert child.stdout.split()[-1] == "False"
