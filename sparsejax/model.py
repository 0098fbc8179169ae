"""The model: an embedding, layers by schedule, a head. Nothing about training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import schedule
from sparsejax.config import ModelConfig
from sparsejax.layers import Layer, Linear, Norm, Stream, parameter

Cache = dict[str, Any]


class Model(nnx.Module):
    """A causal sequence model.

    The schedule is folded into `before + period * repeats + after`. The layers of the period hold their
    parameters with a leading axis of `repeats` and run in one `lax.scan`, so that compile time follows the
    period and not the depth; the others are unrolled.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        names = config.names
        stream = Stream(config.width, len(names), jnp.dtype(config.dtype))
        self.fold = schedule.fold(names) if config.scan else schedule.Fold(names, (), 0, ())

        def build(names: tuple[str, ...], rngs: nnx.Rngs) -> nnx.List:
            return nnx.List([Layer(config.layers[name], stream, rngs) for name in names])

        init = jax.nn.initializers.normal(config.width**-0.5)
        self.embedding = parameter(rngs, init, (config.vocab, config.width), ("vocab", "width"))
        self.before = build(self.fold.before, rngs)
        keys = jax.random.split(rngs.params(), max(self.fold.repeats, 1))
        self.period = nnx.vmap(lambda key: build(self.fold.period, nnx.Rngs(key)))(keys)
        self.after = build(self.fold.after, rngs)
        self.norm = Norm(config.norm, config.width, rngs)
        self.dtype = stream.dtype
        axes = ("width", "vocab")
        self.head = None if config.tied else Linear(config.width, config.vocab, axes, dtype=stream.dtype, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "b t"], place: Callable[[Array], Array] = lambda x: x
    ) -> Float[Array, "b t v"]:
        """Logits of the next token at every position, in float32.

        Args:
          tokens: token ids.
          place: applied to the stream [b, t, m] between layers; the training step keeps its sharding with it.
        """
        x = place(self._embed(tokens))
        for layer in self.before:
            x = place(layer(x))
        if self.fold.repeats:
            graph, parameters = nnx.split(self.period)

            def run_period(x, parameters):
                for layer in nnx.merge(graph, parameters):
                    x = place(layer(x))
                return x, None

            x, _ = jax.lax.scan(run_period, x, parameters)
        for layer in self.after:
            x = place(layer(x))
        return self._logits(x)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Empty caches for decoding `length` tokens; the period's have a leading axis of `repeats`."""

        def repeat(x):
            return jnp.broadcast_to(x, (self.fold.repeats, *x.shape))

        return {
            "before": [layer.init_cache(batch, length) for layer in self.before],
            "period": [jax.tree.map(repeat, layer.init_cache(batch, length)) for layer in self.period],
            "after": [layer.init_cache(batch, length) for layer in self.after],
        }

    def step(
        self, tokens: Int[Array, " b"], cache: Cache, position: Int[Array, ""], length: int
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Logits after one more token at `position`, and the next cache; `length` as given to `init_cache`."""

        def run(layers, x, caches):
            after = []
            for layer, held in zip(layers, caches, strict=True):
                x, held = layer.step(x, held, position, length)
                after.append(held)
            return x, after

        x, before = run(self.before, self._embed(tokens), cache["before"])
        period = cache["period"]
        if self.fold.repeats:
            graph, parameters = nnx.split(self.period)
            x, period = jax.lax.scan(
                lambda x, each: run(nnx.merge(graph, each[0]), x, each[1]), x, (parameters, period)
            )
        x, after = run(self.after, x, cache["after"])
        return self._logits(x), {"before": before, "period": period, "after": after}

    def _embed(self, tokens: Array) -> Array:
        return self.embedding[...].astype(self.dtype)[tokens]

    def _logits(self, x: Array) -> Array:
        weight = self.embedding[...].T if self.head is None else self.head.weight[...]
        # Multiplied in the stream's dtype, but summed and kept in float32: the loss would feel the rounding.
        return jnp.matmul(self.norm(x), weight.astype(self.dtype), preferred_element_type=jnp.float32)


class Functional:
    """A model as pure functions of a plain nested dict of parameters, for use under `jax.jit`.

    Arguments of `jit` flatten fastest as plain dicts; the modules are only rebuilt while tracing.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self._graph, self._state = nnx.split(nnx.eval_shape(lambda: Model(config, nnx.Rngs(0))))

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh float32 parameters."""
        return nnx.to_pure_dict(nnx.state(Model(self.config, nnx.Rngs(key))))

    def bind(self, parameters: dict[str, Any]) -> Model:
        """The model with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(self._graph, state)

    @property
    def shapes(self) -> dict[str, Any]:
        """The parameters' shapes and dtypes."""
        return nnx.to_pure_dict(self._state)

    @property
    def axes(self) -> dict[str, Any]:
        """For each parameter a tuple of logical axis names, None for the scanned period's leading axis."""

        def name(variable: nnx.Variable) -> tuple[str | None, ...]:
            return (None,) * (len(variable.shape) - len(variable.axes)) + tuple(variable.axes)

        named = jax.tree.map(
            lambda v: v.replace(name(v)), self._state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
        return nnx.to_pure_dict(named)
