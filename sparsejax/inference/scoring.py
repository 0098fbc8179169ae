"""Likelihood of continuations: a prompt is read once, and its caches are extended by each of its continuations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from sparsejax import sharding
from sparsejax.inference.generation import CHUNK, Parameters, Plan, prefill, round_up
from sparsejax.model import Cache, Functional

Scores = tuple[np.ndarray, np.ndarray]  # log-likelihood of each token, and whether it is the most likely one, [n]


def token_scores(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"]
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """Returns the log-likelihood of each target, and whether it is the most likely token."""
    logits = logits.astype(jnp.float32)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, targets), logits.argmax(axis=-1) == targets


def score_continuations(
    model: Functional,
    parameters: Parameters,
    prompts: Sequence[np.ndarray],
    continuations: Sequence[Sequence[np.ndarray]],
) -> list[list[Scores]]:
    """Scores several continuations of each prompt.

    The cost is that of one prefill of the prompts and of their continuations without the last token, instead of a
    forward pass over the prompt per continuation.

    Args:
      model: A causal model.
      parameters: Its parameters.
      prompts: Ids per row, at least one.
      continuations: Continuations per row: ids, at least one.

    Returns:
      The scores of each continuation of each row.
    """
    sizes = [len(prompt) for prompt in prompts]
    end = max(size + max(map(len, row)) for size, row in zip(sizes, continuations, strict=True))
    plan = Plan.build(sizes, end - max(sizes), model.config.embedding.max_length)
    mesh = sharding.mesh_of(parameters)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        state, logits = prefill(model, parameters, prompts, plan)
        scores: list[list[Scores]] = [[] for _ in prompts]
        for index in range(max(map(len, continuations))):
            rows = [row[index] if index < len(row) else np.zeros(0, np.int32) for row in continuations]
            parts = [_score_tokens(logits[:, None], _pad([ids[:1] for ids in rows], 1))]
            cache = state.cache  # of the prompt: every continuation starts from it
            for start in range(0, max(map(len, rows)) - 1, CHUNK):
                chunk = [ids[start : start + CHUNK + 1] for ids in rows]
                counts = np.array([max(len(ids) - 1, 0) for ids in chunk], np.int32)
                size = min(round_up(int(counts.max())), CHUNK, plan.length)
                inputs, targets = (_pad([ids[part] for ids in chunk], size) for part in (slice(-1), slice(1, None)))
                arrays = inputs, targets, counts, state.positions + start
                *part, cache = _score_chunk(model, plan.length, parameters, cache, *arrays)
                parts.append(tuple(part))
            values, hits = (np.concatenate([np.asarray(part[i]) for part in parts], axis=1) for i in range(2))
            for row, ids in enumerate(rows):
                if len(ids):
                    scores[row].append((values[row, : len(ids)], hits[row, : len(ids)]))
    return scores


def _pad(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    padded = np.zeros((len(rows), size), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


_score_tokens = jax.jit(token_scores)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_chunk(
    model: Functional,
    length: int,
    parameters: Parameters,
    cache: Cache,
    inputs: Array,
    targets: Array,
    counts: Array,
    positions: Array,
) -> tuple[Any, ...]:
    """Returns the scores of the targets, and the cache after the inputs; the cache before them remains valid."""
    logits, cache = model.bind(parameters).extend(inputs, cache, positions, length, counts)
    return *token_scores(logits, targets), cache
