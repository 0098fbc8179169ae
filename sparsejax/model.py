"""The model: an embedding, layers by schedule, a head. Nothing about training."""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.config import ModelConfig
from sparsejax.embedding import Embedding, Head, mean_pool
from sparsejax.errors import InputError
from sparsejax.layers import (
    EMPTY,
    Auxiliary,
    Cache,
    Context,
    Layer,
    Shared,
    Stream,
    Tokens,
    Trace,
    make_norm,
    normalize,
)
from sparsejax.layers.hyper import make_connection
from sparsejax.layers.remat import rematerialize
from sparsejax.layers.stream import decays, logical_axes
from sparsejax.ops import Selection
from sparsejax.schedule import Fold

FOLDED = ("before", "period", "after")  # the parts of a fold that hold layers
Carry = tuple[Array, Selection | None]  # the stream, and the keys that the last indexer selected
Losses = dict[str, Float[Array, ""]]  # weighted losses by name
Metrics = Mapping[str, Float[Array, ""]]
# Number of choices per expert, [e] or in the period [repeats, e], at the path of the layer in the parameters.
Choices = dict[str, dict[int, Int[Array, "*repeats e"]]]
Statistics = Mapping[str, dict[int, dict[str, Array]]]  # sums of mixers, at the same paths


class Output(NamedTuple):
    """What a model returns for a batch.

    Attributes:
      features: Input of the head at every position; `Model.logits` of all of them can exceed the memory.
      losses: Weighted auxiliary losses of the layers, by name.
      choices: Choices of the experts.
      traces: Activations of each layer, if `Extras.traced`.
      metrics: Metrics of the selections as `METRIC/layer_INDEX`, if `Extras.measured`.
      statistics: Sums over the tokens of each layer that has some, see `MixerConfig.update_state`.
    """

    features: Float[Array, "b t w"]
    losses: Losses
    choices: Choices
    traces: tuple[Trace, ...] = ()
    metrics: Metrics = types.MappingProxyType({})
    statistics: Statistics = types.MappingProxyType({})


