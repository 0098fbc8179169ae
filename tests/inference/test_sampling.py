"""Sampling against a NumPy oracle, and the distribution and the independence of its draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import InputError
from sparsejax.inference import Sampling, log_probabilities, sample
from sparsejax.inference.sampling import row_keys
from tests.messages import rejects

pytestmark = pytest.mark.quick

VOCAB = 12
SETTINGS = [
    Sampling(*values)
    for values in itertools.product((1.0, 1.7), (0.5, 1.0, 3.0), (0, 1, 5), (1.0, 0.8, 0.05), (0.0, 0.2))
]


def draw_logits(rows=4):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (rows, VOCAB)).astype(np.float32)
    logits[0, 3] = logits[0, 5]  # a tie
    return logits, rng.random((rows, VOCAB)) < 0.3


def oracle(logits, present, settings):
    """Probabilities in float64, filter by filter, of one row."""
    scores = logits.astype(np.float64)
    scores = np.where(
        present,
        np.where(scores > 0, scores / settings.repetition_penalty, scores * settings.repetition_penalty),
        scores,
    )
    scores = scores / settings.temperature
    kept = np.ones(len(scores), bool)
    if settings.top_k:
        kept &= scores >= np.sort(scores)[::-1][min(settings.top_k, len(scores)) - 1]
    if settings.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        p = softmax(np.where(kept, scores, -np.inf))[order]
        count = int(np.searchsorted(np.cumsum(p), settings.top_p - 1e-9)) + 1
        kept &= scores >= scores[order[:count]].min()
    p = softmax(np.where(kept, scores, -np.inf))
    kept &= p >= settings.min_p * p.max() * (1 - 1e-6)
    return softmax(np.where(kept, scores, -np.inf))


def softmax(scores):
    exp = np.exp(scores - scores.max())
    return exp / exp.sum()


def test_the_filters_equal_the_oracle():
    logits, present = draw_logits()
    compiled = jax.jit(log_probabilities)
    for settings in SETTINGS:
        actual = np.exp(compiled(logits, present, settings.as_arrays()))
        expected = [oracle(row, mask, settings) for row, mask in zip(logits, present, strict=True)]
        np.testing.assert_allclose(actual, expected, atol=1e-6, err_msg=str(settings))
    assert compiled._cache_size() == 1


def test_draws_have_the_distribution():
    settings, count = Sampling(temperature=1.3, top_k=6, min_p=0.02), 20_000
    logits, present = draw_logits(1)
    probabilities = oracle(logits[0], present[0], settings)
    rows = [np.repeat(x, count, axis=0) for x in (logits, present)]
    tokens = sample(rows[0], row_keys(range(count)), jnp.full(count, 7), rows[1], settings.as_arrays())
    frequencies = np.bincount(tokens, minlength=VOCAB) / count
    assert (frequencies[probabilities == 0] == 0).all()
    error = np.abs(frequencies - probabilities)
    assert (error <= 5 * np.sqrt(probabilities * (1 - probabilities) / count)).all()
    again = sample(
        logits.repeat(200, 0), row_keys([3] * 200), jnp.arange(200), present.repeat(200, 0), settings.as_arrays()
    )
    assert len(set(again.tolist())) > 2  # the position is a part of the seed


def test_a_draw_does_not_depend_on_other_rows():
    logits, present = draw_logits(4)
    settings, positions = Sampling(top_p=0.9).as_arrays(), jnp.arange(4) + 5
    together = sample(logits, row_keys([4, 5, 6, 7]), positions, present, settings)
    for row in range(4):
        rows = slice(row, row + 1)
        alone = sample(logits[rows], row_keys([4 + row]), positions[rows], present[rows], settings)
        assert alone[0] == together[row]
    order = [2, 0, 3, 1]
    moved = sample(logits[order], row_keys([6, 4, 7, 5]), positions[jnp.array(order)], present[order], settings)
    np.testing.assert_array_equal(moved, together[jnp.array(order)])


def test_temperature_zero_takes_the_most_likely_token():
    logits, present = draw_logits()
    settings = Sampling(temperature=0).as_arrays()
    tokens = sample(logits, row_keys(range(4)), jnp.arange(4), np.zeros_like(present), settings)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", np.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_invalid_settings(name, value):
    with rejects(InputError, name):
        Sampling(**{name: value})
