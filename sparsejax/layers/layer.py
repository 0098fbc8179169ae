"""A layer: one residual unit, a mixer or a feed-forward part or both, each with its norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.layers.experts import Experts, ExpertsConfig
from sparsejax.layers.mixers import MixerConfig, make_mixer
from sparsejax.layers.mlp import Mlp, MlpConfig
from sparsejax.layers.norm import Norm, NormConfig
from sparsejax.layers.shared import Side, SideConfig
from sparsejax.layers.stream import EMPTY, Context, Cost, Stream

# Feed-forward parts by their `kind`; each is called with the stream and the context, and gives what it adds and a
# dict of losses.
FEEDFORWARDS = {"gated": (MlpConfig, Mlp), "plain": (MlpConfig, Mlp), "experts": (ExpertsConfig, Experts)}
FeedForwardConfig = MlpConfig | ExpertsConfig
Losses = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
    """How a branch f joins the stream: `keep` · base + `scale` · f(...).

    `base` is "stream", or "norm" for what the branch's norm made of it (MiniMax-01, arXiv:2501.08313). DeepNorm
    (arXiv:2203.00555) is norm_position "post" with keep = (2 · depth) ** 0.25.
    """

    base: str = "stream"
    keep: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        if self.base not in ("stream", "norm"):
            raise ValueError(f"base must be stream or norm, got {self.base!r}")


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """A mixer, then a feed-forward part; either may be None.

    `norm_position`: "pre" (x + f(norm(x)), arXiv:2002.04745), "post" (norm(x + f(x))) or "both" (x + norm(f(norm(x))),
    Gemma 2, arXiv:2408.00118).
    """

    mixer: MixerConfig | None
    mlp: FeedForwardConfig | None
    norm: NormConfig
    norm_position: str
    remat: bool  # compute activations again in the backward pass instead of keeping them
    mixer_norm: NormConfig | None = None  # before the mixer, if it is another one than `norm`
    mixer_residual: ResidualConfig = ResidualConfig()
    mlp_residual: ResidualConfig = ResidualConfig()
    side: SideConfig | None = None  # a shared block whose output the mixer reads too

    def __post_init__(self):
        if self.norm_position not in ("pre", "post", "both"):
            raise ValueError(f"norm_position must be pre, post or both, got {self.norm_position!r}")
        if self.mixer is None and self.mlp is None:
            raise ValueError("mixer and mlp are both None: a layer needs one of them")
        if self.side is not None and self.mixer is None:
            raise ValueError("side: is added to what a mixer reads, and mixer is None")

    @property
    def connectivity(self) -> patterns.Pattern:
        """What a position takes from the others: without a mixer, itself alone."""
        return patterns.Window(0) if self.mixer is None else self.mixer.connectivity


class Residual(nnx.Module):
    """A branch's norms and its way back into the stream."""

    def __init__(self, config: ResidualConfig, position: str, norm: NormConfig, out: NormConfig, width, rngs):
        self.config = config
        self.before = Norm(norm, width, rngs) if position in ("pre", "both") else None
        self.within = Norm(out, width, rngs) if position == "both" else None
        self.after = Norm(out, width, rngs) if position == "post" else None

    def pre(self, x: Array) -> Array:
        """What the branch reads."""
        return x if self.before is None else self.before(x)

    def post(self, x: Array, y: Array, read: Array, drop: Callable[[Array], Array]) -> Array:
        """The stream `x` with the branch's output `y`, but for what `drop` drops; `read` is what the branch read."""
        config = self.config
        y = drop(y if self.within is None else self.within(y))
        base = read if config.base == "norm" else x
        x = (base if config.keep == 1 else config.keep * base) + (y if config.scale == 1 else config.scale * y)
        return x if self.after is None else self.after(x)