class Model(nnx.Module):
    """A sequence model.

    The schedule is folded into `before + period * repeats + after`. The parameters of the period's layers have a
    leading axis of `repeats`, and the layers run in one `lax.scan`, so that compile time depends on the period instead
    of the depth. The other layers are unrolled.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        names = config.names
        dtype = jnp.dtype(config.dtype)
        stream = Stream(
            config.width, len(names), dtype, config.reversible, config.shared, hyper=config.hyper, vocab=config.vocab
        )
        self.fold = config.fold

        def build(names: tuple[str, ...], rngs: nnx.Rngs) -> nnx.List:
            return nnx.List([Layer(config.layers[name], stream, rngs) for name in names])

        self.embedding = Embedding(config, stream, rngs)
        self.before = build(self.fold.before, rngs)
        keys = jax.random.split(rngs.params(), max(self.fold.repeats, 1))
        self.period = nnx.vmap(lambda key: build(self.fold.period, nnx.Rngs(key)))(keys)
        self.after = build(self.fold.after, rngs)
        self.shared = nnx.Dict({name: Shared(block, stream, rngs) for name, block in config.shared.items()})
        self.hyper = make_connection(config.hyper, config.width, dtype, rngs, reads_only=True)
        self.norm = make_norm(config.norm, config.width * (2 if config.reversible else 1), rngs)
        self.head = Head(config, stream, rngs)

    def __call__(self, tokens: Int[Array, "b t"], context: Context = EMPTY) -> Float[Array, "b t v"]:
        """Returns logits at every position, in float32; a causal model predicts the next token."""
        return self.logits(self.forward(tokens, context).features)

    def forward(
        self,
        tokens: Int[Array, "b t"],
        context: Context = EMPTY,
        constrain: Callable[[Array], Array] = lambda x: x,
        choices: Choices | None = None,
    ) -> Output:
        """Returns the input of the head, and the losses, the choices of experts and the activations of the layers.

        Args:
          tokens: Token ids.
          context: Facts about the tokens, and inputs of particular modules.
          constrain: Applied to the stream [b, t, m] between layers; the training step keeps it sharded this way.
          choices: Choices in the whole batch, if the tokens are a microbatch; the balance losses are then parts of
            that of the batch.
        """
        x, context = self.embed(tokens, context)
        known, scopes = choices or {}, self._scopes

        def run(
            layers: nnx.List, carry: Carry, first: Array | int, known: dict[int, Array], scopes: list[str]
        ) -> tuple[Carry, list]:
            (x, selection), auxiliary = carry, []
            for index, layer in enumerate(layers):
                extras = {"layer": jnp.asarray(first + index), "choices": known.get(index), "selection": selection}
                with jax.named_scope(scopes[index]):
                    x, added = layer(x, context.with_extras(**extras))
                x, selection = constrain(x), self._pass_on(added.selection, selection)
                auxiliary.append(added._replace(selection=None))
            return (x, selection), auxiliary

        parts: dict[str, list[Auxiliary]] = {}
        carry: Carry = (constrain(x), None)
        carry, parts["before"] = run(self.before, carry, 0, known.get("before", {}), scopes["before"])
        if self.fold.repeats:
            graph, parameters = nnx.split(self.period)
            carry, parts["period"] = self._scan(
                lambda carry, period: run(nnx.merge(graph, period[0]), carry, period[1], period[2], scopes["period"]),
                carry,
                (parameters, self._period_starts, known.get("period", {})),
            )
        last = len(self.config.names) - len(self.after)
        (x, _), parts["after"] = run(self.after, carry, last, known.get("after", {}), scopes["after"])
        traces = self._order(parts, "trace") if context.extras.traced else ()
        measured = enumerate(self._order(parts, "metrics") if context.extras.measured else ())
        metrics = {f"{name}/layer_{i}": value for i, layer in measured for name, value in (layer or {}).items()}
        return Output(self.features(x, context), *_gather(parts), traces, metrics, _by_layer(parts, "statistics"))

    def mix(
        self, inputs: Mapping[int, Float[Array, "b t m"]], context: Context = EMPTY
    ) -> dict[int, Float[Array, "b t m"]]:
        """Applies the mixers of single layers to `inputs`; returns their outputs by index of the layer.

        Args:
          inputs: Input of the mixer, after the norm, by index of the layer. The mixers of the period run in scans.
          context: Facts about the tokens, and inputs of particular modules.
        """

        def run(layer: Layer, x: Array, index: Array) -> Array:
            assert layer.mixer is not None
            return rematerialize(layer.mixer.__call__, layer.config.remat)(x, context.with_extras(layer=index))

        outputs = {}
        last = len(self.config.names) - len(self.after)
        for index, layer in [*enumerate(self.before), *enumerate(self.after, last)]:
            if index in inputs:
                outputs[index] = run(layer, inputs[index], jnp.asarray(index))
        for first, layer in enumerate(self.period, len(self.fold.before)):
            repetitions = range(first, last, len(self.fold.period))
            indices = [index for index in repetitions if index in inputs]
            if not indices:
                continue
            graph, parameters = nnx.split(layer)
            if len(indices) < len(repetitions):
                rows = np.array([repetitions.index(index) for index in indices])
                parameters = jax.tree.map(lambda x, rows=rows: x[rows], parameters)
            arguments = parameters, jnp.stack([inputs[index] for index in indices]), jnp.asarray(indices)
            stacked = jax.lax.map(lambda x, graph=graph: run(nnx.merge(graph, x[0]), *x[1:]), arguments)
            outputs |= zip(indices, stacked, strict=True)
        return outputs

    def _pass_on(self, selected: Selection | None, before: Selection | None) -> Selection | None:
        """The keys that later layers may reuse after a layer that selected some, or none; None if no layer does."""
        if not self.config.shares_selections:
            return None
        return before if selected is None else selected

    def _scan(self, run: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, xs: Any) -> tuple[Carry, Any]:
        """Runs the repetitions of the period."""
        x, selection = carry
        if self.config.shares_selections and selection is None:  # that of the period replaces an empty one
            structures = []

            def select(carry: Carry, xs: Any) -> list[Array]:
                leaves, structure = jax.tree.flatten(run(carry, xs)[0][1])
                structures.append(structure)
                return leaves

            shapes = jax.eval_shape(select, carry, jax.tree.map(operator.itemgetter(0), xs))
            zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes]
            selection = jax.tree.unflatten(structures[0], zeros)
        return jax.lax.scan(run, (x, selection), xs)

    def _order(self, parts: dict[str, list[Auxiliary]], field: str) -> tuple[Any, ...]:
        """A field of the layers in order, those of the period sliced from their stacks."""
        values = {part: [getattr(auxiliary, field) for auxiliary in layers] for part, layers in parts.items()}
        period = [
            jax.tree.map(operator.itemgetter(repetition), value)
            for repetition in range(self.fold.repeats)
            for value in values.get("period", [])
        ]
        return *values["before"], *period, *values["after"]

    def streams(self, tokens: Int[Array, "b t"], context: Context = EMPTY) -> list[Float[Array, "b t m"]]:
        """Returns the stream before the first layer, after each layer, and after the last norm; unrolls every layer."""
        x, context = self.embed(tokens, context)
        streams = [x]
        for index, layer in enumerate(self.unroll()):
            x, added = layer(x, context.with_extras(layer=jnp.asarray(index)))
            context = context.pass_on(added.selection)
            streams.append(x)
        return [*streams, self._normalize(x)]

    def selections(self, tokens: Int[Array, "b t"], context: Context = EMPTY) -> list[dict[str, Selection]]:
        """Returns the keys that queries select per layer, see `Layer.selections`; unrolls every layer."""
        x, context = self.embed(tokens, context)
        selections = []
        for index, layer in enumerate(self.unroll()):
            known = context.with_extras(layer=jnp.asarray(index))
            selections.append(layer.selections(x, known))
            x, added = layer(x, known)
            context = context.pass_on(added.selection)
        return selections

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns empty caches for decoding `length` tokens; those of the period have a leading axis of `repeats`."""

        def repeat(x: Array) -> Array:
            return jnp.broadcast_to(x, (self.fold.repeats, *x.shape))

        return {
            "before": [layer.init_cache(batch, length) for layer in self.before],
            "period": [jax.tree.map(repeat, layer.init_cache(batch, length)) for layer in self.period],
            "after": [layer.init_cache(batch, length) for layer in self.after],
        }

    def extend(
        self,
        tokens: Int[Array, "b c"],
        cache: Cache,
        positions: Int[Array, " b"],
        length: int,
        counts: Int[Array, " b"] | None = None,
        last: bool = False,
    ) -> tuple[Float[Array, "b *c v"], Cache]:
        """Returns logits after the next tokens of each row, and the next caches.

        Args:
          tokens: A chunk of each row: of a prompt, or one token that was generated.
          cache: The caches after the tokens before the chunk; `init_cache` before the first.
          positions: Position of the first token of each row's chunk; rows may differ.
          length: Number of positions, as in `init_cache`.
          counts: Number of tokens of each row's chunk; the rest is ignored, changes no cache, and has undefined logits.
            Defaults to c.
          last: Whether to return only the logits after the last token of each row, [b, v].
        """
        mask = None if counts is None else jnp.arange(tokens.shape[1]) < counts[:, None]
        x = self._repeat(self.embedding.extend(tokens, positions))
        context = Context(Tokens(mask=mask)).with_extras(embeddings=x, shared=dict(self.shared), ids=tokens)

        def run(layers: nnx.List, carry: Carry, caches: list[Cache], first: Array | int) -> tuple[Carry, list[Cache]]:
            (x, selection), after = carry, []
            for index, (layer, layer_cache) in enumerate(zip(layers, caches, strict=True)):
                layer_context = context.with_extras(layer=jnp.asarray(first + index), selection=selection)
                x, layer_cache, selected = layer.extend(x, layer_cache, positions, length, layer_context)
                selection = self._pass_on(selected, selection)
                after.append(layer_cache)
            return (x, selection), after

        carry, before = run(self.before, (x, None), cache["before"], 0)
        period = cache["period"]
        if self.fold.repeats:
            graph, parameters = nnx.split(self.period)
            carry, period = self._scan(
                lambda carry, period: run(nnx.merge(graph, period[0]), carry, *period[1:]),
                carry,
                (parameters, period, self._period_starts),
            )
        (x, _), after = run(self.after, carry, cache["after"], len(self.config.names) - len(self.after))
        if last:
            x = x[:, -1] if counts is None else x[jnp.arange(len(x)), counts - 1]
        return self.read_out(x, EMPTY), {"before": before, "period": period, "after": after}

    @property
    def _scopes(self) -> dict[str, list[str]]:
        """Names of the layers in traces, such as `layer_3/local`; `layer_3+2r` stands for the layers 3, 5, 7, ..."""
        names, fold = self.config.names, self.fold
        start, stop = len(fold.before), len(names) - len(fold.after)
        period = [f"layer_{start + i}+{len(fold.period)}r/{name}" for i, name in enumerate(fold.period)]
        before, after = ([f"layer_{i}/{names[i]}" for i in part] for part in (range(start), range(stop, len(names))))
        return {"before": before, "period": period, "after": after}

    @property
    def _period_starts(self) -> Array:
        """Index of the first layer of each repetition of the period."""
        return len(self.fold.before) + len(self.fold.period) * jnp.arange(self.fold.repeats)

    def unroll(self) -> Iterator[Layer]:
        """Every layer in order, those of the period sliced from their stacks."""
        yield from self.before
        graph, parameters = nnx.split(self.period)
        for repetition in range(self.fold.repeats):
            yield from nnx.merge(graph, jax.tree.map(operator.itemgetter(repetition), parameters))
        yield from self.after

    @jax.named_scope("embedding")
    def embed(self, tokens: Array, context: Context) -> tuple[Array, Context]:
        x = self._repeat(context.dropout(self.embedding(tokens, context.tokens.positions)))
        return x, context.with_extras(embeddings=x, shared=dict(self.shared), ids=tokens)

    def _repeat(self, x: Array) -> Array:
        """The streams, side by side."""
        return x if self.config.streams == 1 else jnp.concatenate([x] * self.config.streams, axis=-1)

    def _normalize(self, x: Array) -> Array:
        """The output of the last norm, from the stream after the last layer."""
        return normalize(self.norm, x if self.hyper is None else self.hyper.read(x)[0])

    def read_out(self, x: Array, context: Context) -> Array:
        """The logits, from the stream after the last layer."""
        return self.logits(self.features(x, context))

    def features(self, x: Array, context: Context) -> Array:
        """The input of the head, from the stream after the last layer."""
        x = self._normalize(x)
        return mean_pool(x, context.tokens.mask) if self.config.head.pool == "mean" else x

    @jax.named_scope("head")
    def logits(self, features: Float[Array, "*b w"]) -> Float[Array, "*b v"]:
        """Returns the logits of tokens, in float32."""
        return self.head(features, self.embedding.tokens[...])


