"""A layer: a mixer, a feed-forward part or both, each with its norms and its residual connection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, argument_path, require_choice
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.experts import Experts, ExpertsConfig
from sparsejax.layers.hyper import make_connection
from sparsejax.layers.mixers import make_mixer
from sparsejax.layers.mlp import Mlp, MlpConfig
from sparsejax.layers.norm import NormConfig, make_norm, normalize
from sparsejax.layers.protocols import Auxiliary, Cache, FeedForward, MixerConfig, Trace
from sparsejax.layers.remat import rematerialize, require_policy
from sparsejax.layers.shared import Side, SideConfig
from sparsejax.layers.stream import Cost, Stream
from sparsejax.ops import AttentionCall, Selection
from sparsejax.ops.call import SelectedCall
from sparsejax.ops.residuals import INPUT, name_arrays

FeedForwardConfig = MlpConfig | ExpertsConfig
# The config and the module of each value of `kind`.
FEEDFORWARDS: dict[str, tuple[type[Any], type[Any]]] = {
    "gated": (MlpConfig, Mlp),
    "plain": (MlpConfig, Mlp),
    "experts": (ExpertsConfig, Experts),
}
BOOLEANS = {False: "none", True: "full", "false": "none", "true": "full"}  # policies as earlier versions wrote them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """How the output of a branch f joins the stream: `keep` · base + `scale` · f(...).

    DeepNorm (arXiv:2203.00555) is norm_position "post" with keep = (2 · depth) ** 0.25.
    """

    base: str = "stream"  # "stream", or "norm": the normalized input of the branch (MiniMax-01, arXiv:2501.08313)
    keep: float = 1.0  # factor on the base
    scale: float = 1.0  # factor on the output of the branch

    def __post_init__(self):
        require_choice(self, "base", ("stream", "norm"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """A mixer, then a feed-forward part; at most one of them is None."""

    mixer: MixerConfig | None  # mixer of tokens; none for a layer of a feed-forward part alone
    mlp: FeedForwardConfig | None  # feed-forward part; none for a layer of a mixer alone
    norm: NormConfig | None  # norm of both branches; none for no norm
    # "pre": x + f(norm(x)) (arXiv:2002.04745); "post": norm(x + f(x)); "both": x + norm(f(norm(x))) (Gemma 2);
    # "output": x + norm(f(x)) (OLMo 2, arXiv:2501.00656)
    norm_position: str
    # what the backward pass recomputes instead of keeping it: "none", "full" (all), "attention" (not attention and
    # recurrences), "dots" (nor products with matrices), or "offload" (as "attention", and keeps arrays in host memory)
    remat: str = dataclasses.field(metadata={"resume": "rounding", "older": BOOLEANS})
    mixer_norm: bool = True  # whether the mixer has a norm; false in the first layer of ModernBERT (arXiv:2412.13663)
    mixer_residual: ResidualConfig = ResidualConfig()  # residual connection of the mixer
    mlp_residual: ResidualConfig = ResidualConfig()  # residual connection of the feed-forward part
    parallel: bool = False  # let both branches read the norm of the mixer: x + f(norm(x)) + g(norm(x)) (GPT-J, Cohere)
    side: SideConfig | None = None  # shared block, whose output is added to the input of the mixer; none for no block

    def __post_init__(self):
        require_choice(self, "norm_position", ("pre", "post", "both", "output"))
        require_policy(self, "remat")
        if self.mixer is None and self.mlp is None:
            raise InputError("mixer", "a layer without a mixer needs an mlp, but both are none")
        if self.parallel and (self.mixer is None or self.mlp is None or self.norm_position != "pre" or self.side):
            raise InputError("parallel", 'requires a mixer and an mlp, norm_position "pre", and no side')
        if self.side is not None and self.mixer is None:
            raise InputError("side", "its output is added to the input of the mixer, but the mixer is none")

    @property
    def connectivity(self) -> patterns.Pattern:
        """The positions that a position can read from, apart from those of a shared block."""
        return patterns.Window(0) if self.mixer is None else self.mixer.connectivity

    def exchange(self, length: int, shards: int) -> str:
        """What shards of a sequence exchange, apart from a shared block: see `MixerConfig.exchange`."""
        return "none" if self.mixer is None else self.mixer.exchange(length, shards)

    def check_hyper(self) -> None:
        """Raises InputError if an option cannot be combined with hyper-connections, which replace the residual."""
        for name, value, plain in (
            ("parallel", self.parallel, False),
            ("side", self.side, None),
            ("mixer_residual", self.mixer_residual, ResidualConfig()),
            ("mlp_residual", self.mlp_residual, ResidualConfig()),
        ):
            if value != plain:
                raise InputError(name, "cannot be combined with hyper-connections, which replace residual connections")
        if self.norm_position == "post":
            raise InputError("norm_position", '"post" cannot be combined with hyper-connections; use "pre"')

    def check(self, length: int) -> None:
        """Raises InputError if the mixer cannot run on `length` tokens."""
        if self.mixer is not None:
            with argument_path("mixer"):
                self.mixer.check(length)


class Residual(nnx.Module):
    """The norms of a branch, and its residual connection."""

    def __init__(
        self,
        config: ResidualConfig,
        position: str,
        norm: NormConfig | None,
        width: int,
        rngs: nnx.Rngs,
        norm_input: bool = True,
    ):
        self.config = config
        self.before = make_norm(norm, width, rngs) if position in ("pre", "both") and norm_input else None
        self.within = make_norm(norm, width, rngs) if position in ("both", "output") else None
        self.after = make_norm(norm, width, rngs) if position == "post" else None

    def pre(self, x: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """Returns the input of the branch."""
        return normalize(self.before, x)

    def post(
        self,
        x: Float[Array, "*b m"],
        y: Float[Array, "*b m"],
        read: Float[Array, "*b m"],
        dropout: Callable[[Array], Array],
    ) -> Float[Array, "*b m"]:
        """Returns the stream `x` joined with the branch's output `y`, after dropout; `read` is the branch's input."""
        config = self.config
        y = dropout(normalize(self.within, y))
        base = read if config.base == "norm" else x
        x = (base if config.keep == 1 else config.keep * base) + (y if config.scale == 1 else config.scale * y)
        return normalize(self.after, x)


class Layer(nnx.Module):
    """A mixer and a feed-forward part, each in a residual branch.

    A reversible stream (arXiv:2001.04451) consists of two streams side by side, x1 and x2: the mixer reads x2 and is
    added to x1, then the feed-forward part reads x1 and is added to x2. Hyper-connections read and write their streams
    for each branch, see `layers.hyper`.
    """

    def __init__(self, config: LayerConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.reversible = config, stream.reversible
        if config.parallel and stream.reversible:
            raise InputError("parallel", "cannot be combined with a reversible stream")

        def residual(residual_config: ResidualConfig, norm_input: bool = True) -> Residual:
            return Residual(residual_config, config.norm_position, config.norm, stream.width, rngs, norm_input)

        self.mixer = None if config.mixer is None else make_mixer(config.mixer, stream, rngs)
        self.mlp = None if config.mlp is None else make_feed_forward(config.mlp, stream, rngs)
        self.side = None if config.side is None else Side(config.side, stream, rngs)
        self.mixer_residual = None if self.mixer is None else residual(config.mixer_residual, config.mixer_norm)
        self.mlp_residual = None if self.mlp is None else residual(config.mlp_residual, not config.parallel)
        hyper = stream.hyper, stream.width, stream.dtype, rngs
        self.mixer_hyper = None if self.mixer is None else make_connection(*hyper)
        self.mlp_hyper = None if self.mlp is None else make_connection(*hyper)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Returns the stream after this layer, for a whole sequence, and what it returns besides, see `Auxiliary`."""
        return rematerialize(self._run, self.config.remat)(x, context)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns the caches of the mixer and of the shared block before the first of `length` tokens."""
        cache = {} if self.mixer is None else self.mixer.init_cache(batch, length)
        return cache if self.side is None else {"mixer": cache, "side": self.side.init_cache(batch, length)}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache, Selection | None]:
        """Returns the stream after this layer for the next tokens, and the next cache; see `Mixer.advance`."""
        read, selection = self._shared_input(x), None
        if self.mixer is not None and self.mixer_residual is not None:
            mixer, extra, side = self.mixer, None, None
            if self.side is not None:
                extra, side = self.side.extend(x, cache["side"], positions, length, context)
                cache = cache["mixer"]

            def advance(read: Array) -> tuple[Array, tuple[Cache, Selection | None]]:
                y, after, selection = mixer.advance(read, cache, positions, length, context)
                return y, (after, selection)

            x, (after, selection) = self._join(x, self.mixer_residual, advance, written=0, extra=extra)
            cache = after if side is None else {"mixer": after, "side": side}
        return self._feed_forward(x, context, read)[0], cache, selection

    def attention_calls(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of the softmax attention of this layer, see `Mixer.attention_calls`.

        Args:
          x: The stream before this layer.
          context: As in `__call__`.

        Returns:
          The arguments by section of the layer's config: `mixer`, a section in it, or `side` for the shared block.
        """
        return self._ask_mixers("attention_calls", x, context)

    def selections(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the keys that queries select by section of the layer's config, see `attention_calls`."""
        return self._ask_mixers("selections", x, context)

    def cost(self, length: int) -> Cost:
        """Cost of the mixer, the shared block and the feed-forward part."""
        cost = Cost(0, 0.0) if self.mixer is None else self.mixer.cost(length)
        cost = cost if self.side is None else cost + self.side.cost(length)
        hyper = (part.flops for part in (self.mixer_hyper, self.mlp_hyper) if part is not None)
        cost += Cost(0, float(sum(hyper)))
        return cost if self.mlp is None else cost + Cost(0, self.mlp.flops)

    def _ask_mixers(self, method: str, x: Array, context: Context) -> dict[str, Any]:
        """What a method of the mixer and of the shared block returns by path, by section of the layer's config."""
        if self.mixer is None or self.mixer_residual is None:
            return {}
        values, read = {}, jnp.split(x, 2, axis=-1)[1] if self.reversible else x
        read = read if self.mixer_hyper is None else self.mixer_hyper.read(x)[0]
        if self.side is not None:
            values = {f"side{path}": value for path, value in self.side.ask_mixer(method, x, context).items()}
            read = read + self.side(x, context)
        paths = getattr(self.mixer, method)(self.mixer_residual.pre(read), context)
        return values | {f"mixer{path}": value for path, value in paths.items()}

    def _run(self, x: Array, context: Context) -> tuple[Array, Auxiliary]:
        x = name_arrays(x, INPUT)
        read, mixed, auxiliary = self._shared_input(x), (None, None), Auxiliary({})
        if self.mixer is not None and self.mixer_residual is not None:
            mixer = self.mixer

            def mix(read: Array) -> tuple[Array, tuple[tuple[Array, Array], Auxiliary]]:
                with jax.named_scope("mixer"):
                    y, auxiliary = mixer.mix(read, context)
                if context.extras.measured:
                    auxiliary = auxiliary._replace(metrics=mixer.measure(read, context))
                return y, ((read, y), auxiliary)

            extra = None if self.side is None else self.side(x, context)
            x, (mixed, auxiliary) = self._join(x, self.mixer_residual, mix, 0, context.dropout, extra)
        x, added = self._feed_forward(x, context, read)
        auxiliary = auxiliary.add(added)
        return x, auxiliary._replace(trace=Trace(*mixed, x) if context.extras.traced else None)

    def _shared_input(self, x: Array) -> Array | None:
        """The input of both branches, if they are parallel."""
        return self.mixer_residual.pre(x) if self.config.parallel and self.mixer_residual is not None else None

    def _feed_forward(self, x: Array, context: Context, read: Array | None) -> tuple[Array, Auxiliary]:
        if self.mlp is None or self.mlp_residual is None:
            return x, Auxiliary({})
        run = jax.named_scope("mlp")(self.mlp.__call__)
        return self._join(x, self.mlp_residual, lambda read: run(read, context), 1, context.dropout, shared=read)

    def _join(
        self,
        x: Array,
        residual: Residual,
        run: Callable[[Array], tuple[Array, Any]],
        written: int,
        dropout: Callable[[Array, int], Array] = EMPTY.dropout,
        extra: Array | None = None,
        shared: Array | None = None,
    ) -> tuple[Array, Any]:
        """Runs a branch of the layer.

        Args:
          x: The residual stream.
          residual: Norms and residual connection of the branch.
          run: The branch; returns its output and an auxiliary result.
          written: Index of the branch, and of the stream that it writes; with two streams it reads the other one.
          dropout: Applied to the output with the index of the branch.
          extra: Added to the input of the branch, and not to the stream.
          shared: Input of the branch, by default the norm of the stream.

        Returns:
          The stream with the branch's output, and the auxiliary result.
        """
        hyper = self.mlp_hyper if written else self.mixer_hyper
        if hyper is not None:
            source, weights = hyper.read(x)
            y, auxiliary = run(residual.pre(source))
            return hyper.write(x, dropout(normalize(residual.within, y), written), weights), auxiliary
        streams = jnp.split(x, 2, axis=-1) if self.reversible else [x]
        source = streams[1 - written] if self.reversible else x
        read = residual.pre(source if extra is None else source + extra) if shared is None else shared
        y, auxiliary = run(read)
        target = written if self.reversible else 0
        streams[target] = residual.post(streams[target], y, read, lambda y: dropout(y, written))
        return jnp.concatenate(streams, axis=-1) if self.reversible else streams[0], auxiliary


def make_feed_forward(config: FeedForwardConfig, stream: Stream, rngs: nnx.Rngs) -> FeedForward:
    """Builds the feed-forward part that `config` describes."""
    module = next(module for kind, module in FEEDFORWARDS.values() if isinstance(config, kind))
    return module(config, stream, rngs)
