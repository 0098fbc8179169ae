"""What a mixer, its config and a feed-forward part provide.

A mixer is a config derived from `MixerConfig` and a module derived from `Mixer`, which `layers.register` connects.
`sparsejax.testing.check_mixer` compares a mixer with what it states.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError
from sparsejax.layers.caching import chunk_positions, write_slots
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.stream import Cost, Stream, decays
from sparsejax.ops import IMPLEMENTATIONS, AttentionCall, Selection
from sparsejax.ops.attention import RING
from sparsejax.ops.call import SelectedCall
from sparsejax.patterns.exchange import plan_exchange

Cache = dict[str, Any]  # arrays [b, ...] by name, or caches by name
SELECTED = "all-gather, then selection"  # exchange of keys among which the data choose
INDEX_CACHES = ("index", "indexer", "sums", "buckets")  # parts of caches that only the choice of keys reads


class Trace(NamedTuple):
    """Activations of a layer.

    Attributes:
      mixer_input: Input of the mixer, after the norm; None without a mixer.
      mixer_output: Output of the mixer, before dropout, norm and residual connection; None without a mixer.
      stream: The residual stream after the layer.
    """

    mixer_input: Float[Array, "b t m"] | None
    mixer_output: Float[Array, "b t m"] | None
    stream: Float[Array, "b t s"]


class Auxiliary(NamedTuple):
    """What a mixer, a feed-forward part or a layer returns besides its output.

    Attributes:
      losses: Weighted losses by name, each a mean over the tokens of the batch.
      choices: Number of choices per expert; None without experts.
      trace: Activations of a layer, if `Extras.traced`.
      selection: The keys that an indexer selected, which later layers may reuse; None without an indexer.
      metrics: Metrics of the selection of a layer by name, if `Extras.measured`.
      statistics: Sums over the tokens by name, from which `MixerConfig.update_state` follows.
    """

    losses: dict[str, Float[Array, ""]]
    choices: Int[Array, " e"] | None = None
    trace: Trace | None = None
    selection: Selection | None = None
    metrics: dict[str, Float[Array, ""]] | None = None
    statistics: dict[str, Float[Array, ...]] | None = None

    def add(self, other: Auxiliary) -> Auxiliary:
        """Returns the sum of the losses, and whatever else one of them has."""
        losses = {name: self.losses.get(name, 0.0) + other.losses.get(name, 0.0) for name in self.losses | other.losses}
        rest = [mine if theirs is None else theirs for mine, theirs in zip(self[1:], other[1:], strict=True)]
        statistics = {**(self.statistics or {}), **(other.statistics or {})} or None
        return Auxiliary(losses, *rest)._replace(statistics=statistics)


class MixerConfig:
    """Base of the configs of mixers: a frozen dataclass whose fields are the keys of the config section.

    The defaults describe a mixer through which a position reads from its whole past, at any length.
    """

    @property
    def summary(self) -> str:
        """Kind and sizes in a few words, for `sparsejax show`; the first word is the kind."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = [(field.name, getattr(self, field.name)) for field in fields]
        sizes = [f"{name} {value}" for name, value in values if isinstance(value, int | float | str)]
        return " ".join([type(self).__name__.removesuffix("Config").lower(), ", ".join(sizes)]).strip()

    @property
    def connectivity(self) -> patterns.Pattern:
        """The positions that a position can read from, from which causality and the receptive field follow."""
        return patterns.Causal()

    @property
    def leaks(self) -> str:
        """How a position depends on later tokens although `connectivity` is causal; empty if it does not."""
        return ""

    @property
    def selects(self) -> bool:
        """Whether a position reads from some positions of `connectivity` only, which the data choose."""
        return False

    @property
    def indexers(self) -> tuple[Any, ...]:
        """The indexers, each an `IndexerConfig`."""
        return ()

    @property
    def is_measured(self) -> bool:
        """Whether a selection is used or trained, of which `Mixer.measure` returns metrics."""
        return (self.selects and not self.leaks) or bool(self.indexers)

    def update_state(self, parameters: dict[str, Any], statistics: dict[str, Array]) -> dict[str, Any]:
        """Returns the parameters of the mixer after a training step whose layers returned these `statistics`.

        For state that no gradient trains. Arrays of scanned layers have a leading axis of repetitions. The default
        changes nothing.
        """
        return parameters

    def exchange(self, length: int, shards: int) -> str:
        """What shards of a sequence of `length` tokens exchange, in a few words such as "halo".

        Empty, as by default, if the sequence cannot be sharded.
        """
        return ""

    def check(self, length: int) -> None:
        """Raises InputError, with the path of the argument, if the mixer cannot run on `length` tokens."""