def _gather(parts: dict[str, list[Auxiliary]]) -> tuple[Losses, Choices]:
    """Returns the sum over layers of each loss, and the choices of the layers that have experts."""
    losses: Losses = {}
    for layers in parts.values():
        for auxiliary in layers:
            for name, value in auxiliary.losses.items():
                losses[name] = losses.get(name, 0.0) + value.sum()  # over the repetitions of the period
    return losses, _by_layer(parts, "choices")


def _by_layer(parts: dict[str, list[Auxiliary]], field: str) -> dict[str, dict[int, Any]]:
    """A field of the layers that have it, at their paths in the parameters."""
    values: dict[str, dict[int, Any]] = {}
    for part, layers in parts.items():
        for index, auxiliary in enumerate(layers):
            if getattr(auxiliary, field) is not None:
                values.setdefault(part, {})[index] = getattr(auxiliary, field)
    return values


class Functional:
    """A model as pure functions of a plain nested dict of parameters, for use under `jax.jit`.

    Plain dicts are the fastest arguments of `jit`. The modules are rebuilt only while tracing.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self._graph, self._state = nnx.split(nnx.eval_shape(lambda: Model(config, nnx.Rngs(0))))

    def init(self, key: Array) -> dict[str, Any]:
        """Returns initial parameters, drawn in float32."""
        return self.round(nnx.to_pure_dict(nnx.state(Model(self.config, nnx.Rngs(key)))))

    def round(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters in the dtypes of `shapes`."""
        return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), parameters, self.shapes)

    def bind(self, parameters: dict[str, Any]) -> Model:
        """Returns the model with these parameters.

        Raises:
          InputError: A parameter is missing, unknown or of another shape; `restack` converts the parameters of another
            schedule.
        """
        check_parameters(parameters, self.shapes)
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(self._graph, state)

    @property
    def shapes(self) -> dict[str, Any]:
        """Shape and dtype per parameter, as in training: `shapes_in(config.param_dtype)`."""
        return self.shapes_in(self.config.param_dtype)

    def shapes_in(self, dtype: str) -> dict[str, Any]:
        """Shape and dtype per parameter, with linear maps and token embeddings in `dtype`, and the others in float32.

        The others are norms, biases, and the decays and step sizes of recurrences: few, and sensitive to rounding.
        """

        def read(variable: nnx.Variable, stacked: int) -> jax.ShapeDtypeStruct:
            rounds = decays(variable, stacked) or "vocab" in logical_axes(variable, stacked)
            return jax.ShapeDtypeStruct(variable.shape, dtype if rounds else jnp.float32)

        return self._metadata(read)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    @property
    def axes(self) -> dict[str, Any]:
        """A tuple of logical axis names per parameter, None for the leading axis of the scanned period."""
        return self._metadata(logical_axes)

    @property
    def decay(self) -> dict[str, Any]:
        """Whether weight decay applies, per parameter."""
        return self._metadata(decays)

    def _metadata(self, read: Callable[[nnx.Variable, int], Any]) -> dict[str, Any]:
        """The tree of parameters with `read(variable, number of stacked axes)` instead of each of them."""
        replaced = jax.tree_util.tree_map_with_path(
            lambda path, v: v.replace(read(v, int(path[0].key == "period"))),
            self._state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        return nnx.to_pure_dict(replaced)


def check_parameters(parameters: dict[str, Any], shapes: dict[str, Any]) -> None:
    """Compares parameters with the `shapes` of a `Functional`.

    Raises:
      InputError: A parameter is missing, unknown or of another shape; the message names the first by its path.
    """
    actual, expected = (_shapes_by_path(tree) for tree in (parameters, shapes))
    for path in [*expected, *actual]:
        if actual.get(path) != expected.get(path):
            problem = "is missing" if path not in actual else f"of shape {list(actual[path])} is unknown"
            if path in actual and path in expected:
                problem = f"has shape {list(actual[path])}, not {list(expected[path])}"
            raise InputError("parameters", f"{path} {problem}; see restack for parameters of another schedule")


def restack(parameters: dict[str, Any], source: ModelConfig, target: ModelConfig) -> dict[str, Any]:
    """Converts parameters between models of the same layers, whose schedules differ in what is scanned.

    Args:
      parameters: Parameters of `source`, or any tree of the same structure, such as gradients.
      source: The model of the parameters.
      target: A model of the same layers in the same order, under any names.

    Returns:
      The parameters of `target`.

    Raises:
      InputError: The layers differ in number or in the shape of a parameter.
    """
    check_parameters(parameters, Functional(source).shapes)
    if len(source.names) != len(target.names):
        raise InputError("target", f"has {len(target.names)} layers, not {len(source.names)}")
    result = restack_layers(parameters, source, target)
    check_parameters(result, Functional(target).shapes)
    return result


def restack_layers(parameters: dict[str, Any], source: ModelConfig, target: ModelConfig) -> dict[str, Any]:
    """Converts as `restack` any tree with the layers of `source`, whose leaves may have other shapes, or be missing."""
    layers = list(_split_layers(parameters, source.fold))
    fold, others = target.fold, {key: value for key, value in parameters.items() if key not in FOLDED}
    first, width = len(fold.before), len(fold.period)
    last = first + width * fold.repeats
    period = {}
    for i in range(width):
        repetitions = layers[first + i : last : width]
        for layer in repetitions:
            check_parameters(layer, repetitions[0])
        period[i] = jax.tree.map(lambda *x: jnp.stack(x), *repetitions)
    parts = {"before": dict(enumerate(layers[:first])), "period": period, "after": dict(enumerate(layers[last:]))}
    return others | {key: part for key, part in parts.items() if part}


def _split_layers(parameters: dict[str, Any], fold: Fold) -> Iterator[dict[str, Any]]:
    """The parameters of each layer, in order."""
    before, period, after = (parameters.get(key, {}) for key in FOLDED)
    yield from (before.get(i, {}) for i in range(len(fold.before)))
    for repetition in range(fold.repeats):
        yield from (jax.tree.map(operator.itemgetter(repetition), period.get(i, {})) for i in range(len(fold.period)))
    yield from (after.get(i, {}) for i in range(len(fold.after)))


def _shapes_by_path(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {path_of(path): getattr(leaf, "shape", ()) for path, leaf in leaves}


def path_of(path: Sequence[Any]) -> str:
    """Returns the dotted path of a parameter, such as `period.0.mixer.query.weight`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


class Location(NamedTuple):
    """Where a model keeps a parameter of the unrolled model.

    Attributes:
      path: Keys of the parameter in the nested dicts.
      repetition: Index of its repetition of the period; None if the parameter is not stacked.
      shape: Shape of the parameter.
    """

    path: tuple[Any, ...]
    repetition: int | None
    shape: tuple[int, ...]


def locate_parameters(model: Functional) -> dict[str, Location]:
    """Returns the location of each parameter by path in the unrolled model, such as `layers.3.mixer.query.weight`.

    The parameters of equal name in all layers are adjacent.
    """
    fold = model.config.fold
    first, width = len(fold.before), len(fold.period)
    starts = {"before": 0, "after": first + width * fold.repeats}
    located: dict[str, Location] = {}
    for path, leaf in sorted(jax.tree.leaves_with_path(model.shapes), key=lambda item: path_of(item[0][2:])):
        root, *keys = (entry.key for entry in path)
        if root == "period":
            for repetition in range(fold.repeats):
                name = ".".join(map(str, ("layers", first + repetition * width + keys[0], *keys[1:])))
                located[name] = Location((root, *keys), repetition, leaf.shape[1:])
        elif root in starts:
            located[".".join(map(str, ("layers", starts[root] + keys[0], *keys[1:])))] = Location(
                (root, *keys), None, leaf.shape
            )
        else:
            located[path_of(path)] = Location((root, *keys), None, leaf.shape)
    return located
