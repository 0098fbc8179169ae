"""Programs that must agree: decoding, the unrolled layers, the reference implementation, the lower precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.check.certificate import Finding
from sparsejax.check.reduce import replace_fields
from sparsejax.check.subject import Subject
from sparsejax.layers import Context

# Largest difference between two programs of one model, relative to the largest logit.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}
MAX_SCORES = 2**29  # elements of the scores of an attention layer in the reference implementation


def check_agreement(subject: Subject) -> Iterator[Finding]:
    """Compares the forward pass with decoding, with unrolled layers and with the reference, in float32."""
    exact = subject.with_config(dataclasses.replace(subject.config, dtype="float32"))
    tokens = exact.draw_tokens(1, seed=2)
    logits = exact.forward(tokens)
    yield _decode(exact, tokens, logits)
    yield _unroll(exact, tokens, logits)
    yield _use_reference(exact, tokens, logits)
    if subject.config.dtype != "float32":
        yield _compare(subject.config.dtype, subject.forward(tokens), logits, subject.config.dtype, "float32")


def _decode(subject: Subject, tokens: np.ndarray, logits: np.ndarray) -> Finding:
    if not subject.config.causal:
        return Finding("decoding", None, "the model is not causal")
    model, length = subject.model, subject.length

    @jax.jit
    def decode(parameters: dict[str, Any], tokens: jax.Array) -> jax.Array:
        bound = model.bind(parameters)

        def step(cache: Any, token: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            y, cache = bound.step(token[0], cache, token[1], length)
            return cache, y

        inputs = jnp.swapaxes(tokens, 0, 1), jnp.arange(length)
        return jnp.swapaxes(jax.lax.scan(step, bound.init_cache(len(tokens), length), inputs)[1], 0, 1)

    steps = np.asarray(decode(subject.parameters, jnp.asarray(tokens, jnp.int32)))
    return _compare("decoding", steps, logits, "float32", "the forward pass")


def _unroll(subject: Subject, tokens: np.ndarray, logits: np.ndarray) -> Finding:
    """Runs layer after layer, each compiled once per name."""
    if not subject.config.fold.repeats:
        return Finding("scan", None, "no layers are scanned")
    model = subject.bind()
    x, context = model.embed(jnp.asarray(tokens, jnp.int32), Context())

    compiled: dict[str, Any] = {}
    for index, (name, layer) in enumerate(zip(subject.config.names, model.unroll(), strict=True)):
        graph, state = nnx.split(layer)
        if name not in compiled:
            compiled[name] = jax.jit(lambda state, x, context, graph=graph: nnx.merge(graph, state)(x, context)[0])
        x = compiled[name](state, x, context.with_extras(layer=jnp.asarray(index)))
    return _compare("scan", np.asarray(model.read_out(x, context)), logits, "float32", "the scanned layers")


def _use_reference(subject: Subject, tokens: np.ndarray, logits: np.ndarray) -> Finding:
    config = replace_fields(subject.config, impl="dense")
    if config == subject.config or not any(hasattr(layer.mixer, "impl") for layer in config.layers.values()):
        return Finding("implementation", None, "no layer has another implementation than the reference")
    heads = max(getattr(layer.mixer, "heads", 1) for layer in config.layers.values())
    if heads * subject.length**2 > MAX_SCORES:
        return Finding("implementation", None, f"the reference needs all scores of {subject.length:,} tokens")
    reference = subject.with_config(config).forward(tokens)
    return _compare("implementation", logits, reference, "float32", "impl = dense")


def _compare(name: str, actual: np.ndarray, expected: np.ndarray, dtype: str, other: str) -> Finding:
    difference = np.abs(actual - expected).max(axis=-1) / np.abs(expected).max()
    error, limit = float(difference.max()), LIMITS[dtype]
    detail = f"differs from {other} by {error:.1e} of the largest logit, at most {limit:.0e}"
    if error <= limit:
        return Finding(name, True, detail)
    first = int(np.flatnonzero(~(difference[0] <= limit))[0])
    return Finding(name, False, f"{detail}, first at position {first}")
