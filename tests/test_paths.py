"""Paths as users write them, on the command line, in configurations and in Python."""

from pathlib import Path

import pytest

import sparsejax
from sparsejax import cli
from sparsejax import config as configs
from sparsejax.data import DataConfig, load_corpus
from sparsejax.data.tokenizers import load_tokenizer
from sparsejax.errors import InputError
from sparsejax.paths import bucket_address, local_path
from sparsejax.report import report
from tests.messages import rejects


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("x", "x"),
        ("/x", "/x"),
        ("file:///x", "/x"),
        ("FILE:///x", "/x"),
        ("a:b", "a:b"),
    ],
)
def test_paths_of_this_machine(home, path, expected):
    expected = Path(expected.replace("HOME", str(home)))
    assert local_path(path) == local_path(Path(path)) == expected
    assert bucket_address(path) is None


@pytest.mark.parametrize("path", ["gs://b/x", "s3://b", "foo://x", "file://host/x", "https://x.org/a"])
def test_other_addresses_are_no_paths(path):
    with rejects(InputError, "out"):
        local_path(path, "out")


def test_buckets():
    assert bucket_address("gs://b/x/") == bucket_address(Path("gs://b/x")) == "gs://b/x"
    for path in ("foo://x", "https://x.org/a", "hdfs://x/y"):
        with rejects(InputError, "workdir"):
            bucket_address(path, "workdir")


def test_options_of_the_command_line(home, capsys):
    (home / "tiny.py").write_text(Path(__file__).with_name("train").joinpath("recipe.py").read_text())
    (home / "module.py").write_text("imported = True\n")
    assert cli.main(["draw", "causal", "--out=~/a.svg"]) == 0
    assert cli.main(["draw", "causal", "--length=4", f"--out=file://{home}/b.svg"]) == 0
    assert cli.main(["show", "--config=~/tiny.py", "--import=~/module.py"]) == 0
    assert {path.name for path in home.iterdir()} >= {"a.svg", "b.svg"}
    assert not (home / "~").exists()
    assert not (home / "file:").exists()
    capsys.readouterr()
    for arguments in (
        ["draw", "causal", "--out=gs://b/a.svg"],
        ["train", "--config=~/tiny.py", "--workdir=foo://x"],
        ["sweep", "--config=~/tiny.py", "--sweep=seed=range(2)", "--workdir=s3://b/x"],
        ["report", "foo://x"],
        ["show", "--hf=gs://b/model"],
        ["show", "--config=gs://b/tiny.py"],
        ["data", "fetch", "sympy", "--out=gs://b/sympy"],
    ):
        assert cli.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, error
        assert "://" in error


def test_keys_of_a_configuration(home):
    (home / "texts").mkdir()
    for i in range(30):
        (home / "texts" / f"{i}.txt").write_text(f"text {i} " * 40)
    corpora = [
        load_corpus(files, cache="~/cache") for files in ("~/texts", f"file://{home}/texts", str(home / "texts"))
    ]
    assert len({corpus.digest for corpus in corpora}) == 1
    assert (home / "cache").is_dir()
    for key in ("files", "validation"):
        with rejects(InputError, f"data.{key}"):
            load_corpus(**({"files": "~/texts"} | {key: "gs://b/texts"}))
    with rejects(InputError, "data.tokenizer"):
        load_tokenizer("gs://b/tokenizer.json", [], "", home)
    assert DataConfig("text", "~/texts", 8).files == "~/texts"  # recorded as written


def test_python(home):
    recipe = Path(__file__).with_name("train").joinpath("recipe.py").read_text()
    (home / "tiny.py").write_text(recipe)
    assert configs.load("~/tiny.py").train.steps == configs.load(f"file://{home}/tiny.py").train.steps == 20
    for read in (sparsejax.load, report):
        with rejects(InputError, "foo://x"):
            read("foo://x")
    with rejects(InputError, f"{home}/none"):
        report("~/none")
