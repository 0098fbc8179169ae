"""TFDS sets without TensorFlow: prepared once from a checked file, read by split and slice, refused with a command."""

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

DATA = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8).tobytes()


class TinyBytes(_Bytes):
    """As enwik8, but small."""

    name, SIZE, MD5 = "tiny_bytes", len(DATA), hashlib.md5(DATA).hexdigest()


class TinyReviews(tfds.core.GeneratorBasedBuilder):
    """Texts with classes."""

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


def config(folder, name, **more):
    return DataConfig("text", "", 8, tfds=name, tfds_dir=str(folder / "sets"), **more)


def complaint(settings):
    with pytest.raises(DataError) as caught:
        load_dataset(settings)
    return str(caught.value)


def test_the_standard_splits_of_a_file(folder):
    corpus = load_dataset(config(folder, "tiny_bytes:1.0.0")).corpus
    assert bytes(corpus.train) == DATA[:9000]
    assert bytes(corpus.validation) == DATA[9000:9500]
    test = load_dataset(config(folder, "tiny_bytes", validation_split="test")).corpus
    assert bytes(test.validation) == DATA[9500:]
    assert test.digest != corpus.digest


def test_a_zip_serves_too(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "tiny_bytes.zip", "w") as archive:
        archive.writestr("tiny_bytes", DATA)
    made = prepare(TinyBytes, tmp_path, str(tmp_path / "sets"))
    assert (made / "features.json").read_bytes() == (folder / "sets/tiny_bytes/1.0.0/features.json").read_bytes()


def test_a_wrong_file_is_refused(tmp_path):
    (tmp_path / "tiny_bytes").write_bytes(DATA[1:])
    with pytest.raises(DataError, match=rf"has 9,999 bytes and md5 .*; tiny_bytes has 10,000 and {TinyBytes.MD5}"):
        prepare(TinyBytes, tmp_path, str(tmp_path / "sets"))
    with pytest.raises(DataError, match="no file"):
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


def test_what_cannot_be_read_is_named(folder):
    split = complaint(config(folder, "tiny_reviews"))
    assert split == "data.validation_split: tiny_reviews has no split 'validation': train, test"
    field = complaint(config(folder, "tiny_reviews", validation_split="test", field="body"))
    assert field == "data.field: tiny_reviews has no 'body': label, text"
    absent = complaint(config(folder, "mnist:3.0.1"))
    command = f"tfds.builder('mnist:3.0.1', data_dir='{folder / 'sets'}', file_format='array_record')"
    assert absent == (
        f"data.tfds: mnist:3.0.1 is not prepared in {folder / 'sets'}; run: python -c"
        f' "import tensorflow_datasets as tfds; {command}.download_and_prepare()"'
    )
    own = complaint(config(folder, "text8:1.0.0"))
    assert own.endswith(f"python -m sparsejax.data.builders text8 --file=text8 --data_dir={folder / 'sets'}")
    assert "there is 2.1.0" in complaint(config(folder, "tiny_reviews:9.0.0"))


def test_damaged_and_foreign_files_are_named(folder, tmp_path):
    prepare(TinyBytes, folder, str(tmp_path / "sets"))
    place = tmp_path / "sets" / "tiny_bytes" / "1.0.0"
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    assert "tfrecord files need TensorFlow; prepare it anew" in complaint(config(tmp_path, "tiny_bytes"))
    (place / "dataset_info.json").write_text(json.dumps(info))
    file = place / "tiny_bytes-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[: 1 << 15])
    assert complaint(config(tmp_path, "tiny_bytes")).startswith("data.")


def test_tensorflow_is_not_imported(folder):
    script = (
        "import sys; from sparsejax.data import DataConfig, load_dataset;"
        f"load_dataset(DataConfig('text', '', 8, tfds='tiny_bytes', tfds_dir={str(folder / 'sets')!r}));"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-1] == "False"
