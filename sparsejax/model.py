"""The model: an embedding, layers by schedule, a head. Nothing about training."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.config import ModelConfig
from sparsejax.embedding import Embedding, Head, average
from sparsejax.layers import EMPTY, Context, Layer, Losses, Norm, Shared, Stream

Cache = dict[str, Any]


class Model(nnx.Module):
    """A sequence model.

    The schedule is folded into `before + period * repeats + after`. The layers of the period hold their
    parameters with a leading axis of `repeats` and run in one `lax.scan`, so that compile time follows the
    period and not the depth; the others are unrolled.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        names = config.names
        stream = Stream(config.width, len(names), jnp.dtype(config.dtype), config.reversible, config.shared)
        self.fold = config.fold

        def build(names: tuple[str, ...], rngs: nnx.Rngs) -> nnx.List:
            return nnx.List([Layer(config.layers[name], stream, rngs) for name in names])

        self.embedding = Embedding(config, stream, rngs)
        self.before = build(self.fold.before, rngs)
        keys = jax.random.split(rngs.params(), max(self.fold.repeats, 1))
        self.period = nnx.vmap(lambda key: build(self.fold.period, nnx.Rngs(key)))(keys)
        self.after = build(self.fold.after, rngs)
        self.shared = nnx.Dict({name: Shared(block, stream, rngs) for name, block in config.shared.items()})
        self.norm = Norm(config.norm, config.width * (2 if config.reversible else 1), rngs)
        self.head = Head(config, stream, rngs)

    def __call__(self, tokens: Int[Array, "b t"], context: Context = EMPTY) -> Float[Array, "b t v"]:
        """Logits at every position, in float32; of the next token if the model is causal."""
        return self.forward(tokens, context)[0]

    def forward(
        self, tokens: Int[Array, "b t"], context: Context = EMPTY, place: Callable[[Array], Array] = lambda x: x
    ) -> tuple[Float[Array, "b t v"], Losses]:
        """Logits, and what the layers add to the loss, by name and weighted.

        Args:
          tokens: token ids.
          context: what the layers may know of the tokens.
          place: applied to the stream [b, t, m] between layers; the training step keeps its sharding with it.
        """
        x, context = self._enter(tokens, context)
        x, losses = place(x), []

        def run(layers: nnx.List, x: Array, first: Array | int) -> tuple[Array, list[Losses]]:
            found = []
            for number, layer in enumerate(layers):
                x, more = layer(x, dataclasses.replace(context, layer=jnp.asarray(first + number)))
                x = place(x)
                found.append(more)
            return x, found

        x, found = run(self.before, x, 0)
        losses += found
        if self.fold.repeats:
            graph, parameters = nnx.split(self.period)
            x, found = jax.lax.scan(
                lambda x, each: run(nnx.merge(graph, each[0]), x, each[1]), x, (parameters, self._period_starts)
            )
            losses += jax.tree.map(jnp.sum, found)
        x, found = run(self.after, x, len(self.config.names) - len(self.after))
        losses += found
        return self._leave(x, context.mask), _add(losses)

    def streams(self, tokens: Int[Array, "b t"], context: Context = EMPTY) -> list[Float[Array, "b t m"]]:
        """The stream before the first layer, after each layer, and after the last norm; every layer unrolled."""
        x, context = self._enter(tokens, context)
        streams = [x]
        for number, layer in enumerate(self._unroll()):
            x, _ = layer(x, dataclasses.replace(context, layer=jnp.asarray(number)))
            streams.append(x)
        return [*streams, self.norm(x)]

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
        x = self._double(self.embedding.step(tokens, position))
        context = Context(embeddings=x, shared=dict(self.shared))

        def run(layers, x, caches, first):
            after = []
            for number, (layer, held) in enumerate(zip(layers, caches, strict=True)):
                here = dataclasses.replace(context, layer=jnp.asarray(first + number))
                x, held = layer.step(x, held, position, length, here)
                after.append(held)
            return x, after

        x, before = run(self.before, x, cache["before"], 0)
        period = cache["period"]
        if self.fold.repeats:
            graph, parameters = nnx.split(self.period)
            x, period = jax.lax.scan(
                lambda x, each: run(nnx.merge(graph, each[0]), x, *each[1:]),
                x,
                (parameters, period, self._period_starts),
            )
        x, after = run(self.after, x, cache["after"], len(self.config.names) - len(self.after))
        return self._leave(x), {"before": before, "period": period, "after": after}

    @property
    def _period_starts(self) -> Array:
        """The number of the first layer of each turn of the period."""
        return len(self.fold.before) + len(self.fold.period) * jnp.arange(self.fold.repeats)

    def _unroll(self) -> Iterator[Layer]:
        """Every layer in order, those of the period cut out of their stack."""
        yield from self.before
        graph, parameters = nnx.split(self.period)
        for turn in range(self.fold.repeats):
            yield from nnx.merge(graph, jax.tree.map(operator.itemgetter(turn), parameters))
        yield from self.after

    def _enter(self, tokens: Array, context: Context) -> tuple[Array, Context]:
        x = self._double(context.dropout(self.embedding(tokens, context.positions)))
        return x, dataclasses.replace(context, embeddings=x, shared=dict(self.shared))

    def _double(self, x: Array) -> Array:
        return jnp.concatenate([x, x], axis=-1) if self.config.reversible else x

    def _leave(self, x: Array, mask: Array | None = None) -> Array:
        x = self.norm(x)
        if self.config.head.pool == "mean":
            x = average(x, mask)
        return self.head(x, self.embedding.tokens[...])


def _add(losses: list[Losses]) -> Losses:
    """The sum over layers, name by name."""
    total: Losses = {}
    for one in losses:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total


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
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    @property
    def axes(self) -> dict[str, Any]:
        """For each parameter a tuple of logical axis names, None for the scanned period's leading axis."""

        def name(variable: nnx.Variable) -> tuple[str | None, ...]:
            return (None,) * (len(variable.shape) - len(variable.axes)) + tuple(variable.axes)

        named = jax.tree.map(
            lambda v: v.replace(name(v)), self._state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
        return nnx.to_pure_dict(named)
