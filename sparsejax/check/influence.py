"""Which inputs influence which outputs: causality, receptive fields, documents and padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from sparsejax.check.certificate import Finding
from sparsejax.check.subject import Subject
from sparsejax.layers import (
    AttentionConfig,
    Auxiliary,
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
from sparsejax.model import FOLDED
from sparsejax.patterns import drawing

QUERIES = 16  # fewest edits of a suffix, and outputs whose gradients are taken, per layer
RECENT = 4  # keys before a query that have an influence through every recurrence
# Largest difference between a document in a packed row and alone, relative to the largest logit.
ALONE = {"float32": 2e-5, "bfloat16": 5e-2}
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
    """One forward and backward pass, whose row i is that of `tokens` with other tokens from `positions[i]` on.

    Row 0 is not changed.

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
    """Runs the program of a training step, with a gradient of its own in each layer."""
    positions = _choose_positions(subject)
    (tokens,), (other,) = subject.draw_tokens(1), subject.draw_tokens(1, seed=1)
    cuts = np.where(positions > 0, positions, subject.length)
    rows = np.where(np.arange(subject.length) < cuts[:, None], tokens, other)
    names = dict.fromkeys(subject.config.names)

    def run(probes: Any, parameters: Any, rows: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = subject.model.bind(parameters)
        for part in FOLDED:
            layers = zip(getattr(subject.config.fold, part), getattr(model, part), strict=True)
            setattr(model, part, nnx.List([_instrument(layer, probes[name], positions) for name, layer in layers]))
        logits = model(rows)
        return logits.sum(), logits

    probes = {name: (jnp.zeros(rows.shape),) * 2 for name in names}
    compiled = subject.jit(jax.grad(run, has_aux=True))
    arrays = compiled(probes, subject.parameters, jnp.asarray(rows, jnp.int32), jnp.asarray(positions))
    counts, logits = jax.device_get(arrays)
    touched = {name: (stream + embeddings) > 0 for name, (stream, embeddings) in counts.items()}
    reached = {name: stream == subject.config.names.count(name) for name, (stream, _) in counts.items()}
    return Trace(positions, rows, logits, touched, reached)


def check_causality(subject: Subject, trace: Trace) -> Finding:
    """Other tokens from a position on change no logit before it."""
    if not subject.config.causal:
        return Finding("causality", None, "the model is not causal")
    mixers = {f"layers.{name}": layer.mixer for name, layer in subject.config.layers.items() if layer.mixer is not None}
    if leaks := [f"{name}: {mixer.leaks}" for name, mixer in mixers.items() if mixer.leaks]:
        allowed = subject.config.allow_leaks
        return Finding("causality", None if allowed else False, f"leaks{' allowed' * allowed}: {'; '.join(leaks)}")
    problem = "the logits at position {{position}} change by up to {{change:.2g}} with the tokens from position {} on"
    edits = [
        Edit(row, 0, np.arange(subject.length) < cut, problem.format(cut))
        for row, cut in enumerate(trace.positions)
        if row > 0
    ]
    problem, how = _compare(subject, edits, lambda subject: subject.forward(trace.tokens), trace.logits)
    kept = f"{len(edits)} edits of a suffix change no logit before it"
    return Finding("causality", not problem, problem or f"{kept}, {how}")


def check_documents(subject: Subject) -> Finding:
    """In a packed row, tokens of a document or of padding change no logit of another token's document.

    Row 0 packs three documents and padding, and the next four rows change one part each. Then each document is alone,
    with padding elsewhere. The last two rows are one document with padding before and inside it.
    """
    if subject.config.head.pool != "none":
        return Finding("documents", None, "the head averages over all tokens")
    length = subject.length
    starts = np.asarray((0, length // 3, 2 * length // 3, length - 2))
    part = np.searchsorted(starts, np.arange(length), side="right")
    hole = np.isin(np.arange(length), (0, 1, length // 2))
    tokens, other = subject.draw_tokens(2, seed=2)
    changes = [part == number for number in (1, 2, 3, 4)]
    edited = [np.where(change, other, tokens) for change in changes]
    rows = np.stack([tokens, *edited, *[tokens] * 4, np.where(hole, other, tokens)])
    packed, alone = np.where(part <= 3, part, 0), [np.where(part == number, 1, 0) for number in (1, 2, 3)]
    segments = np.stack([*[packed] * 5, *alone, *[np.ones(length, int)] * 2])
    mask = (segments > 0) & ~(hole & (np.arange(10) >= 8)[:, None])
    positions = np.where(np.arange(10)[:, None] < 8, np.arange(length) - starts[part - 1], np.arange(length))
    ids = {"segments": jnp.asarray(segments, jnp.int32), "positions": jnp.asarray(positions, jnp.int32)}
    context = Context(Tokens(mask=jnp.asarray(mask), **ids))
    problem = (
        "other tokens in {} change the logits at position {{position}} by up to {{change:.2g}}; "
        "a mixer ignores context.tokens.{}"
    )
    names = ("document 1", "document 2", "document 3", "padding")
    edits = [
        Edit(row, 0, mask[0] & ~changes[row - 1], problem.format(name, "mask" if row == 4 else "segments"))
        for row, name in enumerate(names, 1)
    ]
    edits.append(Edit(9, 8, mask[8], problem.format("padding in a document", "mask")))
    logits = subject.forward(rows, context)
    problem, how = _compare(subject, edits, lambda subject: subject.forward(rows, context), logits)
    if problem:
        return Finding("documents", False, problem)
    error = max(np.abs(logits[4 + number] - logits[0])[part == number].max() for number in (1, 2, 3))
    error = float(error / np.abs(logits[0]).max())
    limit = ALONE[subject.config.dtype]
    detail = f"packed documents and padding do not interact, {how}; alone, the logits of a document differ"
    return Finding("documents", error <= limit, f"{detail} by {error:.1e} of the largest, at most {limit:.0e}")


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


# Gradients per layer: a probe, which is zero and added to nothing, receives as its gradient whether that of the layer's
# input is not zero, and the gradient of the layer's output is a constant instead of that of the next layer's input.


def _instrument(layer: Layer, probes: tuple[jax.Array, jax.Array], positions: jax.Array) -> nnx.Module:
    """A layer whose output at one position per row has a gradient, that of its inputs being added to the probes."""

    class Instrumented(nnx.Module):
        def __init__(self) -> None:
            self.layer = layer

        def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, Auxiliary]:
            embeddings = _observe(context.extras.embeddings, probes[1])
            x, auxiliary = self.layer(_observe(x, probes[0]), context.with_extras(embeddings=embeddings))
            return _seed(x, positions), auxiliary

    return Instrumented()


@jax.custom_vjp
def _observe(x: Float[jax.Array, "b t m"], probe: Float[jax.Array, "b t"]) -> Float[jax.Array, "b t m"]:
    return x


_observe.defvjp(
    lambda x, probe: (x, ()), lambda _, dx: (jnp.zeros_like(dx), (dx != 0).any(axis=-1).astype(jnp.float32))
)


@jax.custom_vjp
def _seed(y: Float[jax.Array, "b t m"], positions: Int[jax.Array, " b"]) -> Float[jax.Array, "b t m"]:
    return y


def _seed_backward(positions: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
    weights = jnp.linspace(0.5, 1.5, dy.shape[-1]).astype(dy.dtype)
    return jnp.zeros_like(dy).at[jnp.arange(len(dy)), positions].set(weights), None


_seed.defvjp(lambda y, positions: (y, positions), _seed_backward)


def _select_required(
    layer: LayerConfig, allowed: Bool[np.ndarray, "q t"], queries: Int[np.ndarray, "q 1"]
) -> Bool[np.ndarray, "q t"]:
    """The inputs that must have an influence: all of a pattern, the last few of a recurrence."""
    if layer.mixer is not None and _selects(layer.mixer):
        return np.zeros_like(allowed)
    if layer.mixer is None or (layer.side is None and _is_exact(layer.mixer)):
        return allowed
    keys = np.arange(allowed.shape[1])
    return allowed & (keys > queries - RECENT) & (keys <= queries)


def _is_exact(config: MixerConfig) -> bool:
    """Whether every key of the pattern has an influence that float32 can represent."""
    return isinstance(config, AttentionConfig | LatentConfig | ConvConfig)


def _selects(config: MixerConfig) -> bool:
    """Whether the content selects among the keys of the pattern."""
    if isinstance(config, ParallelConfig):
        return any(_selects(branch.mixer) for branch in config.branches.values())
    return isinstance(config, LshConfig) or getattr(config, "indexer", None) is not None


def _choose_positions(subject: Subject) -> Int[np.ndarray, " q"]:
    """Position 0, positions at the edges of patterns, tiles and chunks, and random ones, ascending."""
    length = subject.length
    scales = {scale for _, pattern in subject.config.connectivity for scale in drawing.list_scales(pattern)}
    edges = {0, 1, length // 2, length - 2, length - 1, 63, 64, 127, 128}
    edges |= {scale + d for scale in sorted(scales)[:4] for d in (0, 1)}
    edges = {edge for edge in edges if 0 <= edge < length}
    random = np.random.default_rng(subject.seed).permutation(length)
    chosen = [*edges, *(int(position) for position in random if int(position) not in edges)]
    return np.asarray(sorted(chosen[: max(QUERIES, len(edges))]))
