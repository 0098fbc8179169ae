"""The vectorised n-grams against the formula written out with a dictionary."""

from collections import Counter

import numpy as np
import pytest

from sparsejax.data.ngram import witten_bell

pytestmark = pytest.mark.quick

RANDOM = np.random.default_rng(0)
TRAIN = RANDOM.choice(np.frombuffer(b"abcd\xff\0", np.uint8), 400)
TEXT = np.concatenate([RANDOM.choice(np.frombuffer(b"abcd\xff\0", np.uint8), 60), [101, 97, 98]]).astype(np.uint8)


def probability(train: bytes, context: bytes, byte: int) -> float:
    """P(byte | all of `context`), straight from the definition."""
    shorter = probability(train, context[1:], byte) if context else 1 / 256
    k = len(context)
    after = Counter(train[i + k] for i in range(len(train) - k) if train[i : i + k] == context)
    if not after:
        return shorter
    return (after[byte] + len(after) * shorter) / (after.total() + len(after))


def test_against_a_dictionary():
    train, text = TRAIN.tobytes(), TEXT.tobytes()
    expected = [[probability(train, text[max(0, i - k) : i], text[i]) for i in range(len(text))] for k in range(6)]
    np.testing.assert_allclose(witten_bell(TRAIN, TEXT, 5), expected, rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"a", b"ab", b"dcb", b"zz", b"abcdabcd"])
def test_probabilities_are_normalized(context):
    last = [witten_bell(TRAIN, np.frombuffer(context + bytes([byte]), np.uint8), 7)[:, -1] for byte in range(256)]
    np.testing.assert_allclose(np.sum(last, axis=0), 1, rtol=1e-12)


def test_texts_shorter_than_the_context():
    assert witten_bell(TRAIN, TEXT[:2], 5).shape == (6, 2)
    assert witten_bell(TRAIN, TEXT[:0], 5).shape == (6, 0)
    np.testing.assert_array_equal(witten_bell(TRAIN[:0], TEXT, 3), 1 / 256)
    np.testing.assert_allclose(witten_bell(TRAIN[:1], TRAIN[:1], 3), (1 + 1 / 256) / 2)
