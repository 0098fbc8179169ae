"""Comparison of any mixer, including a user's, with what it states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.mixers import make_mixer
from sparsejax.layers.protocols import Mixer, MixerConfig
from sparsejax.layers.stream import Cost, Stream

BATCH = 2
NOISE = 0.1  # standard deviation, see `perturb`


def check_mixer(config: MixerConfig, length: int = 13, width: int = 8, seed: int = 0, tolerance: float = 1e-4) -> None:
    """Compares a mixer in float32 with its config and with the contract of `Mixer`.

    Covers the types of `summary`, `connectivity` and `cost`; the shape of the output; which inputs have an influence
    on which outputs; padding and document boundaries; and, for a mixer that reads no later position, decoding.

    Args:
      config: The config of the mixer.
      length: Tokens per sequence, at least 6.
      width: Width of the stream.
      seed: Seed of the parameters and the inputs.
      tolerance: Largest difference between a step and the call, relative to the largest output.

    Raises:
      AssertionError: The mixer does not honor the contract. The message names the part.
    """
    config.check(length)
    _require("config.summary is not a text", isinstance(config.summary, str) and config.summary)
    mixer = make_mixer(config, Stream(width, 1, jnp.float32), nnx.Rngs(seed))
    _check_variables(mixer)
    _require("cost(length) is not a Cost", isinstance(mixer.cost(length), Cost))
    random = np.random.default_rng(seed)
    graph, state = nnx.split(mixer)
    mixer, x = (
        nnx.merge(graph, perturb(state, random)),
        jnp.asarray(random.normal(size=(BATCH, length, width)), jnp.float32),
    )
    y = jax.jit(mixer)(x)
    _require(
        f"the output is {y.dtype}{list(y.shape)}, expected float32{list(x.shape)}",
        (y.shape, y.dtype) == (x.shape, x.dtype),
    )
    _require("the output is not finite", jnp.isfinite(y).all())
    _check_influence(mixer, config, x)
    _check_tokens(mixer, x)
    if config.connectivity.lookahead() <= 0:
        _check_steps(mixer, x, y, tolerance)


def perturb(parameters: Any, random: np.random.Generator) -> Any:
    """Adds noise to initial parameters, so that parameters that start at zero take part."""
    return jax.tree.map(lambda x: x + NOISE * random.normal(size=x.shape).astype(x.dtype), parameters)


def _check_variables(mixer: Mixer) -> None:
    """All variables must be parameters in float32: nothing else is trained, saved and sharded."""
    for path, variable in nnx.to_flat_state(nnx.state(mixer)):
        name = ".".join(map(str, path))
        _require(f"{name} is a {type(variable).__name__}, expected nnx.Param", isinstance(variable, nnx.Param))
        _require(f"the parameter {name} is {variable.dtype}, expected float32", variable.dtype == jnp.float32)


def _check_influence(mixer: Mixer, config: MixerConfig, x: jax.Array) -> None:
    mask = config.connectivity.dense(x.shape[1])
    allowed = mask.any(axis=0) if mask.ndim == 3 else mask
    weights = jnp.linspace(0.5, 1.5, x.shape[2])
    jacobian = jax.jit(jax.jacrev(lambda x: (mixer(x[None])[0] * weights).sum(axis=-1)))(x[0])
    wrong = np.argwhere(np.asarray((jacobian != 0).any(axis=-1)) & ~allowed)
    _require(
        f"the output at {wrong[:1, 0]} depends on the input at {wrong[:1, 1]}, outside config.connectivity",
        not wrong.size,
    )


def _check_tokens(mixer: Mixer, x: jax.Array) -> None:
    """Other inputs at padding, and in one document, change no output elsewhere."""
    length = x.shape[1]
    positions = np.broadcast_to(np.arange(length), (BATCH, length))
    second = positions >= length // 2
    padding = (positions < 2) | (positions == length - 1)
    segments = Tokens(segments=jnp.asarray(second, jnp.int32))
    for problem, tokens, changed in (
        ("padding (context.tokens.mask) has an influence on other tokens", Tokens(mask=jnp.asarray(~padding)), padding),
        ("a document (context.tokens.segments) has an influence on the next one", segments, ~second),
        ("a document (context.tokens.segments) has an influence on the previous one", segments, second),
    ):
        other = jnp.where(changed[..., None], -2 * x + 1, x)
        outputs = [jax.jit(mixer)(inputs, Context(tokens))[~changed] for inputs in (x, other)]
        _require(problem, jnp.allclose(*outputs, rtol=0, atol=1e-6 * float(jnp.abs(outputs[0]).max())))


def _check_steps(mixer: Mixer, x: jax.Array, y: jax.Array, tolerance: float) -> None:
    length = x.shape[1]

    def step(cache: Any, token: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        y, after = mixer.step(token[0], cache, token[1], length, EMPTY)
        before, now = (jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree) for tree in (cache, after))
        _require(f"step changes the cache from {before} to {now}", before == now)
        return after, y

    def decode(x: jax.Array) -> jax.Array:
        tokens = jnp.swapaxes(x, 0, 1), jnp.arange(length)
        return jnp.swapaxes(jax.lax.scan(step, mixer.init_cache(BATCH, length), tokens)[1], 0, 1)

    steps = jax.jit(decode)(x)
    _require(f"step returns {list(steps.shape)}, expected {list(y.shape)}", steps.shape == y.shape)
    difference = float(jnp.abs(steps - y).max() / jnp.abs(y).max())
    _require(
        f"the outputs of step differ from the call by {difference:.1e} of the largest output", difference <= tolerance
    )


def _require(problem: str, condition: Any) -> None:
    if not condition:
        raise AssertionError(problem)
