"""Text streams: whole characters, and nothing from a stop string on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.tokenizers import Bytes, HuggingFace
from sparsejax.errors import InputError
from sparsejax.inference import TextStream
from tests.messages import rejects

pytestmark = pytest.mark.quick

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30)


def split(tokens, cuts):
    return np.split(tokens, sorted(cut % (len(tokens) + 1) for cut in cuts))


@given(TEXT, st.lists(st.integers(0, 100)))
def test_bytes_arrive_as_whole_characters(text, cuts):
    stream = TextStream(Bytes())
    parts = [stream.push(part) for part in split(Bytes().encode(text.encode()), cuts)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + stream.finish() == stream.text == text


@given(st.binary(max_size=20))
def test_bytes_that_are_not_text_are_replaced(content):
    stream = TextStream(Bytes())
    parts = [stream.push([byte]) for byte in content]
    assert "".join(parts) + stream.finish() == content.decode(errors="replace")


@given(TEXT, st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3), st.lists(st.integers(0, 100)))
def test_a_stream_ends_at_the_first_stop_string(text, stops, cuts):
    text = text + "cabcabbac"
    stream = TextStream(Bytes(), stops)
    parts = []
    for token in text.encode():
        parts.append(stream.push([token]))
        if stream.stopped:
            break
    parts.append(stream.finish())
    ends = [text.find(stop) for stop in stops if stop in text]
    # Of stop strings that overlap, the first to be complete counts.
    complete = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    assert "".join(parts) == (text[: min(complete)[1]] if ends else text)


def byte_pairs(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["the cat sat on the mat, naïve café"] * 20, trainer)
    return HuggingFace("bpe", model.to_str().encode())


def test_subwords_arrive_as_whole_characters(tmp_path):
    tokenizer, text = byte_pairs(tmp_path), "the café 🙂 sat, 日本 naïve"
    tokens = tokenizer.encode(text.encode())
    assert len(tokens) < len(text.encode())
    for context in ([], tokens[:3]):
        stream = TextStream(tokenizer, context=context)
        parts = [stream.push([token]) for token in tokens]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) + stream.finish() == text


@pytest.mark.parametrize("stops", ["ab", ["a", ""]], ids=["text", "empty"])
def test_invalid_stop_strings(stops):
    with rejects(InputError, "stop"):
        TextStream(Bytes(), stops)
