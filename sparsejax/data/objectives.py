"""What is to be predicted: the next token, hidden tokens, or what follows a prefix."""

from __future__ import annotations

import numpy as np

from sparsejax.data.config import DataConfig, MaskConfig
from sparsejax.data.rows import Batch
from sparsejax.data.tokenizers import Tokenizer


def apply_objective(config: DataConfig, tokenizer: Tokenizer, batch: Batch, seed: int, numbers: np.ndarray) -> Batch:
    """A batch of text under `config.objective`.

    Args:
      config: Says which one.
      tokenizer: What the tokens mean.
      batch: Inputs, targets (the next tokens) and weights [b, t].
      seed: For the draws.
      numbers: int64 [b], which rows of the run these are. A row is a function of its tokens, `seed` and its number.
    """
    if config.objective == "masked":
        return _hide(config.mask, tokenizer, batch, seed, numbers)
    if config.objective == "prefix":
        # The last token of the prefix is the first to predict one outside of it.
        after = np.arange(batch["weights"].shape[1]) >= config.prefix - 1
        return batch | {"weights": batch["weights"] * after.astype(np.float32)}
    return batch


def _hide(config: MaskConfig, tokenizer: Tokenizer, batch: Batch, seed: int, numbers: np.ndarray) -> Batch:
    tokens = batch["inputs"]
    inputs, weights = tokens.copy(), np.zeros_like(batch["weights"])
    for row, number in enumerate(numbers):
        random = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
        allowed = (batch["weights"][row] > 0) & (
            tokens[row] != (-1 if tokenizer.separator is None else tokenizer.separator)
        )
        chosen = choose(config, tokens[row], allowed, tokenizer, random)
        weights[row, chosen] = 1
        hidden, swapped = (round(len(chosen) * share) for share in (config.masked, config.masked + config.random))
        inputs[row, chosen[:hidden]] = tokenizer.mask
        inputs[row, chosen[hidden:swapped]] = _draw(tokenizer, swapped - hidden, random)
    return batch | {"inputs": inputs, "targets": tokens, "weights": weights}


def _draw(tokenizer: Tokenizer, count: int, random: np.random.Generator) -> np.ndarray:
    """Tokens of the vocabulary, the mask left out."""
    inside = tokenizer.mask < tokenizer.size
    drawn = random.integers(0, tokenizer.size - inside, count)
    return drawn + (drawn >= tokenizer.mask) * inside


def choose(
    config: MaskConfig, tokens: np.ndarray, allowed: np.ndarray, tokenizer: Tokenizer, random: np.random.Generator
) -> np.ndarray:
    """Which tokens of a row are to be found again, in random order: `share` of those allowed, rounded, at least one.

    Words are taken in random order, each if it still fits: the count is met unless nothing that is left fits. Spans
    have geometric lengths of mean `span`, at most `longest`, and start anywhere that is free; the last is cut to
    meet the count.

    Args:
      config: The share and the unit.
      tokens: Integers [t].
      allowed: bool [t].
      tokenizer: Says where words start.
      random: Where draws come from.
    """
    places = np.flatnonzero(allowed)
    count = min(len(places), max(1, round(config.share * len(places))))
    if config.unit == "token" or not count:
        return random.choice(places, count, replace=False)
    chosen = (_choose_words if config.unit == "word" else _choose_spans)(
        config, tokens, allowed, count, tokenizer, random
    )
    return random.permutation(np.flatnonzero(chosen))


def _choose_words(config, tokens, allowed, count, tokenizer, random) -> np.ndarray:
    # A word that a separator or padding breaks is two words.
    starts = tokenizer.starts(tokens) | ~allowed | ~np.concatenate([[False], allowed[:-1]])
    starts[0] = True
    first = np.flatnonzero(starts)
    stop = np.append(first[1:], len(tokens))
    chosen = np.zeros(len(tokens), bool)
    for word in random.permutation(np.flatnonzero(allowed[first])):
        if stop[word] - first[word] <= count:
            chosen[first[word] : stop[word]] = True
            count -= stop[word] - first[word]
            if not count:
                break
    return chosen


def _choose_spans(config, tokens, allowed, count, tokenizer, random) -> np.ndarray:
    chosen = np.zeros(len(tokens), bool)
    for place in random.permutation(np.flatnonzero(allowed)):
        if chosen[place]:
            continue
        stop = place + min(random.geometric(1 / config.span), config.longest, count)
        free = allowed[place:stop] & ~chosen[place:stop]
        stop = place + (len(free) if free.all() else int(np.argmin(free)))
        chosen[place:stop] = True
        count -= stop - place
        if not count:
            break
    return chosen
