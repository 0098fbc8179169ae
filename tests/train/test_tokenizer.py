"""The tokenizer of a run: it is part of the workdir, and what it loses is measured and shown."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import sparsejax
from sparsejax.cli import main
from sparsejax.data import tokenizers as tokenizers_module
from sparsejax.errors import InputError
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.messages import rejects
from tests.train import runs

SHORT = {"train.steps": 4, "checkpoint.every": 2, "eval.every": 2, "model.schedule": "local", "eval.sample": 8}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of trained tokenizers and tokenized text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sparsejax"


def test_a_copied_workdir_needs_no_cache(text, tmp_path, cache, monkeypatch):
    pytest.importorskip("tokenizers")
    settings = runs.load(text, SHORT | {"data.tokenizer": "bpe:280", "model.vocab": 320})
    printed = runs.train_here(settings, tmp_path / "run")
    assert "sample, as PROMPT|CONTINUATION:" in printed  # of a vocabulary with 40 ids that the tokenizer does not have
    shutil.rmtree(cache)
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    model = sparsejax.load(copy)
    tokens = model.tokenizer.encode(b"sparse window")
    assert model.tokenizer.decode(tokens) == "sparse window"
    assert model.logits(tokens).shape[-1] == 320
    monkeypatch.setattr(tokenizers_module, "_train", None)
    runs.train_here(settings, copy)  # the run has ended; its text is tokenized again
    (copy / "tokenizer.json").write_text("{}")
    with rejects(InputError, "tokenizer.json"):
        runs.train_here(settings, copy)


def test_lost_text_is_recorded(tmp_path, cache):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "known": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "text").write_text("known other " * 2000)
    overrides = SHORT | {"data.tokenizer": str(tmp_path / "words.json"), "data.length": 8}
    printed = runs.train_here(runs.load(tmp_path / "text", overrides), tmp_path / "run")
    workdir = Workdir(tmp_path / "run")
    counts, result, row = read_json(workdir.data), read_json(workdir.result), read_rows(workdir.metrics)[-1]
    restored = counts["validation"]["restored"]
    assert 0.4 < restored < 0.6
    assert result["eval/restored"] == row["eval/restored"] == restored
    bits = result["eval/loss"] / np.log(2) * counts["validation"]["tokens"]
    assert result["eval/bits_per_byte"] == pytest.approx(bits / (counts["validation"]["bytes"] * restored))
    assert "warning: of the validation text" in printed
    assert f"of the {restored:.2%} of the text that the tokenizer gives back" in printed
    (tmp_path / "words.json").unlink()
    assert sparsejax.load(workdir.path).tokenizer.decode(np.array([1, 1])) == "known known"


def test_an_ascii_terminal_shows_escapes(tmp_path):
    (tmp_path / "text").write_text("café " * 100)
    arguments = ["data", "show", "--config=preset:quickstart", f"--config.data.files={tmp_path / 'text'}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, "-m", "sparsejax", *arguments, "--config.data.length=16", "--rows=1"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"caf\\xe9" in done.stdout
    done = subprocess.run([*command, "--config.data.field=é", "--config.é=1"], env=environment, capture_output=True)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_data_show_checks_the_vocabulary(text, cache, capsys):
    pytest.importorskip("tokenizers")
    keys = [f"--config.data.files={text}", "--config.data.tokenizer=bpe:280"]
    assert main(["data", "show", f"--config={runs.RECIPE}", *keys]) == 2
    error = capsys.readouterr().err
    assert "model.vocab: 256 is too small; data.tokenizer = 'bpe:280' needs 280" in error
