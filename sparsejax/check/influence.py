"""Which inputs influence which outputs: causality, documents, padding and receptive fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from sparsejax.check.certificate import Finding
from sparsejax.check.subject import Subject
from sparsejax.layers import (
    AttentionConfig,
    Context,
    ConvConfig,
    LatentConfig,
    Layer,
    LshConfig,
    ParallelConfig,
    Tokens,
)
from sparsejax.layers.protocols import MixerConfig
from sparsejax.patterns import drawing

QUERIES = 24  # outputs whose gradients are taken, per layer
RECENT = 4  # keys before a query that have an influence through every recurrence
ALONE = 2e-5  # largest difference between a document in a packed row and alone, relative to the largest logit


def check_causality(subject: Subject) -> Iterator[Finding]:
    """Other tokens from a position on change no logit before it, bit for bit."""
    if not subject.config.causal:
        yield Finding("causality", None, "the model is not causal")
        return
    cuts = _choose_positions(subject)[1:]
    (tokens,), (other,) = subject.draw_tokens(1), subject.draw_tokens(1, seed=1)
    edited = np.where(np.arange(subject.length) < cuts[:, None], tokens, other)
    logits = subject.forward(np.concatenate([tokens[None], edited]))
    detail = f"{len(cuts)} edits of a suffix change no logit before it, bitwise"
    for cut, changed in zip(cuts, logits[1:], strict=True):
        difference = np.abs(changed[:cut] - logits[0, :cut]).max(axis=-1)
        if not (difference == 0).all():
            first = int(np.flatnonzero(difference != 0)[0])
            worst = np.nanmax(difference)
            yield Finding(
                "causality",
                False,
                f"the logits at position {first} change by up to {worst:.2g} with the tokens from position {cut} on",
            )
            return
    yield Finding("causality", True, detail)


def check_documents(subject: Subject) -> Iterator[Finding]:
    """In a packed row, tokens of a document or of padding change no logit of another token's document.

    Row 0 packs three documents and padding, and the next four rows change one part each. Then each document is alone,
    with padding elsewhere. The last two rows are one document with padding before and inside it.
    """
    if subject.config.head.pool != "none":
        yield Finding("documents", None, "the head averages over all tokens")
        return
    length = subject.length
    starts = np.asarray((0, length // 3, 2 * length // 3, length - 2))
    part = np.searchsorted(starts, np.arange(length), side="right")
    hole = np.isin(np.arange(length), (0, 1, length // 2))
    tokens, other = subject.draw_tokens(2, seed=2)
    edits = [part == number for number in (1, 2, 3, 4)]
    rows = [tokens, *(np.where(edit, other, tokens) for edit in edits), *[tokens] * 4, np.where(hole, other, tokens)]
    packed, alone = np.where(part <= 3, part, 0), [np.where(part == number, 1, 0) for number in (1, 2, 3)]
    segments = np.stack([*[packed] * 5, *alone, *[np.ones(length, int)] * 2])
    mask = (segments > 0) & ~(hole & (np.arange(10) >= 8)[:, None])
    positions = np.where(np.arange(10)[:, None] < 8, np.arange(length) - starts[part - 1], np.arange(length))
    context = Context(Tokens(segments=jnp.asarray(segments), mask=jnp.asarray(mask), positions=jnp.asarray(positions)))
    logits = subject.forward(np.stack(rows), context)
    for number, name in enumerate(("document 1", "document 2", "document 3", "padding", "padding in a document"), 1):
        first, row, changed = (0, number, edits[number - 1]) if number <= 4 else (8, 9, hole)
        difference = np.where(mask[first] & ~changed, np.abs(logits[row] - logits[first]).max(axis=-1), 0)
        if (difference != 0).any():
            position, ignored = int(np.flatnonzero(difference)[0]), "segments" if number <= 3 else "mask"
            detail = f"other tokens in {name} change the logits at position {position} by up to {difference.max():.2g}"
            yield Finding("documents", False, f"{detail}; a mixer ignores context.tokens.{ignored}")
            return
    differences = [np.abs(logits[4 + number] - logits[0])[part == number].max() for number in (1, 2, 3)]
    error = float(max(differences) / np.abs(logits[0]).max())
    detail = "packed documents and padding do not interact, bitwise; alone, the logits of a document differ"
    yield Finding("documents", error <= ALONE, f"{detail} by {error:.1e} of the largest, at most {ALONE:.0e}")


def check_receptive_fields(subject: Subject) -> Iterator[Finding]:
    """The gradient of a layer's output is zero for inputs outside the declared pattern, and not inside."""
    model, queries = subject.bind(), _choose_positions(subject)
    layers = list(model.unroll())
    embedded, context = model.embed(jnp.asarray(subject.draw_tokens(1), jnp.int32), Context())
    x = jnp.asarray(np.random.default_rng(subject.seed).normal(size=embedded.shape), embedded.dtype)
    for name, pattern in dict(subject.config.connectivity).items():
        index = subject.config.names.index(name)
        influence = _trace(layers[index], index, x, queries, context)
        mask = pattern.allows(queries[:, None], np.arange(subject.length), subject.length, subject.length)
        allowed = np.asarray(mask.any(axis=0) if mask.ndim == 3 else mask)
        allowed |= queries[:, None] == np.arange(subject.length)
        yield _compare(
            name, influence, allowed, queries, _select_required(subject.config.layers[name], allowed, queries)
        )