class Layer(nnx.Module):
    """A residual unit of the stream.

    In a reversible stream (arXiv:2001.04451) x is two streams side by side, x1 and x2: the mixer reads x2 and is
    added to x1, then the feed-forward part reads x1 and is added to x2.
    """

    def __init__(self, config: LayerConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.reversible = config, stream.reversible
        norm, place = config.norm, config.norm_position

        def residual(how: ResidualConfig, first: NormConfig) -> Residual:
            return Residual(how, place, first, norm, stream.width, rngs)

        self.mixer = None if config.mixer is None else make_mixer(config.mixer, stream, rngs)
        self.mlp = None if config.mlp is None else make_feed_forward(config.mlp, stream, rngs)
        first = norm if config.mixer_norm is None else config.mixer_norm
        self.side = None if config.side is None else Side(config.side, stream, rngs)
        self.mixer_residual = None if self.mixer is None else residual(config.mixer_residual, first)
        self.mlp_residual = None if self.mlp is None else residual(config.mlp_residual, norm)

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Losses]:
        """The stream after this layer, for a whole sequence, and the losses of its parts."""
        return jax.checkpoint(self._run)(x, context) if self.config.remat else self._run(x, context)

    def init_cache(self, batch: int, length: int) -> dict[str, Array]:
        """The caches of the mixer, and of the shared block if it uses one, before the first of `length` tokens."""
        cache = {} if self.mixer is None else self.mixer.init_cache(batch, length)
        return cache if self.side is None else {"mixer": cache, "side": self.side.init_cache(batch, length)}

    def step(
        self,
        x: Float[Array, "b m"],
        cache: dict[str, Array],
        position: Int[Array, ""],
        length: int,
        context: Context = EMPTY,
    ) -> tuple[Float[Array, "b m"], dict[str, Array]]:
        """The stream after this layer, for one more token, and the next cache."""
        extra, side = None, None
        if self.side is not None:
            extra, side = self.side.step(x, cache["side"], position, length, context)
            cache = cache["mixer"]

        def mix(read: Array) -> tuple[Array, dict[str, Array]]:
            return self.mixer.step(read, cache, position, length, context)

        x, cache = self._mix(x, mix, cache, extra, EMPTY)
        cache = cache if side is None else {"mixer": cache, "side": side}
        # A feed-forward part works on sequences: [b, 1, m].
        x, _ = self._feed(x[:, None], EMPTY)
        return x[:, 0], cache

    def cost(self, length: int) -> Cost:
        """Scored pairs, and forward FLOPs for each token."""
        cost = Cost(0, 0.0) if self.mixer is None else self.mixer.cost(length)
        cost = cost if self.side is None else cost + self.side.cost(length)
        return cost if self.mlp is None else cost + Cost(0, self.mlp.flops)

    def _run(self, x: Array, context: Context) -> tuple[Array, Losses]:
        extra = None if self.side is None else self.side(x, context)
        x, _ = self._mix(x, lambda read: (self.mixer(read, context), None), None, extra, context)
        return self._feed(x, context)

    def _mix(self, x: Array, run, nothing, extra: Array | None, context: Context):
        return (x, nothing) if self.mixer is None else self._join(x, self.mixer_residual, run, 0, context, extra)

    def _feed(self, x: Array, context: Context) -> tuple[Array, Losses]:
        if self.mlp is None:
            return x, {}
        return self._join(x, self.mlp_residual, lambda read: self.mlp(read, context), 1, context)

    def _join(self, x: Array, residual: Residual, run, written: int, context: Context, extra: Array | None = None):
        """The stream with a branch's output, and what else `run` gives; `extra` is read but not kept.

        Of two streams, the one numbered `written` is written and the other one read.
        """

        def drop(y: Array) -> Array:
            return context.dropout(y, written)

        if not self.reversible:
            read = residual.pre(x if extra is None else x + extra)
            y, more = run(read)
            return residual.post(x, y, read, drop), more
        streams = jnp.split(x, 2, axis=-1)
        read = residual.pre(streams[1 - written])
        y, more = run(read)
        streams[written] = residual.post(streams[written], y, read, drop)
        return jnp.concatenate(streams, axis=-1), more


def make_feed_forward(config: FeedForwardConfig, stream: Stream, rngs: nnx.Rngs) -> nnx.Module:
    """The module that `config` describes."""
    module = next(module for kind, module in FEEDFORWARDS.values() if isinstance(config, kind))
    return module(config, stream, rngs)
