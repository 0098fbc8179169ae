"""Programs that must agree: decoding, the unrolled layers, the reference implementation, the lower precision."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sparsejax.check.certificate import Finding
from sparsejax.check.influence import Trace
from sparsejax.check.reduce import map_sections
from sparsejax.check.subject import Subject
from sparsejax.config import ModelConfig
from sparsejax.layers import Context, ExpertsConfig, IndexerConfig, Layer, LshConfig, NsaConfig, SelectConfig
from sparsejax.patterns import drawing

# Largest difference between two programs of one model, relative to the largest logit.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}
MAX_SCORES = 2**29  # elements of the scores of an attention layer in the reference implementation
CHUNK = 3  # most tokens per chunk after a prompt


def check_agreement(subject: Subject, trace: Trace) -> Iterator[Finding]:
    """Compares the forward pass with decoding, with unrolled layers and with the reference, in float32.

    Depth amplifies rounding, and rounding alone can move a token to another expert, bucket or key. Programs that differ
    are therefore compared again in float64.
    """
    exact, tokens = subject.exact, trace.tokens[:1]
    logits = trace.logits[:1] if exact is subject else exact.forward(tokens)
    findings = list(_compare_programs(exact, tokens, logits))
    if any(finding.passed is False for finding in findings):
        # A mixer or a kernel without float64 keeps what float32 gives.
        with jax.enable_x64(True), contextlib.suppress(TypeError, NotImplementedError):
            again = list(_compare_programs(exact.double, tokens, exact.double.forward(tokens)))
            findings = [
                dataclasses.replace(other, detail=f"{other.detail}, in float64") if finding.passed is False else finding
                for finding, other in zip(findings, again, strict=True)
            ]
    yield from findings
    if exact is not subject:
        yield _round(subject, exact, tokens, trace.logits[:1], logits)


def _compare_programs(subject: Subject, tokens: np.ndarray, logits: np.ndarray) -> Iterator[Finding]:
    yield _decode(subject, tokens, logits)
    yield from _unroll(subject, tokens, logits)


def _decode(subject: Subject, tokens: np.ndarray, logits: np.ndarray) -> Finding:
    """Decodes one sequence in several splits, one per row of a batch, whose positions differ.

    Each row reads a prompt, then a few chunks, then single tokens.
    """
    if not subject.config.causal:
        return Finding("decoding", None, "the model is not causal")
    if any(mixer.leaks for mixer in subject.mixers.values()):
        return Finding("decoding", None, "leaks allowed: outputs depend on later tokens, which decoding does not have")
    model, length = subject.model, subject.length
    prompts, chunks = _plan_splits(subject)

    def decode(parameters: Any, tokens: jax.Array, prompts: jax.Array, chunks: jax.Array) -> Any:
        bound, rows = model.bind(parameters), prompts.shape[0]

        def extend(state: Any, counts: jax.Array | None, size: int = 1) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            cache, at = state
            y, cache = bound.extend(tokens[at[:, None] + jnp.arange(size)], cache, at, length, counts)
            return (cache, at + (size if counts is None else counts)), (at, y)

        state, prompt = extend((bound.init_cache(rows, length), jnp.zeros(rows, jnp.int32)), prompts, longest)
        state, parts = jax.lax.scan(lambda state, counts: extend(state, counts, CHUNK), state, chunks)
        return prompt, parts, jax.lax.scan(lambda state, _: extend(state, None), state, length=length)[1]

    longest = int(prompts.max())
    padded = np.pad(tokens[0], (0, length + longest))  # rows that have ended continue with zeros
    prompt, parts, steps = jax.device_get(
        subject.jit(decode)(subject.parameters, jnp.asarray(padded, jnp.int32), prompts, chunks)
    )
    decoded = np.full((len(prompts), *logits.shape[1:]), np.nan, logits.dtype)
    calls = [(*prompt, prompts), *zip(*parts, chunks, strict=True), *zip(*steps, [1] * length, strict=True)]
    for at, y, counts in calls:
        for row, count in enumerate(np.broadcast_to(counts, len(prompts))):
            part = decoded[row, at[row] : at[row] + count]
            part[:] = y[row, : len(part)]
    splits = f"{len(prompts)} splits into prompts, chunks of up to {CHUNK} tokens and single tokens"
    return _compare("decoding", decoded, logits, "float32", f"the forward pass in {splits}")


def _plan_splits(subject: Subject) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, "chunks rows"]]:
    """Number of tokens per prompt and per chunk. The longest prompt ends behind the largest window."""
    length = subject.length
    scales = [scale for _, pattern in subject.config.connectivity for scale in drawing.list_scales(pattern)]
    size = max(min(max(scales, default=length // 2) + 2, length - 8), 2)
    counts = [[0, size, 0, size - 2], [0, 0, CHUNK, 1], [0, 0, CHUNK, CHUNK], [0, 0, CHUNK, 2]]
    ends = np.minimum(np.cumsum(counts, axis=0), length).astype(np.int32)
    return ends[0], np.diff(ends, axis=0)


def _unroll(subject: Subject, tokens: np.ndarray, logits: np.ndarray) -> Iterator[Finding]:
    """Compares with the same layers one by one under the reference implementation, and if that fails under their own.

    Unless it fails, one comparison covers both the scan and the implementation.
    """
    skipped, layers = _skip_reference(subject), "the same layers one by one"
    if not skipped:
        reference, _ = subject.reference.run_layers(tokens)
        scan = _compare("scan", logits, reference, "float32", f"{layers} under impl = dense")
        implementation = dataclasses.replace(scan, name="implementation")
        if not scan.passed:
            chosen, _ = subject.run_layers(tokens)
            scan = _compare("scan", logits, chosen, "float32", layers)
            implementation = _compare("implementation", chosen, reference, "float32", "impl = dense")
    else:
        implementation = Finding("implementation", None, skipped)
        if subject.config.fold.repeats:
            scan = _compare("scan", logits, subject.run_layers(tokens)[0], "float32", layers)
    yield scan if subject.config.fold.repeats else Finding("scan", None, "no layers are scanned")
    yield implementation


def _round(subject: Subject, exact: Subject, tokens: np.ndarray, rounded: np.ndarray, logits: np.ndarray) -> Finding:
    """Compares the dtype of the model with float32.

    Depth amplifies rounding, and a token that rounding moves to another expert, bucket or key has another output. If
    logits differ by more than the limit, the layers and the head are compared one by one on the same inputs, and with
    every token at all experts, in one chunk of LSH attention and at all keys of a selection.
    """
    dtype = subject.config.dtype
    finding = _compare(dtype, rounded, logits, dtype, "float32")
    if finding.passed:
        return finding

    def run(layer: Layer, x: jax.Array, context: Context) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        y, _ = layer(x, context)
        return y, (x, y)

    lower, exact = (each.with_config(_choose_all(each.config, each.length)) for each in (subject, exact))
    last, layers = exact.run_layers(tokens, run)
    inputs = [*(x for _, (x, _) in layers), layers[-1][1][1]]
    lower_last, lower_layers = lower.run_layers(tokens, run, list(map(np.asarray, inputs)))
    names = [f"layer {index} ({name})" for index, (name, _) in enumerate(layers)]
    outputs = [(y, lower) for (_, (_, y)), (_, (_, lower)) in zip(layers, lower_layers, strict=True)]
    errors = {
        name: _difference(np.asarray(lower, np.float32), np.asarray(y)).max()
        for name, (y, lower) in zip([*names, "the head"], [*outputs, (last, lower_last)], strict=True)
    }
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    detail = (
        f"{finding.detail}; on the same inputs {worst} differs most, by {errors[worst]:.1e} of its largest output, at"
        f" most {LIMITS[dtype]:.0e}"
    )
    return Finding(dtype, bool(errors[worst] <= LIMITS[dtype]), detail)


def _choose_all(config: ModelConfig, length: int) -> ModelConfig:
    """The model that chooses all experts and all keys, so that outputs depend continuously on the scores."""

    def choose(part: Any) -> Any:  # a section of the config
        if isinstance(part, ExpertsConfig):
            return dataclasses.replace(part, top_k=part.experts, top_groups=part.groups)
        if isinstance(part, LshConfig):
            return dataclasses.replace(part, chunk=length, before=0, after=0)
        if isinstance(part, IndexerConfig):
            return dataclasses.replace(part, top_k=length)
        if isinstance(part, SelectConfig):
            return dataclasses.replace(part, count=length, mass=1.0)
        if isinstance(part, NsaConfig):
            return dataclasses.replace(part, count=length)
        return part

    return map_sections(config, choose)


def _skip_reference(subject: Subject) -> str:
    """Why the implementation is not compared with the reference; empty if it is."""
    mixers = subject.mixers.values()
    if subject.reference.config == subject.config or not any(hasattr(x, "impl") for x in mixers):
        return "no layer has another implementation than the reference"
    if max(getattr(mixer, "heads", 1) for mixer in mixers) * subject.length**2 > MAX_SCORES:
        return f"the reference needs all scores of {subject.length:,} tokens"
    return ""


def _compare(name: str, actual: np.ndarray, expected: np.ndarray, dtype: str, other: str) -> Finding:
    difference = _difference(actual, expected)
    error, limit = float(difference.max()), LIMITS[dtype]
    detail = f"differs from {other} by {error:.1e} of the largest logit, at most {limit:.0e}"
    if error <= limit:
        return Finding(name, True, detail)
    first = int(np.flatnonzero(~(difference <= limit).all(axis=0))[0])
    return Finding(name, False, f"{detail}, first at position {first}")


def _difference(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Largest difference per position, relative to the largest value."""
    return np.abs(actual - expected).max(axis=-1) / np.abs(expected).max()
