"""Masks have exact counts, prefixes are not scored, and both are functions of seed and row number."""

import dataclasses

import numpy as np
import pytest

from sparsejax.data.config import DataConfig, MaskConfig
from sparsejax.data.objectives import apply_objective
from sparsejax.data.tokenizers import Bytes, Characters

pytestmark = pytest.mark.quick

LENGTH, ROWS = 200, 40
TOKENIZER = Bytes()


def config(**mask):
    return DataConfig("text", "", LENGTH, objective="masked", mask=MaskConfig(**mask))


def text_batch(rows=ROWS):
    text = (
        np.random.default_rng(0).choice(np.frombuffer(b"abcdefgh   .", np.uint8), (rows, LENGTH + 1)).astype(np.int32)
    )
    text[:, 50] = 0  # a separator
    weights = np.ones((rows, LENGTH), np.float32)
    weights[:, 180:] = 0  # padding
    return {"inputs": text[:, :-1], "targets": text[:, 1:], "weights": weights}


def mask(settings, batch=None, seed=0, numbers=None, tokenizer=TOKENIZER):
    numbers = np.arange(ROWS) if numbers is None else numbers
    return apply_objective(settings, tokenizer, text_batch() if batch is None else batch, seed, numbers)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_exactly_the_chosen_tokens_change(unit):
    batch, masked = text_batch(), mask(config(unit=unit))
    chosen = masked["weights"] > 0
    allowed = (batch["weights"] > 0) & (batch["inputs"] != 0)
    assert (chosen.sum(1) == round(0.15 * 179)).all()
    assert not (chosen & ~allowed).any()
    np.testing.assert_array_equal(masked["targets"], batch["inputs"])
    np.testing.assert_array_equal(masked["inputs"][~chosen], batch["inputs"][~chosen])
    hidden = (masked["inputs"] == TOKENIZER.mask) & chosen
    assert (hidden.sum(1) == round(0.8 * 27)).all()
    assert {name: array.dtype for name, array in masked.items()} == {name: array.dtype for name, array in batch.items()}
    # Of the other five, two are random tokens, which rarely equal the original.
    same = ((masked["inputs"] == batch["inputs"]) & chosen).sum(1)
    assert same.min() == 3
    assert same.mean() < 3.1


def test_every_token_is_chosen_equally_often():
    settings, batch = config(), text_batch(1)
    counts = sum(mask(settings, batch, numbers=np.array([n]))["weights"][0] for n in range(2000))
    assert (counts[:180] > 0).sum() == 179
    inside = counts[:180][counts[:180] > 0] / 2000
    assert abs(inside.mean() - 27 / 179) < 1e-6
    assert inside.std() < 0.012  # binomial: 0.008


def test_words_are_masked_as_a_whole():
    batch, masked = text_batch(), mask(config(unit="word", masked=1.0, random=0.0))
    chosen = masked["weights"] > 0
    letter = (batch["inputs"] > 96) & (batch["weights"] > 0)
    inside = letter[:, 1:] & letter[:, :-1]  # both letters of one word
    assert (chosen[:, 1:] == chosen[:, :-1])[inside].all()


def test_spans_have_the_configured_mean_length():
    masked = mask(config(unit="span", span=3.0))
    chosen = np.pad(masked["weights"] > 0, ((0, 0), (1, 0)))
    runs = (chosen[:, 1:] & ~chosen[:, :-1]).sum()
    assert 2 < chosen.sum() / runs < 4.5
    single = mask(config(unit="span", span=1.0, longest=1))
    assert ((single["weights"] > 0).sum(1) == 27).all()


def test_a_row_is_a_function_of_its_number_and_the_seed():
    settings = config(unit="span")
    whole = mask(settings)
    part = {name: array[10:20] for name, array in text_batch().items()}
    masked_part = mask(settings, part, numbers=np.arange(10, 20))
    for name in whole:
        np.testing.assert_array_equal(whole[name][10:20], masked_part[name])
    assert (mask(settings, seed=1)["weights"] != whole["weights"]).any()
    assert (mask(settings, numbers=np.arange(ROWS) + 1)["weights"] != whole["weights"]).any()


def test_rows_of_padding_and_of_a_single_token():
    batch = text_batch(2)
    batch["weights"][0], batch["weights"][1, 1:] = 0, 0
    masked = mask(config(), batch, numbers=np.arange(2))
    assert masked["weights"].sum(1).tolist() == [0, 1]


def test_random_tokens_exclude_the_mask():
    @dataclasses.dataclass
    class Inside(Characters):
        mask = 5

    batch = text_batch()
    batch["inputs"] = batch["inputs"] % 5
    masked = mask(config(masked=0.0, random=1.0), batch, tokenizer=Inside())
    chosen = masked["inputs"][masked["weights"] > 0]
    assert set(chosen) == set(range(27)) - {5}


def test_prefixes_are_not_scored():
    settings = DataConfig("text", "", LENGTH, objective="prefix", prefix=60)
    batch = apply_objective(settings, TOKENIZER, text_batch(), 0, np.arange(ROWS))
    expected = text_batch()["weights"]
    expected[:, :59] = 0  # token 60 is predicted at 59, the last position of the prefix
    np.testing.assert_array_equal(batch["weights"], expected)
