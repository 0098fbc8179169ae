"""What `show` counts, compared with the arrays of the model."""

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
from sparsejax.layers import AttentionConfig, LatentConfig, MixerConfig

ROWS = 512  # queries whose pairs are counted at a time


def check_account(subject: Subject) -> Iterator[Finding]:
    """Compares parameters, cache bytes and scored pairs with what the account states."""
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


def _scores_every_pair(mixer: MixerConfig | None) -> TypeGuard[AttentionConfig | LatentConfig]:
    """Whether a mixer scores the pairs of its pattern, and no selection of them."""
    return isinstance(mixer, AttentionConfig | LatentConfig) and getattr(mixer, "indexer", None) is None


def _count_pairs(mixer: AttentionConfig | LatentConfig, length: int) -> int:
    """Pairs that the definition of the pattern allows, over all heads."""
    pattern, pairs = mixer.connectivity, 0
    for start in range(0, length, ROWS):
        queries = np.arange(start, min(start + ROWS, length))
        pairs += int(pattern.counts(queries[:, None], np.arange(length), length, length).sum())
    return pairs if pattern.heads is not None else pairs * mixer.heads


def _equal(name: str, actual: int, stated: int) -> Finding:
    detail = f"{actual:,} as counted" if actual == stated else f"{actual:,}, but `show` counts {stated:,}"
    return Finding(name, actual == stated, detail)
