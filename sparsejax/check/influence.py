"""Which inputs influence which outputs: causality, receptive fields, documents and padding."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sparsejax.check.certificate import Finding
from sparsejax.check.subject import Subject
from sparsejax.layers import (
    AttentionConfig,
    Context,
    ConvConfig,
    LatentConfig,
    Layer,
    LayerConfig,
    LshConfig,
    MixerConfig,
    ParallelConfig,
    Tokens,
)
from sparsejax.patterns import Pattern, drawing

QUERIES = 16  # fewest edits of a suffix, and outputs whose gradients are taken, per layer
HEAVY = 2**28  # layers times squared tokens from which fewer edits and gradients are taken
TRACED = 2  # layers per name whose gradients are then taken
SHORTEST_ROW = 7  # tokens of three documents and padding
RECENT = 4  # keys before a query that have an influence through every recurrence
# Largest difference between a document in a packed row and alone, relative to the largest logit.
ALONE = 2e-5
DOUBLE = 1e-12  # largest change in float64 that is rounding, relative to the largest logit


class Edit(NamedTuple):
    """Two rows of a batch with the same tokens but at some positions.

    Attributes:
      row: The changed row.
      base: The row that it is compared with.
      kept: Positions [t] whose logits must not change.
      problem: What it means if they do, with the fields `position` and `change`.
    """

    row: int
    base: int
    kept: Bool[np.ndarray, " t"]
    problem: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """A forward pass and the gradients of its layers; row i has other tokens from `positions[i]` on, but for row 0.

    Attributes:
      positions: Ascending positions, from 0: cuts, and the queries whose gradients are taken.
      tokens: [b, t].
      logits: [b, t, v].
      touched: Per layer name, whether the gradient of the layer's output at `positions[i]` of row i is not zero for an
        input, in any layer of the name, [b, t].
      reached: The same, in every layer of the name.
    """

    positions: Int[np.ndarray, " b"]
    tokens: Int[np.ndarray, "b t"]
    logits: Float[np.ndarray, "b t v"]
    touched: dict[str, Bool[np.ndarray, "b t"]]
    reached: dict[str, Bool[np.ndarray, "b t"]]


def trace(subject: Subject) -> Trace:
    """Runs the model, and then its layers one by one to take the gradients of each."""
    positions = _choose_positions(subject)
    (tokens,), (other,) = subject.draw_tokens(1), subject.draw_tokens(1, seed=1)
    cuts = np.where(positions > 0, positions, subject.length)
    rows = np.where(np.arange(subject.length) < cuts[:, None], tokens, other)
    touched = {name: np.zeros(rows.shape, bool) for name in subject.config.names}
    reached = {name: ~touched[name] for name in subject.config.names}

    def differentiate(layer: Layer, x: jax.Array, context: Context) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def run(x: jax.Array, embeddings: jax.Array) -> jax.Array:
            return layer(x, context.with_extras(embeddings=embeddings))[0]

        y, pull_back = jax.vjp(run, x, context.extras.embeddings)
        weights = jnp.linspace(0.5, 1.5, y.shape[-1]).astype(y.dtype)
        gradients = pull_back(jnp.zeros_like(y).at[np.arange(len(y)), positions].set(weights))
        return y, tuple((gradient != 0).any(axis=-1) for gradient in gradients)

    logits = subject.forward(rows)
    traced = TRACED if _is_heavy(subject) else None
    for name, (stream, embeddings) in subject.run_layers(rows, differentiate, most=traced)[1]:
        touched[name] |= np.asarray(stream | embeddings)
        reached[name] &= np.asarray(stream)
    return Trace(positions, rows, logits, touched, reached)


def check_causality(subject: Subject, trace: Trace) -> Finding:
    """Other tokens from a position on change no logit before it."""
    if not subject.config.causal:
        return Finding("causality", None, "the model is not causal")
    if leaks := [f"{path}: {mixer.leaks}" for path, mixer in subject.mixers.items() if mixer.leaks]:
        return Finding("causality", None, f"leaks allowed: {'; '.join(leaks)}")
    problem = "the logits at position {{position}} change by up to {{change:.2g}} with the tokens from position {} on"
    edits = [
        Edit(row, 0, np.arange(subject.length) < cut, problem.format(cut))
        for row, cut in enumerate(trace.positions)
        if row > 0
    ]
    problem, how = _compare(subject, edits, lambda subject: subject.forward(trace.tokens), trace.logits)
    if problem:
        keys, queries = np.arange(subject.length), trace.positions[:, None]
        leaking = [name for name, touched in trace.touched.items() if (touched & (keys > queries)).any()]
        return Finding("causality", False, problem + f", through {' and '.join(leaking)}" * bool(leaking))
    return Finding("causality", True, f"{len(edits)} edits of a suffix change no logit before it, {how}")


def check_documents(subject: Subject) -> Finding:
    """In a packed row, tokens of a document or of padding change no logit of another token's document.

    A document also has the logits that it has alone, with padding elsewhere: at its place in the row, and, if the
    patterns do not depend on the place in the row, at the start of a row.
    """
    if subject.config.head.pool != "none":
        return Finding("documents", None, "the head averages over all tokens")
    if subject.length < SHORTEST_ROW:
        return Finding("documents", None, f"{subject.length} tokens are too few for three documents")
    rows, context, edits, alone = _lay_out_documents(subject)
    logits = subject.forward(rows, context)
    problem, how = _compare(subject, edits, lambda subject: subject.forward(rows, context), logits)
    if problem:
        return Finding("documents", False, problem)
    if any(isinstance(config, LshConfig) for mixer in subject.mixers.values() for config in _branches(mixer)):
        detail = f"packed documents and padding do not interact, {how}; alone, LSH attention hashes into other chunks"
        return Finding("documents", True, detail)
    error = _compare_alone(subject, rows, context, logits, alone)
    detail = f"packed documents and padding do not interact, {how}; alone, the logits of a document differ"
    return Finding("documents", error <= ALONE, f"{detail} by {error:.1e} of the largest, at most {ALONE:.0e}")


def _compare_alone(
    subject: Subject,
    rows: np.ndarray,
    context: Context,
    logits: np.ndarray,
    alone: Sequence[tuple[int, np.ndarray, int]],
) -> float:
    """Largest difference of a document alone from the same one in a packed row, relative to the largest logit.

    A document alone is computed in other tiles, and depth amplifies their rounding: it is compared in float32, and if
    it then differs, in float64.
    """

    def measure(logits: np.ndarray) -> float:
        differences = (np.roll(logits[row], shift, axis=0) - logits[0] for row, _, shift in alone)
        error = max(np.abs(x[document]).max() for x, (_, document, _) in zip(differences, alone, strict=True))
        return float(error / np.abs(logits[0]).max())

    error = measure(logits if subject.exact is subject else subject.exact.forward(rows, context))
    if error <= ALONE:
        return error
    with jax.enable_x64(True), contextlib.suppress(TypeError, NotImplementedError):  # a mixer without float64
        return measure(subject.double.forward(rows, context))
    return error


def _lay_out_documents(subject: Subject) -> tuple[np.ndarray, Context, list[Edit], list[tuple[int, np.ndarray, int]]]:
    """Tokens and context of the rows, the edits among them, and the documents that are alone.

    Row 0 packs three documents and padding, and the next four rows change one part each. Then each document is alone.
    The last two rows are one document with padding before and inside it.

    Returns:
      Tokens [b, t], their context, the edits, and per document that is alone its row, which tokens of row 0 it has,
      and the distance between both places.
    """
    length = subject.length
    starts = np.asarray((0, length // 3, 2 * length // 3, length - 2))
    part = np.searchsorted(starts, np.arange(length), side="right")
    at, hole = np.arange(length), np.isin(np.arange(length), (0, 1, length // 2))
    tokens, other = subject.draw_tokens(2, seed=2)
    shifts = [(number, 0) for number in (1, 2, 3)]
    connectivity = {branch.connectivity for mixer in subject.mixers.values() for branch in _branches(mixer)}
    if all(_is_shift_invariant(pattern, starts) for pattern in connectivity):
        shifts += [(2, int(starts[1])), (3, int(starts[2]))]
    packed, whole = (np.where(part <= 3, part, 0), at - starts[part - 1]), (np.ones(length, int), at)
    rows = [(tokens, *packed), *[(np.where(part == number, other, tokens), *packed) for number in (1, 2, 3, 4)]]
    rows += [tuple(np.roll(x, -shift) for x in (tokens, part == number, packed[1])) for number, shift in shifts]
    rows += [(tokens, *whole), (np.where(hole, other, tokens), *whole)]
    inputs, segments, positions = (np.stack(column).astype(np.int32) for column in zip(*rows, strict=True))
    mask = segments > 0
    mask[-2:] &= ~hole
    ids = {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    problem = (
        "other tokens in {} change the logits at position {{position}} by up to {{change:.2g}}; "
        "a mixer ignores context.tokens.{}"
    )
    names = {1: "document 1", 2: "document 2", 3: "document 3", 4: "padding"}
    edits = [
        Edit(row, 0, mask[0] & (part != row), problem.format(name, "mask" if row == 4 else "segments"))
        for row, name in names.items()
    ]
    edits.append(Edit(len(rows) - 1, len(rows) - 2, mask[-1], problem.format("padding in a document", "mask")))
    alone = [(row, part == number, shift) for row, (number, shift) in enumerate(shifts, 5)]
    return inputs, Context(Tokens(mask=jnp.asarray(mask), **ids)), edits, alone


def _is_shift_invariant(pattern: Pattern, starts: Int[np.ndarray, " documents"]) -> bool:
    """Whether queries of a document attend to the keys to which they would attend at the start of a row."""
    mask = pattern.dense(int(starts[-1]))
    documents = (mask[..., first:end, first:end] for first, end in itertools.pairwise(starts))
    return all((document == mask[..., : document.shape[-1], : document.shape[-1]]).all() for document in documents)


def check_receptive_fields(subject: Subject, trace: Trace) -> Iterator[Finding]:
    """The gradient of a layer's output is zero for inputs outside the declared pattern, and not inside."""
    queries, keys = trace.positions[:, None], np.arange(subject.length)
    for name, pattern in dict(subject.config.connectivity).items():
        mask = pattern.allows(queries, keys, subject.length, subject.length)
        allowed = np.asarray(mask.any(axis=0) if mask.ndim == 3 else mask) | (queries == keys)
        required = _select_required(subject.config.layers[name], allowed, queries)
        inside = f"not zero at {int(required.sum()):,} inputs inside"
        detail, passed = f"gradients of {len(queries)} outputs: zero outside the pattern, {inside}", True
        for wrong, problem in (
            (required & ~trace.reached[name], "does not depend on the input at {}, inside the declared pattern"),
            (trace.touched[name] & ~allowed, "depends on the input at {}, outside the declared pattern"),
        ):
            if wrong.any():
                row, key = np.argwhere(wrong)[0]
                detail, passed = f"the output at {queries[row, 0]} {problem.format(key)}", False
        yield Finding(f"receptive field of {name}", passed, detail)


