"""Tokenizers decode what they encode, mark the starts of words, and have separators and masks."""

import io
import itertools
import json
import shutil

import numpy as np
import pytest

from sparsejax.data import DataConfig, DataError, load_corpus, load_dataset
from sparsejax.data import tokenizers as tokenizers_module
from sparsejax.data.tokenizers import (
    PART,
    Bytes,
    Characters,
    _split_lines,
    count_restored,
    load_tokenizer,
    read_tokenizer,
    recorded_tokenizer,
    vocabulary,
    write_tokenizer,
)
from sparsejax.errors import InputError
from sparsejax.workdir import Workdir, write_json
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


def save_words(path, ids, **settings):
    """Saves a tokenizer of whole words, in which [UNK] stands for all others."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    model = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, **ids}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, value in settings.items():
        setattr(model, name, value)
    model.save(str(path))
    return str(path)


def test_text_that_comes_back_is_measured(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("known other " * 1000)
    cache = str(tmp_path / "cache")
    words = save_words(tmp_path / "words.json", {"known": 1})
    config = DataConfig("text", str(tmp_path / "a.txt"), 8, tokenizer=words, cache=cache)
    dataset = load_dataset(config)
    side = dataset.corpus.held_out
    known = int((side.tokens == 1).sum())
    assert dataset.restored == side.restored == dataset.counts["validation"]["restored"]
    assert side.restored == pytest.approx((6 * known - 1) / side.bytes)  # "known known ... known"
    assert dataset.tokens_per_byte == pytest.approx(len(side.tokens) / (6 * known - 1))
    assert dataset.tokens_per_character == pytest.approx(dataset.tokens_per_byte)
    warnings = [line for line in dataset.describe() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert f"{side.restored:.4%}" in warnings[1]
    bpe = load_corpus(str(tmp_path / "a.txt"), tokenizer="bpe:280", cache=cache)
    assert bpe.training.restored == bpe.held_out.restored == bpe.held_out.restored_characters == 1
    lower = tokenizers.Tokenizer.from_str(bpe.tokenizer.data.decode())
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(tmp_path / "lower.json"))
    (tmp_path / "b.txt").write_text("Known Other " * 1000)
    upper = load_corpus(str(tmp_path / "b.txt"), tokenizer=str(tmp_path / "lower.json"), cache=cache)
    assert upper.held_out.restored == pytest.approx(10 / 12)
    (tmp_path / "c.txt").write_text("other " * 1000)
    with rejects(DataError, "data.tokenizer"):
        load_corpus(str(tmp_path / "c.txt"), tokenizer=words, cache=cache)


def test_sentencepiece_loses_newlines(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = "sparse window\n  dense sink\n" * 200
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=30,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    (tmp_path / "a.txt").write_text(text)
    cache = str(tmp_path / "cache")
    corpus = load_corpus(str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "a.model"), cache=cache)
    for side in (corpus.training, corpus.held_out):
        assert side.restored == pytest.approx(25 / 27, abs=0.01)  # a newline and two spaces become one space
    assert "\n" not in corpus.tokenizer.decode(corpus.validation)


def test_count_restored():
    assert count_restored(b"text", b"text") == (4, 4)
    assert count_restored("é text".encode(), b"text") == (4, 4)
    assert count_restored(b"ab", b"ba") == (1, 1)  # no difference in numbers, but one in order
    assert count_restored(b"text", b"") == (0, 0)
    assert count_restored(b"ab", b"completely different") == (0, 0)


def test_ids_with_holes(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("low high " * 500)
    words = save_words(tmp_path / "words.json", {"low": 7, "high": 900})
    dataset = load_dataset(DataConfig("text", str(tmp_path / "a.txt"), 8, tokenizer=words, cache=str(tmp_path)))
    assert dataset.vocab == 901
    assert set(np.unique(dataset.corpus.train)) == {7, 900}
    assert dataset.tokenizer.decode(np.array([7, 8, 900, 901, 5000])).count("▢") == 3
    dataset.require_vocabulary(901)
    with rejects(DataError, "model.vocab"):
        dataset.require_vocabulary(900)
    huge = save_words(tmp_path / "huge.json", {"low": 1 << 30})
    with rejects(DataError, "data.tokenizer"):
        load_tokenizer(huge, (), "", tmp_path)


def test_ids_outside_the_vocabulary_are_shown():
    assert Bytes().decode(np.array([97, 256, 300, 98])) == "a▢▢b"
    assert Characters().decode(np.array([1, 27, 400])) == "a▢▢"


def test_spelled_special_tokens_are_text(folder, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("one <|endoftext|> two [MASK] three\n" * 100)
    text, cache = str(tmp_path / "a.txt"), str(tmp_path / "cache")
    corpus = load_corpus(text, tokenizer="bpe:280", cache=cache)
    settings = json.loads(corpus.tokenizer.data)
    for token in settings["added_tokens"]:
        token["special"] = False
    (tmp_path / "plain.json").write_text(json.dumps(settings))
    for name in ("bpe:280", str(tmp_path / "plain.json")):
        corpus = load_corpus(text, tokenizer=name, cache=cache)
        tokenizer, side = corpus.tokenizer, corpus.training
        assert not np.isin(side.tokens, [tokenizer.separator, tokenizer.mask]).any()
        assert tokenizer.decode(side.tokens).startswith("one <|endoftext|> two [MASK] three\n")
        assert side.restored == 1
    split = load_corpus(text, tokenizer="bpe:280", cache=cache, separator="<|endoftext|>")
    assert (split.train == split.tokenizer.separator).sum() == len(split.training.documents) - 1 > 50
    words = save_words(tmp_path / "words.json", {"one": 1, "<|endoftext|>": 2})
    with rejects(DataError, "data.files"):
        load_corpus(text, tokenizer=words, cache=cache)


def test_a_workdir_holds_its_tokenizer(folder, tmp_path):
    pytest.importorskip("tokenizers")
    text, cache = str(folder / "text"), tmp_path / "cache"
    corpus = load_corpus(text, tokenizer="bpe:280", cache=str(cache))
    workdir = Workdir(tmp_path / "run")
    workdir.path.mkdir()
    assert read_tokenizer(workdir) is None
    write_tokenizer(workdir, corpus.tokenizer)
    write_json(workdir.data, {"tokenizer_digest": corpus.tokenizer.digest})
    shutil.rmtree(cache)
    again = load_corpus(text, tokenizer="bpe:280", cache=str(cache), recorded=read_tokenizer(workdir))
    assert again.digest == corpus.digest
    assert not list(cache.glob("bpe-*"))  # nothing was trained
    assert (
        recorded_tokenizer(workdir, "bpe:280").encode(b"sparse").tolist() == corpus.tokenizer.encode(b"sparse").tolist()
    )
    # A file of the user, copied into the workdir.
    copied = workdir.tokenizer.rename(tmp_path / "mine.json")
    first = load_tokenizer(str(copied), (), "", cache)
    write_tokenizer(workdir, first)
    write_json(workdir.data, {"tokenizer_digest": first.digest})
    copied.unlink()
    assert load_tokenizer(str(copied), (), "", cache, read_tokenizer(workdir)).digest == first.digest
    copied.write_bytes(first.data + b"\n")
    with rejects(DataError, "data.tokenizer"):
        load_tokenizer(str(copied), (), "", cache, read_tokenizer(workdir))
    workdir.tokenizer.write_bytes(first.data + b"\n")
    with rejects(InputError, "tokenizer.json"):
        read_tokenizer(workdir)
    workdir.tokenizer.unlink()
    with rejects(InputError, "bpe:280"):
        recorded_tokenizer(workdir, "bpe:280")


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
