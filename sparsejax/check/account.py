"""What `show` counts, compared with the arrays of the model, and what patterns state, with their masks."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from typing import TypeGuard

import jax
import numpy as np

from sparsejax.account import account_model, count_bytes
from sparsejax.check.certificate import Finding
from sparsejax.check.subject import Subject
from sparsejax.errors import InputError
from sparsejax.layers import AttentionConfig, LatentConfig, MixerConfig
from sparsejax.patterns import Pattern
from sparsejax.patterns.testing import check_pattern

ROWS = 512  # queries whose pairs are counted at a time
SHORT, LONG = 131, 512  # tokens for which all pairs of a pattern are visited
TILES = ((8, 8), (64, 64))


def check_account(subject: Subject) -> Iterator[Finding]:
    """Compares parameters, cache bytes, pairs and tiles with what the account and the patterns state."""
    layers, ends = account_model(subject.config, subject.length)
    total = functools.reduce(operator.add, layers, ends)
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(subject.parameters))
    yield _equal("parameters", size, total.parameters)
    if subject.config.causal:
        model = subject.bind()
        single, double = (
            count_bytes(jax.eval_shape(functools.partial(model.init_cache, batch, subject.length))) for batch in (1, 2)
        )
        yield _equal("cache bytes", double - single, total.cache_bytes)
    for name in dict.fromkeys(subject.config.names):
        layer = subject.config.layers[name]
        if layer.side is None and _scores_every_pair(layer.mixer):
            stated = layers[subject.config.names.index(name)].pairs
            yield _equal(f"pairs of {name}", _count_pairs(layer.mixer, subject.length), stated)
    for name, pattern in dict(subject.config.connectivity).items():
        yield _check_pattern(f"pattern of {name}", pattern, subject.length)


def _check_pattern(name: str, pattern: Pattern, length: int) -> Finding:
    """Compares what a pattern states with its mask: bounds, layouts, the last query of a key."""
    for size in (length, SHORT, LONG):
        try:
            pattern.check(size, size)
        except InputError:
            continue
        if size <= LONG:
            break
    else:
        return Finding(name, None, f"all pairs of {length:,} tokens are too many to visit")
    try:
        check_pattern(pattern, [(size, size)], TILES, shifts=(), query_offsets=(), text=False)
    except AssertionError as error:
        return Finding(name, False, " ".join(str(error).split()))
    return Finding(name, True, f"bounds, layouts and caches are those of the mask of {size} tokens")


def _scores_every_pair(mixer: MixerConfig | None) -> TypeGuard[AttentionConfig | LatentConfig]:
    """Whether a mixer scores the pairs of its pattern, and no selection of them."""
    return isinstance(mixer, AttentionConfig | LatentConfig) and not mixer.selects


def _count_pairs(mixer: AttentionConfig | LatentConfig, length: int) -> int:
    """Pairs that the definition of the pattern allows, over all heads."""
    pattern, pairs = mixer.connectivity, 0
    for start in range(0, length, ROWS):
        queries = np.arange(start, min(start + ROWS, length))
        pairs += int(pattern.allows(queries[:, None], np.arange(length), length, length).sum())
    return pairs if pattern.heads is not None else pairs * mixer.heads


def _equal(name: str, actual: int, stated: int) -> Finding:
    detail = f"{actual:,} as counted" if actual == stated else f"{actual:,}, but `show` counts {stated:,}"
    return Finding(name, actual == stated, detail)
