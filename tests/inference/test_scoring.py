"""Continuations of one prompt are scored from its caches, as a forward pass over each pair scores them."""

from pathlib import Path

import numpy as np
import pytest

from sparsejax import loaded
from sparsejax.inference import scoring
from sparsejax.interop import huggingface

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def read(monkeypatch):
    """The tokens that the model reads, padding included, by function."""
    counts = {"prefill": 0, "_score_chunk": 0, "_run_scores": 0}

    def count(module, name, size):
        function = getattr(module, name)

        def counting(*args):
            counts[name] += size(args)
            return function(*args)

        monkeypatch.setattr(module, name, counting)

    count(scoring, "prefill", lambda args: len(args[2]) * sum(args[3].chunks))
    count(scoring, "_score_chunk", lambda args: args[4].size)
    count(loaded, "_run_scores", lambda args: args[2].size)
    return counts


# Rings and full attention; learned positions; latent attention and the delta rule; recurrence and a ring.
@pytest.mark.parametrize(
    "name",
    [
        "gemma3_text",
        "gpt2",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("kimi_linear", "recurrent_gemma")),
    ],
)
def test_forked_caches_score_like_the_forward_pass(name, read, monkeypatch):
    model = huggingface.load(GOLDEN / name)
    random = np.random.default_rng(0)

    def draw(size):
        return random.integers(1, model.config.vocab, size).astype(np.int32)

    prompts = [draw(size) for size in (40, 1, 33, 52)]
    counts = (3, 4, 1, 2)
    pairs = [(prompt, draw(size)) for prompt, n in zip(prompts, counts, strict=True) for size in (1, 5, 20, 9)[:n]]
    scores = model.score(pairs, batch=4)
    assert min(read.values()) > 0  # one prompt has one continuation
    monkeypatch.setattr(type(model), "_can_decode", False)
    for (_, continuation), score, expected in zip(pairs, scores, model.score(pairs, batch=len(pairs)), strict=True):
        np.testing.assert_allclose(score.tokens, expected.tokens, atol=1e-4)
        assert len(score.tokens) == len(continuation)
        assert score.is_greedy == expected.is_greedy
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-3)


def test_a_prompt_is_read_once(read, monkeypatch):
    model = huggingface.load(GOLDEN / "gemma3_text")
    random = np.random.default_rng(1)
    prompt, *continuations = (random.integers(1, model.config.vocab, size) for size in (96, *[4] * 8))
    pairs = [(prompt, ids) for ids in continuations]
    model.score(pairs, batch=1)
    forked = sum(read.values())
    monkeypatch.setattr(type(model), "_can_decode", False)
    model.score(pairs, batch=1)
    assert sum(read.values()) - forked > 3 * forked


def test_long_continuations_are_cut_into_chunks(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 16)
    model = huggingface.load(GOLDEN / "gemma3_text")
    random = np.random.default_rng(2)
    prompt, *continuations = (random.integers(1, model.config.vocab, size) for size in (20, 50, 33, 17))
    pairs = [(prompt, ids) for ids in continuations]
    scores = model.score(pairs, batch=2)
    monkeypatch.setattr(type(model), "_can_decode", False)
    for score, expected in zip(scores, model.score(pairs, batch=3), strict=True):
        np.testing.assert_allclose(score.tokens, expected.tokens, atol=1e-4)
