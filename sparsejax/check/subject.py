"""The model under check, with random parameters and tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.random import define_prng_impl

from sparsejax.check.reduce import replace_fields
from sparsejax.config import ModelConfig
from sparsejax.layers import EMPTY, Context, Layer, MixerConfig
from sparsejax.model import Functional, Model
from sparsejax.ops import Selection

NOISE = 0.1  # standard deviation of what is added to initial parameters
# Options of XLA on CPU that halve compilation and slow execution down, the first that the installed version accepts.
# The optimized HLO, which determines what reads what, is the same.
FAST_COMPILATION: tuple[dict[str, Any], ...] = (
    {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
    {"xla_backend_optimization_level": 0},
)
LONG = 20_000  # layers times tokens of a row from which execution takes longer than compilation


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under check.

    Attributes:
      config: The model.
      length: Tokens per sequence.
      seed: Seed of parameters and tokens.
    """

    config: ModelConfig
    length: int
    seed: int = 0

    @functools.cached_property
    def model(self) -> Functional:
        """The model as functions."""
        return Functional(self.config)

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """Random parameters: initial ones with noise, so that parameters that start at zero take part."""
        key = jax.random.key(self.seed, impl=_HASH)
        initial = jax.jit(self.model.init, compiler_options=_fast_compilation())(key)
        random = np.random.default_rng(self.seed)
        return jax.tree.map(lambda x: x + NOISE * random.normal(size=x.shape).astype(x.dtype), jax.device_get(initial))

    @property
    def mixers(self) -> dict[str, MixerConfig]:
        """The mixers of layers and of shared blocks, by the path of their section."""
        sections = {f"layers.{name}": layer.mixer for name, layer in self.config.layers.items()}
        sections |= {f"shared.{name}": block.mixer for name, block in self.config.shared.items()}
        return {path: mixer for path, mixer in sections.items() if mixer is not None}

    def draw_tokens(self, rows: int, seed: int = 0) -> np.ndarray:
        """Random token ids [rows, length], none of which is padding."""
        tokens = np.random.default_rng((self.seed, seed)).integers(0, self.config.vocab, (rows, self.length))
        padding = self.config.embedding.padding
        return tokens if padding is None else np.where(tokens == padding, (padding + 1) % self.config.vocab, tokens)

    def jit(self, function: Callable[..., Any]) -> Any:
        """Compiles a function that runs once or twice."""
        short = len(self.config.names) * self.length < LONG
        return jax.jit(function, compiler_options=_fast_compilation() if short else None)

    def forward(self, tokens: np.ndarray, context: Context = EMPTY) -> np.ndarray:
        """Logits of the compiled program, [b, t, v]."""
        return np.asarray(self._forward(self.parameters, jnp.asarray(tokens, jnp.int32), context))

    @functools.cached_property
    def _forward(self) -> Any:
        return self.jit(lambda parameters, tokens, context: self.model.bind(parameters)(tokens, context))

    def run_layers(
        self,
        tokens: np.ndarray,
        run: Callable[[Layer, jax.Array, Context], tuple[jax.Array, Any]] = Layer.__call__,
        inputs: Sequence[np.ndarray] | None = None,
        most: int | None = None,
    ) -> tuple[np.ndarray, list[tuple[str, Any]]]:
        """Logits of the layers one by one, and per layer its name and what `run` returns next to its output.

        Layers of the same name share a program. With `inputs`, each layer and the head read their input from there
        instead of the output of the layer before. With `most`, the run ends behind the last layer that is one of the
        first `most` of its name, and the logits are those of the layers so far.
        """
        model, compiled, results, names = self.bind(), dict[str, Any](), [], self.config.names
        if most is not None:
            names = names[: 1 + max(i for i, name in enumerate(names) if names[:i].count(name) < most)]

        @self.jit
        def start(parameters: Any, tokens: jax.Array) -> jax.Array:
            return self.model.bind(parameters).embed(tokens, EMPTY)[0]

        @self.jit
        def finish(parameters: Any, x: jax.Array) -> jax.Array:
            return self.model.bind(parameters).read_out(x, EMPTY)

        def apply(layer: Layer, x: jax.Array, context: Context) -> tuple[jax.Array, Any, Selection | None]:
            selected = layer(x, context)[1].selection if self.config.shares_selections else None
            return *run(layer, x, context), selected

        ids = jnp.asarray(tokens, jnp.int32)
        x = embeddings = start(self.parameters, ids)
        context = EMPTY.with_extras(embeddings=embeddings, shared=dict(model.shared), ids=ids)
        for index, (name, layer) in enumerate(zip(names, model.unroll(), strict=False)):
            graph, state = nnx.split(layer)
            if name not in compiled:
                compiled[name] = self.jit(lambda state, *inputs, graph=graph: apply(nnx.merge(graph, state), *inputs))
            x = x if inputs is None else jnp.asarray(inputs[index], x.dtype)
            x, result, selected = compiled[name](state, x, context.with_extras(layer=jnp.asarray(index)))
            context = context.pass_on(selected)
            results.append((name, result))
        x = x if inputs is None else jnp.asarray(inputs[-1], x.dtype)
        return np.asarray(finish(self.parameters, x)), results

    def bind(self) -> Model:
        """The model with its parameters."""
        return self.model.bind(self.parameters)

    def with_config(self, config: ModelConfig) -> Subject:
        """The same parameters in a model of the same shapes."""
        changed = dataclasses.replace(self, config=config)
        changed.__dict__["parameters"] = self.parameters
        return changed

    @functools.cached_property
    def exact(self) -> Subject:
        """The model in float32."""
        float32 = self.config.dtype == "float32"
        return self if float32 else self.with_config(dataclasses.replace(self.config, dtype="float32"))

    @property
    def reference(self) -> Subject:
        """The model under the reference implementation."""
        config = copy.copy(self.config)  # not `replace`, which refuses the dtype of `double`
        for name in ("layers", "shared"):
            sections = {key: replace_fields(section, impl="dense") for key, section in getattr(config, name).items()}
            object.__setattr__(config, name, sections)
        return self.with_config(config)

    @functools.cached_property
    def double(self) -> Subject:
        """The model in float64, for use inside `jax.enable_x64`."""
        config = dataclasses.replace(self.config)
        object.__setattr__(config, "dtype", "float64")  # no run can have this dtype: JAX needs a global switch for it
        changed = self.with_config(config)
        changed.__dict__["parameters"] = jax.tree.map(np.float64, self.parameters)
        return changed


# A generator of random numbers whose programs compile in a third of the time of those of Threefry.


def _mix(x: jax.Array) -> jax.Array:
    """A hash of 32 bits (Wellons 2018, lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _count(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Hashes of a key [1] and of the index of each element of `shape`."""
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32)
    return _mix(key + _mix(index + 1)).reshape(shape)


_HASH = define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: _mix(jnp.asarray(seed, jnp.uint32)[None]),
    split=lambda key, shape: _count(key, shape)[..., None],
    random_bits=lambda key, width, shape: _count(key, shape).astype(f"uint{width}"),
    fold_in=lambda key, value: _mix(key ^ _mix(jnp.asarray(value, jnp.uint32) + 1)),
    name="hash",
)


@functools.cache
def _fast_compilation() -> dict[str, Any] | None:
    if jax.default_backend() != "cpu":
        return None
    for options in FAST_COMPILATION:
        try:
            jax.jit(lambda: jnp.zeros(()), compiler_options=options)()
        except jax.errors.JaxRuntimeError:
            continue
        return options
    return None