# Comparison of rows.


def _compare(
    subject: Subject, edits: Sequence[Edit], run: Callable[[Subject], np.ndarray], logits: np.ndarray
) -> tuple[str, str]:
    """The first edit that changes a logit that it must not change, or an empty text; and how rows were compared.

    A program whose sums depend on the other tokens only by rounding is not bitwise, but exact in float64.
    """
    problem = _find_change(edits, logits, 0.0)
    if not problem or not np.isfinite(logits).all():
        return problem, "bitwise"
    with jax.enable_x64(True):
        try:
            logits = run(subject.double)
        except (TypeError, NotImplementedError):  # a mixer or a kernel without float64: only bits can prove it
            return problem, "bitwise"
    return _find_change(edits, logits, DOUBLE * float(np.abs(logits).max())), f"in float64 to {DOUBLE:.0e}"


def _find_change(edits: Sequence[Edit], logits: np.ndarray, limit: float) -> str:
    for edit in edits:
        values = logits[edit.base][edit.kept]
        difference = np.abs(logits[edit.row][edit.kept] - values).max(axis=-1)
        changed = ~(difference <= limit)  # also if it is not a number
        if changed.any():
            position = int(np.flatnonzero(edit.kept)[np.argmax(changed)])
            if not np.isfinite(values).all():
                return f"the logits at position {position} are not finite"
            return edit.problem.format(position=position, change=float(np.nanmax(difference)))
    return ""


