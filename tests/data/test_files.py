"""File formats: documents are complete and ordered, damage is reported, nothing is dropped silently."""

import gzip
import json
import sys

import numpy as np
import pytest

from sparsejax.data import DataError, load_corpus
from sparsejax.data import formats as formats_module
from sparsejax.data import text as text_module
from sparsejax.data.files import Files
from sparsejax.data.kinds import CHUNK, detect, read_chunks
from tests.messages import rejects

pytestmark = pytest.mark.quick

TEXTS = [f"text {i} é" for i in range(60)]


def texts(side):
    """Documents of a side."""
    return [bytes(side.tokens[start:stop]).decode() for start, stop in side.documents.tolist()]


def both(corpus):
    return sorted(texts(corpus.training) + texts(corpus.held_out))


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def assert_rejected(argument, files, **arguments):
    with rejects(DataError, argument):
        load_corpus(str(files), **arguments)


def test_jsonl_documents_are_lines(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [{"text": text, "id": i} for i, text in enumerate(TEXTS)])
    corpus = load_corpus(str(path))
    assert both(corpus) == sorted(TEXTS)
    assert 1 <= len(corpus.held_out.documents) <= 10
    # Another line does not move the others.
    write_records(path, [{"text": text} for text in [*TEXTS, "new"]])
    longer = load_corpus(str(path))
    assert [text for text in texts(longer.held_out) if text != "new"] == texts(corpus.held_out)
    assert longer.digest != corpus.digest


def test_nested_fields(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [{"page": {"body": text}} for text in TEXTS])
    assert both(load_corpus(str(path), field="page.body")) == sorted(TEXTS)


def test_the_last_of_few_records_is_held_out(tmp_path):
    corpus = load_corpus(str(write_records(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])))
    assert (texts(corpus.training), texts(corpus.held_out)) == (["one"], ["two"])


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(61)), "text": [*TEXTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    corpus = load_corpus(str(tmp_path / "a.parquet"))
    assert both(corpus) == sorted(TEXTS)
    assert corpus.training.empty + corpus.held_out.empty == 1
    assert_rejected("data.field", tmp_path / "a.parquet", field="body")
    assert_rejected("data.label", tmp_path / "a.parquet", label="class")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    assert_rejected("data.files", tmp_path / "b.parquet")


def test_gzip_is_the_same_text(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    data = np.random.default_rng(0).integers(1, 128, 3_000_000, dtype=np.uint8).tobytes()
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data[:1_000_000], 1) + gzip.compress(data[1_000_000:], 1))  # two members
    assert b"".join(read_chunks(packed, compression="gzip")) == data
    assert b"".join(read_chunks(packed, 1_048_570, 2_100_000, "gzip")) == data[1_048_570:2_100_000]
    expected, corpus = load_corpus(str(plain)), load_corpus(str(packed))
    np.testing.assert_array_equal(corpus.train, expected.train)
    np.testing.assert_array_equal(corpus.validation, expected.validation)


