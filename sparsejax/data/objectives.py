"""Objectives: next-token prediction, masked tokens, and prediction after a prefix."""

from __future__ import annotations

import numpy as np

from sparsejax.data.config import DataConfig, MaskConfig
from sparsejax.data.rows import Batch
from sparsejax.data.tokenizers import Tokenizer


def apply_objective(config: DataConfig, tokenizer: Tokenizer, batch: Batch, seed: int, numbers: np.ndarray) -> Batch:
    """Applies `config.objective` to a batch of text.

    Args:
      config: The configuration.
      tokenizer: The tokenizer of the text.
      batch: Inputs, targets (the next tokens) and weights [b, t].
      seed: Seed of the masks.
      numbers: Number of each row within the run, int64 [b]. A masked row is a function of its tokens, `seed` and its
        number.
    """
    if config.objective == "masked":
        return _mask(config.mask, tokenizer, batch, seed, numbers)
    if config.objective == "prefix":
        # The last token of the prefix predicts the first token after it.
        after = np.arange(batch["weights"].shape[1]) >= config.prefix - 1
        return {**batch, "weights": batch["weights"] * after.astype(np.float32)}
    return batch


def _mask(config: MaskConfig, tokenizer: Tokenizer, batch: Batch, seed: int, numbers: np.ndarray) -> Batch:
    tokens = batch["inputs"]
    inputs, weights = tokens.copy(), np.zeros_like(batch["weights"])
    for row, number in enumerate(numbers):
        random = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
        allowed = (batch["weights"][row] > 0) & (
            tokens[row] != (-1 if tokenizer.separator is None else tokenizer.separator)
        )
        chosen = choose(config, tokens[row], allowed, tokenizer, random)
        weights[row, chosen] = 1
        masked, changed = (round(len(chosen) * share) for share in (config.masked, config.masked + config.random))
        inputs[row, chosen[:masked]] = tokenizer.mask
        inputs[row, chosen[masked:changed]] = _draw(tokenizer, changed - masked, random)
    return {**batch, "inputs": inputs, "targets": tokens, "weights": weights}


def _draw(tokenizer: Tokenizer, count: int, random: np.random.Generator) -> np.ndarray:
    """Random tokens other than the mask."""
    inside = tokenizer.mask < tokenizer.size
    drawn = random.integers(0, tokenizer.size - inside, count)
    return drawn + (drawn >= tokenizer.mask) * inside


def choose(
    config: MaskConfig, tokens: np.ndarray, allowed: np.ndarray, tokenizer: Tokenizer, random: np.random.Generator
) -> np.ndarray:
    """Chooses the tokens of a row to predict: `share` of the allowed ones, rounded, and at least one.

    Words are chosen in random order, as long as they fit into the count; the count is met unless no remaining word
    fits. Spans have geometric lengths of mean `span` and at most `longest`, and start at any free position; the last
    span is cut to meet the count.

    Args:
      config: Share and unit.
      tokens: Integers [t].
      allowed: Tokens that may be chosen, bool [t].
      tokenizer: Defines where words start.
      random: Random number generator.

    Returns:
      Positions in random order, int64 [n].
    """
    positions = np.flatnonzero(allowed)
    count = min(len(positions), max(1, round(config.share * len(positions))))
    if config.unit == "token" or not count:
        return random.choice(positions, count, replace=False)
    if config.unit == "word":
        chosen = _choose_words(tokenizer.starts(tokens), allowed, count, random)
    else:
        chosen = _choose_spans(config, allowed, count, random)
    return random.permutation(np.flatnonzero(chosen))


def _choose_words(starts: np.ndarray, allowed: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    # A word interrupted by a separator or padding is two words.
    starts = starts | ~allowed | ~np.concatenate([[False], allowed[:-1]])
    starts[0] = True
    first = np.flatnonzero(starts)
    stop = np.append(first[1:], len(starts))
    chosen = np.zeros(len(starts), bool)
    for word in random.permutation(np.flatnonzero(allowed[first])):
        if stop[word] - first[word] <= count:
            chosen[first[word] : stop[word]] = True
            count -= stop[word] - first[word]
            if not count:
                break
    return chosen


def _choose_spans(config: MaskConfig, allowed: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    chosen = np.zeros(len(allowed), bool)
    for start in random.permutation(np.flatnonzero(allowed)):
        if chosen[start]:
            continue
        stop = start + min(random.geometric(1 / config.span), config.longest, count)
        free = allowed[start:stop] & ~chosen[start:stop]
        stop = start + (len(free) if free.all() else int(np.argmin(free)))
        chosen[start:stop] = True
        count -= stop - start
        if not count:
            break
    return chosen