def _compare(name: str, influence: Any, allowed: Any, queries: Any, required: Any) -> Finding:
    title = f"receptive field of {name}"
    for wrong, problem in (
        (influence & ~allowed, "depends on the input at {key}, outside the declared pattern"),
        (required & ~influence, "does not depend on the input at {key}, inside the declared pattern"),
    ):
        if wrong.any():
            row, key = np.argwhere(wrong)[0]
            return Finding(title, False, f"the output at {queries[row]} {problem.format(key=key)}")
    inside = f"not zero at {int(required.sum()):,} inputs inside"
    return Finding(title, True, f"gradients of {len(queries)} outputs: zero outside the pattern, {inside}")


def _select_required(
    layer: Any, allowed: Bool[np.ndarray, "q t"], queries: Int[np.ndarray, " q"]
) -> Bool[np.ndarray, "q t"]:
    """The inputs that must have an influence: all of a pattern, the last few of a recurrence."""
    if layer.mixer is not None and _selects(layer.mixer):
        return np.zeros_like(allowed)
    if layer.mixer is None or (layer.side is None and _is_exact(layer.mixer)):
        return allowed
    keys = np.arange(allowed.shape[1])
    return allowed & (keys > queries[:, None] - RECENT) & (keys <= queries[:, None])


def _is_exact(config: MixerConfig) -> bool:
    """Whether every key of the pattern has an influence that float32 can represent."""
    return isinstance(config, AttentionConfig | LatentConfig | ConvConfig)


def _selects(config: MixerConfig) -> bool:
    """Whether the content selects among the keys of the pattern."""
    if isinstance(config, ParallelConfig):
        return any(_selects(branch.mixer) for branch in config.branches.values())
    return isinstance(config, LshConfig) or getattr(config, "indexer", None) is not None


def _trace(
    layer: Layer, index: int, x: Float[jax.Array, "1 t m"], queries: Int[np.ndarray, " q"], context: Context
) -> Bool[np.ndarray, "q t"]:
    """Whether the gradient of an output with respect to each input is not zero."""
    graph, state = nnx.split(layer)
    weights = jnp.linspace(0.5, 1.5, x.shape[-1])

    @jax.jit
    def trace(state: Any, x: jax.Array, queries: jax.Array, context: Context) -> jax.Array:
        module = nnx.merge(graph, state)

        def run(x: jax.Array) -> jax.Array:
            extras = context.with_extras(layer=jnp.asarray(index), embeddings=x)
            return (module(x, extras)[0][0].astype(jnp.float32) * weights).sum(axis=-1)

        outputs, pull = jax.vjp(run, x)
        return jax.lax.map(lambda q: (pull(jnp.zeros_like(outputs).at[q].set(1))[0][0] != 0).any(axis=-1), queries)

    return np.asarray(trace(state, x, jnp.asarray(queries), context))


def _choose_positions(subject: Subject) -> Int[np.ndarray, " q"]:
    """Positions at the edges of patterns, tiles and chunks, and random ones, ascending."""
    length = subject.length
    scales = {scale for _, pattern in subject.config.connectivity for scale in drawing.list_scales(pattern)}
    edges = {0, 1, length // 2, length - 2, length - 1, *(e + d for e in (64, 128) for d in (-1, 0, 1))}
    edges |= {scale + d for scale in sorted(scales)[:4] for d in (0, 1, 2)}
    edges = {edge for edge in edges if 0 <= edge < length}
    random = np.random.default_rng(subject.seed).permutation(length)[: max(0, QUERIES - len(edges))]
    return np.asarray(sorted(edges | set(random.tolist())))