def test_zstd_is_the_same_text(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = b"abc" * 1_000_000
    packed = zstandard.compress(data[:100]) + zstandard.compress(data[100:])
    (tmp_path / "a.zst").write_bytes(packed)
    assert b"".join(read_chunks(tmp_path / "a.zst", compression="zstd")) == data
    (tmp_path / "b.zst").write_bytes(packed[:-3])
    with rejects(DataError, "data.files"):
        list(read_chunks(tmp_path / "b.zst", compression="zstd"))


def test_separators_and_escapes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n--\n".join(TEXTS))
    assert both(load_corpus(str(path), separator="\\n--\\n")) == sorted(TEXTS)
    # A separator may cross the boundary of two reads.
    long = "x" * (CHUNK - 2)
    path.write_text(f"{long}\n--\n{long}\n--\n")
    assert both(load_corpus(str(path), separator="\\n--\\n")) == [long, long]


def test_separate_validation_files(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("validation")
    corpus = load_corpus(str(tmp_path / "a.txt"), validation=str(tmp_path / "b.txt"))
    assert (texts(corpus.training), texts(corpus.held_out)) == (["train"], ["validation"])
    assert_rejected("data.validation", tmp_path, validation=str(tmp_path / "b.txt"))
    assert_rejected("data.validation", tmp_path / "a.txt", validation=str(tmp_path / "c.txt"))


def test_empty_documents_are_counted(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [{"text": text} for text in ["", *TEXTS, "", ""]])
    corpus = load_corpus(str(path))
    sides = corpus.training, corpus.held_out
    assert sum(side.read for side in sides) == 63
    assert sum(side.empty for side in sides) == 3
    assert sum(len(side.documents) for side in sides) == 60
    joined = ["\0".join(texts(side)) for side in sides]
    assert [side.bytes for side in sides] == [len(text.encode()) for text in joined]
    assert [side.characters for side in sides] == [len(text) for text in joined]


def test_malformed_files(tmp_path):
    records = tmp_path / "a.jsonl"
    write_records(records, [{"text": "fine"}, {"body": "x", "id": 1}])
    assert_rejected("data.field", records)
    write_records(records, [{"text": "fine"}, {"text": 3}])
    assert_rejected("data.files", records)
    write_records(records, [{"text": "fine", "label": 0}, {"text": "fine", "label": -1}])
    assert_rejected("data.files", records, label="label")
    records.write_text('{"text": "fine"}\n\n{"text": \n')
    assert_rejected("data.files", records)
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(b"text " * 10_000)[:-20])
    assert_rejected("data.files", packed)
    binary = tmp_path / "c.txt"
    binary.write_bytes(b"caf\xe9 " * 100)
    assert_rejected("data.files", binary)
    assert len(load_corpus(str(binary), read_as="bytes").train) == 475
    assert_rejected("data.files", binary, tokenizer="chars")


def test_missing_packages(tmp_path, monkeypatch):
    for name, package, magic in (("a.parquet", "pyarrow", b"PAR1"), ("b.zst", "zstandard", b"\x28\xb5\x2f\xfd")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).write_bytes(magic)
        assert_rejected("data.files", tmp_path / name)


def test_a_single_file_is_split_between_characters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(("é" * 1001).encode())
    sides = [document.text for _, document in Files(str(path)).read()]
    assert [len(text) for text in sides] == [1902, 100]  # for bytes, the last twentieth exactly
    path.write_bytes(("é" * 1011).encode())
    sides = [document.text for _, document in Files(str(path), characters=True).read()]
    assert [text.decode() for text in sides] == ["é" * 961, "é" * 50]


def test_the_cache_returns_the_same_corpus(tmp_path, monkeypatch):
    path = write_records(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    memory = load_corpus(str(path))
    stored = load_corpus(str(path), cache=str(tmp_path / "cache"))
    assert isinstance(stored.train, np.memmap)
    monkeypatch.setattr(text_module, "_encode", None)  # the second call does not tokenize
    cached = load_corpus(str(path), cache=str(tmp_path / "cache"))
    for corpus in (stored, cached):
        assert corpus.digest == memory.digest
        for name in ("training", "held_out"):
            expected, side = getattr(memory, name), getattr(corpus, name)
            for field in ("tokens", "documents", "labels", "read", "empty", "bytes", "characters", "restored"):
                np.testing.assert_array_equal(getattr(side, field), getattr(expected, field))
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    (entry / "train.documents.npy").write_bytes(b"")
    assert_rejected("data.cache", path, cache=str(tmp_path / "cache"))


def test_a_large_file_is_mapped_and_copied_in_parts(tmp_path, monkeypatch):
    data = np.random.default_rng(0).integers(1, 128, 100_000, dtype=np.uint8)
    (tmp_path / "a.bin").write_bytes(data.tobytes())
    before = load_corpus(str(tmp_path / "a.bin"))
    monkeypatch.setattr(formats_module, "LARGE", 1000)
    monkeypatch.setattr(text_module, "PART", 777)
    monkeypatch.setattr(text_module, "FITS", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    after = load_corpus(str(tmp_path / "a.bin"))
    assert (tmp_path / "home" / "sparsejax" / f"bytes-{after.digest}-v{text_module.FORMAT}").is_dir()
    np.testing.assert_array_equal(after.train, before.train)
    np.testing.assert_array_equal(after.validation, before.validation)
    assert after.training.characters == before.training.characters
