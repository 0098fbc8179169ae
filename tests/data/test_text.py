"""Files that a corpus reads, and their split."""

import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from sparsejax.data import DataError, load_corpus
from tests.messages import rejects

pytestmark = pytest.mark.quick

NAMES = [f"part{i % 3}/chapter{i}.txt" for i in range(60)]


@pytest.fixture(scope="module")
def python_text():
    return load_corpus("")


@pytest.fixture
def book(tmp_path):
    folder = tmp_path / "book"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<{name}>")
    return folder


def documents(side):
    return side.tobytes().decode().split("\0")


def both(corpus):
    return sorted(documents(corpus.train) + documents(corpus.validation))


def test_default_text_is_the_standard_library_without_tests_and_packages(python_text):
    sides = [side.tobytes().split(b"\0") for side in (python_text.train, python_text.validation)]
    assert [len(side) for side in sides] == [python_text.train_files, python_text.validation_files]
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = {text for side in sides for text in side}
    for name in ("argparse.py", "json/decoder.py", "pydoc_data/topics.py"):
        assert (stdlib / name).read_bytes() in texts
    assert Path(np.__file__).read_bytes() not in texts
    assert Path(pytest.__file__).read_bytes() not in texts
    assert texts.isdisjoint(path.read_bytes() for path in (stdlib / "test").glob("test_[a-c]*.py"))
    assert 5e6 < len(python_text.train) < 2e7
    assert 0.03 < len(python_text.validation) / len(python_text.train) < 0.08


def test_default_text_is_deterministic(python_text):
    second = load_corpus(" ")
    assert second.digest == python_text.digest
    np.testing.assert_array_equal(second.validation, python_text.validation)


def test_a_folder_is_read_recursively_and_split_by_file(book):
    corpus = load_corpus(str(book))
    assert both(corpus) == sorted(f"<{name}>" for name in NAMES)
    assert corpus.train_files == len(documents(corpus.train))
    assert corpus.validation_files == len(documents(corpus.validation))
    assert corpus.train.dtype == corpus.validation.dtype == np.uint8
    assert documents(corpus.train) == sorted(documents(corpus.train))


def test_the_split_is_stable(book):
    # A change would silently move validation text into the training text of existing checkpoints.
    assert documents(load_corpus(str(book)).validation) == [
        "<part0/chapter3.txt>",
        "<part0/chapter42.txt>",
        "<part1/chapter16.txt>",
        "<part1/chapter22.txt>",
        "<part2/chapter53.txt>",
    ]


def test_a_new_file_does_not_move_others(book):
    before = documents(load_corpus(str(book)).validation)
    for i in range(40):
        (book / f"appendix{i}.txt").write_text("new")
    after = load_corpus(str(book))
    assert [text for text in documents(after.validation) if text != "new"] == before
    assert after.train_files + after.validation_files == 100


def test_the_digest_depends_on_names_and_content_only(book, tmp_path):
    digest = load_corpus(str(book)).digest
    moved = book.rename(tmp_path / "elsewhere")
    assert load_corpus(str(moved)).digest == digest
    assert len(digest) == 16
    file = moved / NAMES[0]
    text = file.read_text()
    file.write_text(text.upper())
    assert load_corpus(str(moved)).digest != digest
    file.write_text(text)
    file.rename(file.with_name("another.txt"))
    assert load_corpus(str(moved)).digest != digest


def test_folders_count_what_they_skip(book):
    before = load_corpus(str(book))
    assert before.files == {"read": {"text": 60}, "skipped": {}}
    assert not before.notes
    (book / ".git").mkdir()
    (book / ".git" / "config").write_text("hidden")
    (book / ".hidden").write_text("hidden")
    (book / "empty.txt").touch()
    (book / "picture.png").write_bytes(b"\x89PNG")
    (book / "broken.txt").symlink_to(book / "absent")
    (book / "copy.txt").symlink_to(book / NAMES[0])
    (book / "part0" / "cycle").symlink_to(book)
    os.mkfifo(book / "queue")
    (book / "late.txt").write_bytes(b"a" * (1 << 17) + b"\0")  # a zero byte, far from the start
    corpus = load_corpus(str(book))
    assert corpus.digest == before.digest
    skipped = {"hidden": 2, "empty": 1, "binary": 2, "broken link": 1, "repeated": 2, "special": 1}
    assert corpus.files == {"read": {"text": 60}, "skipped": skipped}
    (note,) = corpus.notes
    assert note.startswith("skipped 9 of 69 files: ")
    assert f"1 empty ({book}/empty.txt)" in note
    (note,) = load_corpus(f"{book}/part0/*, {book}/*").notes
    assert "4 folder" in note  # those that `*` matches


def test_links_to_folders_are_followed(book, tmp_path):
    whole = load_corpus(str(book))
    (book / "part1").rename(tmp_path / "moved")
    (book / "part1").symlink_to(tmp_path / "moved")
    assert load_corpus(str(book)).digest == whole.digest


def test_a_folder_that_cannot_be_listed_is_an_error(book, monkeypatch):
    listed = os.scandir

    def scan(path):
        if str(path).endswith("part1"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scan)  # root can read everything
    with rejects(DataError, "part1"):
        load_corpus(str(book))


def test_globs_and_lists(book):
    assert both(load_corpus(f"{book}/part1/*.txt")) == sorted(f"<{name}>" for name in NAMES if "part1" in name)
    assert load_corpus(f"{book}/**/*.txt").digest == load_corpus(str(book)).digest
    listed = load_corpus(f"{book}/part0/chapter0.txt, {book}/part1")
    assert listed.train_files + listed.validation_files == 21


def test_a_file_named_twice_is_read_once(book):
    (book / "link.txt").symlink_to(book / NAMES[0])
    once = load_corpus(f"{book}/part0,{book}/part1")
    twice = load_corpus(f"{book}/part0,{book}/part1,{book}/part0/*.txt,{book}/link.txt")
    assert twice.digest == once.digest


@pytest.mark.parametrize("names", [["a", "b"], ["chapter53", "chapter9"]])  # the hash holds out none, or both
def test_neither_side_is_empty(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text(name)
    corpus = load_corpus(str(tmp_path))
    assert (corpus.train_files, corpus.validation_files) == (1, 1)
    assert documents(corpus.validation) == [names[-1]]


def test_the_end_of_a_single_file_is_held_out(tmp_path):
    file = tmp_path / "bytes.bin"
    data = np.arange(1000, dtype=np.uint32).astype(np.uint8)
    file.write_bytes(data.tobytes())
    corpus = load_corpus(str(file), read_as="bytes")
    np.testing.assert_array_equal(corpus.train, data[:950])
    np.testing.assert_array_equal(corpus.validation, data[950:])


def test_files_without_text(tmp_path, book):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a").write_bytes(b"\0")
    absent = [f"{tmp_path}/absent.txt", f"{book},{tmp_path}/absent", f"{book}/*.md", f"{tmp_path}/nothing"]
    os.mkfifo(tmp_path / "queue")
    for files in [f"{tmp_path}/queue", *absent, f"{book},{tmp_path}/empty.txt", f"{tmp_path}/binary"]:
        with rejects(DataError, "data.files"):
            load_corpus(files)