def _select_required(
    layer: LayerConfig, allowed: Bool[np.ndarray, "q t"], queries: Int[np.ndarray, "q 1"]
) -> Bool[np.ndarray, "q t"]:
    """The inputs that must have an influence: all of a pattern, the last few of a recurrence."""
    if layer.mixer is not None and layer.mixer.selects:
        return np.zeros_like(allowed)
    if layer.mixer is None or (layer.side is None and _is_exact(layer.mixer)):
        return allowed
    keys = np.arange(allowed.shape[1])
    return allowed & (keys > queries - RECENT) & (keys <= queries)


def _is_exact(config: MixerConfig) -> bool:
    """Whether every key of the pattern has an influence that float32 can represent."""
    return isinstance(config, AttentionConfig | LatentConfig | ConvConfig)


def _branches(mixer: MixerConfig) -> Iterator[MixerConfig]:
    """The mixers that run in parallel; the mixer itself if it has no branches."""
    if isinstance(mixer, ParallelConfig):
        for branch in mixer.branches.values():
            yield from _branches(branch.mixer)
    else:
        yield mixer


def _is_heavy(subject: Subject) -> bool:
    return len(subject.config.names) * subject.length**2 >= HEAVY


def _choose_positions(subject: Subject) -> Int[np.ndarray, " q"]:
    """Position 0, positions at the edges of patterns, tiles and chunks, and random ones, ascending.

    A heavy model has those at the edges of its smallest and its largest pattern.
    """
    length = subject.length
    scales = {scale for _, pattern in subject.config.connectivity for scale in drawing.list_scales(pattern)}
    if _is_heavy(subject):
        edges = {scale + d for scale in (min(scales, default=64), max(scales, default=64)) for d in (0, 1)}
        return np.asarray(sorted({0, length - 1} | {edge for edge in edges if edge < length}))
    edges = {0, 1, length // 2, length - 2, length - 1, 63, 64, 127, 128}
    edges |= {scale + d for scale in sorted(scales)[:4] for d in (0, 1)}
    edges = {edge for edge in edges if 0 <= edge < length}
    random = np.random.default_rng(subject.seed).permutation(length)
    chosen = [*edges, *(int(position) for position in random if int(position) not in edges)]
    return np.asarray(sorted(chosen[: max(QUERIES, len(edges))]))
