"""Tokenizers decode what they encode, mark the starts of words, and have separators and masks."""

import io
import itertools
import shutil

import numpy as np
import pytest

from sparsejax.data import DataError, load_corpus
from sparsejax.data import tokenizers as tokenizers_module
from sparsejax.data.tokenizers import PART, Bytes, Characters, _split_lines, load_tokenizer, vocabulary
from tests.messages import rejects

pytestmark = pytest.mark.quick

WORDS = ["sparse", "dense", "window", "sink", "scan", "tile", "é"]
TEXT = " ".join(np.random.default_rng(0).choice(WORDS, 4000)) + ".\n"


def words(tokenizer, tokens):
    bounds = [*np.flatnonzero(tokenizer.starts(tokens)), len(tokens)]
    return [tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise(bounds)]


@pytest.fixture
def folder(tmp_path):
    for i in range(30):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(TEXT[i * 200 :][:2000])
    return tmp_path


def test_bytes():
    tokenizer = Bytes()
    tokens = tokenizer.encode("a café, 2x".encode())
    assert tokenizer.decode(tokens) == "a café, 2x"
    assert words(tokenizer, tokens) == ["a", " ", "café", ",", " ", "2x"]
    assert tokenizer.decode(np.array([97, 256, 256, 98])) == "a▢▢b"
    assert (vocabulary(tokenizer, False), vocabulary(tokenizer, True)) == (256, 257)


def test_characters():
    tokenizer = Characters()
    tokens = tokenizer.encode(b" az by ")
    assert tokens.tolist() == [0, 1, 26, 0, 2, 25, 0]
    assert words(tokenizer, tokens) == [" ", "az", " ", "by", " "]
    assert tokenizer.decode(np.append(tokens, 27)) == " az by ▢"
    with rejects(DataError, "'B'"):
        tokenizer.encode(b"aBc")


def test_bpe_is_trained_once_on_the_training_text(folder, monkeypatch):
    pytest.importorskip("tokenizers")
    cache = folder / "cache"
    corpus = load_corpus(str(folder / "text"), tokenizer="bpe:280", cache=str(cache))
    tokenizer = corpus.tokenizer
    assert (tokenizer.size, tokenizer.separator, tokenizer.mask) == (280, 0, 1)
    assert vocabulary(tokenizer, True) == 280
    plain = load_corpus(str(folder / "text"))
    for side, text in ((corpus.training, plain.train), (corpus.held_out, plain.validation)):
        documents = [tokenizer.decode(side.tokens[a:b]) for a, b in side.documents.tolist()]
        assert documents == bytes(text).decode().split("\0")
        assert (side.tokens == 0).sum() == len(documents) - 1
        assert side.bytes == sum(len(text.encode()) for text in documents)
        assert side.tokens.dtype == np.uint16
    assert len(corpus.train) < len(plain.train) / 2
    monkeypatch.setattr(tokenizers_module, "_train", None)
    (entry,) = (path for path in cache.glob("tokens-*") if path.is_dir())
    shutil.rmtree(entry)
    second = load_corpus(str(folder / "text"), tokenizer="bpe:280", cache=str(cache))
    np.testing.assert_array_equal(second.train, corpus.train)
    assert second.digest == corpus.digest != plain.digest


def test_bpe_word_starts(folder):
    pytest.importorskip("tokenizers")
    corpus = load_corpus(str(folder / "text"), tokenizer="bpe:280", cache=str(folder / "cache"))
    tokens = corpus.tokenizer.encode(b"a sparse window\nsink")
    tokens = np.append(tokens, corpus.tokenizer.separator)
    assert words(corpus.tokenizer, tokens) == [" sparse", " window", "\nsink", "<|endoftext|>"]


def test_tokenizer_files(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers

    ids = {subword: i for i, subword in enumerate(["[UNK]", "[SEP]", "[MASK]", "spar", "##se", "tile", "é"])}
    model = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "wordpiece.json"))
    tokenizer = load_tokenizer(str(tmp_path / "wordpiece.json"), (), "", tmp_path)
    tokens = tokenizer.encode("sparse tile é".encode())
    assert tokens.tolist() == [3, 4, 5, 6]
    assert tokenizer.starts(tokens).tolist() == [True, False, True, True]
    assert (tokenizer.separator, tokenizer.mask) == (1, 2)
    (tmp_path / "broken.json").write_text("{")
    for name in (str(tmp_path / "broken.json"), "absent.json", "bpe:100"):
        with rejects(DataError, "data.tokenizer"):
            load_tokenizer(name, (), "", tmp_path)


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(".")[0][i : i + 200] for i in range(0, 8000, 200)),
        model_writer=model,
        vocab_size=40,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(str(tmp_path / "a.model"), (), "", tmp_path)
    tokens = tokenizer.encode(b"sparse window sink")
    assert tokenizer.decode(tokens) == "sparse window sink"
    assert tokenizer.starts(tokens).sum() == 3
    assert tokenizer.mask == tokenizer.size
    assert tokenizer.decode(np.append(tokens, tokenizer.mask)) == "sparse window sink▢"
    (tmp_path / "b.model").write_bytes(b"nothing")
    with rejects(DataError, "data.tokenizer"):
        load_tokenizer(str(tmp_path / "b.model"), (), "", tmp_path)


def test_invalid_utf8(folder):
    pytest.importorskip("tokenizers")
    load_corpus(str(folder / "text"), tokenizer="bpe:280", cache=str(folder / "cache"))
    (folder / "text" / "0.txt").write_bytes(b"caf\xe9")
    with rejects(DataError, "data.files"):
        load_corpus(str(folder / "text"), tokenizer="bpe:280", cache=str(folder / "cache"))


def test_long_texts_are_split_at_lines():
    text = ("x" * 999 + "\n") * 5000
    parts = list(_split_lines(text))
    assert "".join(parts) == text
    assert all(part.endswith("\n") and len(part) <= PART for part in parts)
    assert "".join(_split_lines("y" * (PART + 5))) == "y" * (PART + 5)
