"""File formats: documents are complete and ordered, damage is reported, nothing is dropped silently."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest

from sparsejax.data import DataConfig, DataError, load_corpus, load_dataset
from sparsejax.data import formats as formats_module
from sparsejax.data import text as text_module
from sparsejax.data.files import Files
from sparsejax.data.files import _list_files as list_files
from sparsejax.data.kinds import CHUNK, read_chunks
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


RECORDS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSON", "text.txt", "none", "archive.JSONL.GZ"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress, "zstd"])
def test_json_is_known_by_its_content(tmp_path, name, compress):
    if compress == "zstd":
        compress = pytest.importorskip("zstandard").compress
    array, line = json.dumps(RECORDS, indent=1).encode(), json.dumps(RECORDS).encode()
    for data in (LINES, b"\xef\xbb\xbf" + LINES, array, line):
        (tmp_path / name).write_bytes(compress(data))
        assert both(load_corpus(str(tmp_path / name))) == sorted(TEXTS)
    (tmp_path / name).write_bytes(compress(LINES))
    corpus = load_corpus(str(tmp_path / name), read_as="text")
    assert bytes(corpus.train) + bytes(corpus.validation) == LINES
    (kind,) = corpus.files["read"]
    assert kind.split()[0] == "text"


def test_arrow_and_columns_by_content(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    plain = pyarrow.table({"text": TEXTS, "id": list(range(60))})
    coded = pyarrow.table({"text": plain["text"].dictionary_encode()})
    large = pyarrow.table({"text": plain["text"].cast(pyarrow.large_string())})
    for table in (plain, coded, large):
        parquet.write_table(table, tmp_path / "a.bin")
        for name, writer in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
            with writer(str(tmp_path / name), table.schema) as output:
                output.write_table(table)
        for name in ("a.bin", "file", "stream"):
            assert both(load_corpus(str(tmp_path / name))) == sorted(TEXTS)
    assert_rejected("data.field", tmp_path / "stream", field="body")


def make_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("a", "text")
    return file.getvalue()


def make_tar(mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as packed:
        packed.add(__file__)
    return file.getvalue()


UNREADABLE = {
    "zip": make_zip,
    "tar": lambda: make_tar("w"),
    "tar.gz": lambda: make_tar("w:gz"),
    "gz.gz": lambda: gzip.compress(gzip.compress(LINES)),
    "parquet.gz": lambda: gzip.compress(b"PAR1 and so on"),
    "utf16": lambda: "text".encode("utf-16"),
    "utf32": lambda: "text".encode("utf-32"),
    "pdf": lambda: b"%PDF-1.7",
    "npy": lambda: b"\x93NUMPY\x01\x00",
    "sqlite": lambda: b"SQLite format 3\0",
    "binary": lambda: b"text\0text",
    "late_zero": lambda: b"text" * CHUNK + b"\0",
    "latin1": lambda: "text é text".encode("latin-1"),
    "cut_character": lambda: "text é".encode()[:-1],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_other_kinds_are_refused_by_name(tmp_path, name):
    data = UNREADABLE[name]()
    (tmp_path / "a.txt").write_bytes(data)
    if name != "cut_character":  # the end of a text, which is split within characters
        assert_rejected("data.files", tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("text")
    assert_rejected(
        "data.validation" if name not in DEEP else "data.files", tmp_path / "b.txt", validation=str(tmp_path / "a.txt")
    )
    corpus = load_corpus(str(tmp_path / "a.txt"), read_as="bytes")
    assert bytes(corpus.train) + bytes(corpus.validation) == data


DEEP = ("late_zero", "latin1", "cut_character")  # found while the text is read


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"text " * 100)
    corpus = load_corpus(str(tmp_path / "a.txt"))
    assert bytes(corpus.train) + bytes(corpus.validation) == b"text " * 100
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"text " * 100))
    packed = load_corpus(str(tmp_path / "b.gz"))
    np.testing.assert_array_equal(packed.train, corpus.train)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "\xe9"}',
        b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"text": "a\\ud800"}',
        b'{"text": NaN}',
        b'{"text": "a", "id": ' + b"9" * 5000 + b"}",
        b'{"te\\nxt": "a"}',
        b'{"text": "a"',
        b"[1]",
    ],
    ids=["utf8", "deep", "surrogate", "nan", "integer", "key", "cut", "array"],
)
def test_damaged_records(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert_rejected("line 2", tmp_path / "a.jsonl")


def test_damaged_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, column.buffers())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    assert_rejected("line 2", tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": [["nested"]]}), tmp_path / "a.parquet")
    assert_rejected("line 1", tmp_path / "a.parquet")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, "zstd"])
def test_damaged_compression(tmp_path, compress):
    if compress == "zstd":
        zstandard = pytest.importorskip("zstandard")
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    packed = compress(LINES)
    path = tmp_path / "a.jsonl.gz"
    for damaged in (packed[:-7], packed[:40] + b"damage" + packed[46:], packed + packed[:20]):
        path.write_bytes(damaged)
        assert_rejected("data.files", path)
    path.write_bytes(packed + packed)  # two streams
    assert both(load_corpus(str(path))) == sorted(TEXTS * 2)


def test_a_mixed_folder_says_its_formats(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_bytes(LINES)
    corpus = load_corpus(str(tmp_path))
    assert corpus.files["read"] == {"text": 1, "JSON lines": 1}
    assert corpus.notes == ["files: 1 text, 1 JSON lines"]


@pytest.mark.parametrize("separator", [b"\n", b"ab", b"aab", b"aaa"])
def test_split_equals_the_split_of_the_whole(separator):
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 3, 7, 50):
        for _ in range(20):
            text = bytes(rng.choice(list(b"ab\n"), 200).tolist())
            chunks = [text[i : i + size] for i in range(0, 200, size)] if size else [text]
            expected = text.split(separator)
            assert list(formats_module.split(chunks, separator)) == expected[: len(expected) - (not expected[-1])]


def test_a_long_record_takes_linear_time():
    def measure(count):
        start = time.process_time()
        assert [len(text) for text in formats_module.split([b"x" * CHUNK] * count, b"\n")] == [count * CHUNK]
        return time.process_time() - start

    measure(8)
    assert measure(256) < 32 * 8 * max(measure(8), 0.002)  # quadratic time is 1024 times as long


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


def test_validation_documents_that_are_trained_on_are_counted(tmp_path):
    write_records(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    write_records(tmp_path / "b.jsonl", [{"text": text} for text in [*TEXTS[:3], "new"]])
    settings = {"files": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "b.jsonl")}
    for cache in ("", str(tmp_path / "cache"), str(tmp_path / "cache")):
        corpus = load_corpus(**settings, cache=cache)
        assert (corpus.training.repeated, corpus.held_out.repeated) == (0, 3)
    dataset = load_dataset(DataConfig("text", settings["files"], 4, validation=settings["validation"]))
    assert "4 documents used, 3 of them in the training text" in "\n".join(dataset.describe())


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


def test_commas_in_paths(tmp_path):
    (tmp_path / "a,b.txt").write_text("first" * 100)
    (tmp_path / "c.txt").write_text("second" * 100)
    for files in (f"{tmp_path}/a,b.txt", f'"{tmp_path}/a,b.txt"', f'"{tmp_path}/a,b.txt", {tmp_path}/c.txt'):
        names = [file.path.name for file in list_files(files, "data.files", ("", ""), "auto", {})]
        assert names == ["a,b.txt", "c.txt"][: files.count(", ") + 1]
    assert_rejected("data.files", f"{tmp_path}/a,c.txt")