class AttendingConfig(MixerConfig):
    """Base of configs of attention to the keys of `connectivity`, or to those of them that the data choose."""

    impl: str = "auto"  # implementation of `ops.attend`

    def exchange(self, length: int, shards: int) -> str:
        """Keys, as the pattern of each head demands, unless the data choose them."""
        if self.selects or self.indexers:
            return SELECTED
        heads, in_ring = dict.fromkeys(self.connectivity.by_head()), self.impl == "ring"
        return "; ".join(dict.fromkeys(plan_exchange(head, length, shards, in_ring).kind for head in heads))


class Mixer(nnx.Module):
    """Base of mixers: modules through which tokens read from each other.

    A mixer is built as `Mixer(config, stream, rngs)` and keeps the width m of the stream. It defines:

      * `__call__`: the output for a whole sequence. It must honor `context.tokens`: documents that share a row do not
        interact (`segments`), and nothing is read from padding (`mask`).
      * `init_cache` and `extend`, together and optional: decoding. By default the inputs are cached and `__call__` runs
        on all of them per chunk, which is correct for every causal mixer but slow to decode.
      * `mix`, optional, in place of `__call__`: losses besides the output.
      * `cost`, optional: FLOPs and attended pairs. By default two FLOPs per token and element of a matrix.

    Parameters come from `layers.Linear` and `layers.parameter`, which set the logical axes, by which a parameter is
    sharded, and whether weight decay applies. Parameters of `flax.nnx` modules are replicated, and matrices decay.
    """

    def __init__(self, config: MixerConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.width, self.dtype = config, stream.width, stream.dtype

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        raise NotImplementedError

    def mix(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Mixes as `__call__`, which is the default, and returns losses."""
        return self(x, context), Auxiliary({})

    def measure(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Float[Array, ""]]:
        """Returns metrics of the selection by name, see `ops.measure_selection`; none without a selection."""
        return {}

    def selections(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the keys that the queries of a whole sequence select; an empty dict without a selection.

        They are by path, as those of `attention_calls`. A query attends to the selected keys of its connectivity only.
        """
        return {}

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the cache before the first of `length` tokens: arrays [b, ...] by name."""
        return {"inputs": jnp.zeros((batch, length, self.width), self.dtype)}

    def extend(
        self,
        x: Float[Array, "b c m"],
        cache: Cache,
        positions: Int[Array, " b"],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens of sequences whose past is in a cache: prefill in chunks, and decoding with c = 1.

        Args:
          x: A chunk of each row, of any size.
          cache: The cache after the tokens before the chunk.
          positions: Position of the first token of each row's chunk; rows may differ.
          length: Number of positions for which the cache was made.
          context: `context.tokens.mask` [b, c] is true at the tokens of a row that exist, which come first. The others
            change neither the cache nor the output at a token that exists. There are no segments.

        Returns:
          The output, equal to that of `__call__` over the whole sequence at these positions, however it is cut into
          chunks; and the cache, whose shapes and dtypes do not change.
        """
        at = chunk_positions(positions, x.shape[1])
        inputs = write_slots(cache["inputs"], x, at, context.tokens)
        y = self(inputs, dataclasses.replace(context, tokens=EMPTY.tokens))
        return jnp.take_along_axis(y, jnp.minimum(at, length - 1)[..., None], axis=1), {"inputs": inputs}

    def advance(
        self,
        x: Float[Array, "b c m"],
        cache: Cache,
        positions: Int[Array, " b"],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b c m"], Cache, Selection | None]:
        """Mixes as `extend`, which is the default, and returns the keys that an indexer selected."""
        return *self.extend(x, cache, positions, length, context), None

    def attention_calls(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of every softmax attention that `__call__` computes, for analysis.

        The keys are the paths of the sections of their mixers from that of this one, "" for this one.
        """
        return {}

    def cost(self, length: int) -> Cost:
        """Returns the cost over `length` tokens."""
        variables = jax.tree.leaves(nnx.state(self, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        return Cost(0, 2.0 * sum(math.prod(variable.shape) for variable in variables if decays(variable)))


@runtime_checkable
class FeedForward(Protocol):
    """A module that transforms every token by itself."""

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Returns the output, and losses and choices."""
        ...

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        ...


def parse_pattern(text: str | patterns.Pattern, heads: int, length: int | None = None) -> patterns.Pattern:
    """Parses the `pattern` argument of an attention mixer.

    Raises:
      InputError: The text does not parse, does not fit `length`, or describes another number of heads.
    """
    try:
        pattern = patterns.parse(text, length)
    except patterns.PatternError as error:
        raise InputError("pattern", error.problem) from error
    if pattern.heads not in (None, heads):
        raise InputError("pattern", f"{str(text)!r} describes {pattern.heads} heads, but heads = {heads}")
    return pattern


def implementation_names() -> tuple[str, ...]:
    """Values of the argument `impl` of attention mixers."""
    return "auto", *(implementation.name for implementation in (*IMPLEMENTATIONS, RING))
